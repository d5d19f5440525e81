"""What the server says of models, sessions and itself, as frozen dataclasses. Built from protobuf here alone."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any

from google.protobuf import timestamp_pb2

from engram.v1 import model_pb2, session_pb2, stream_pb2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor, without the batch dimension.

    dtype: float16, float32, float64, bfloat16 (float32 for the caller), int8, int16, int32, int64, uint8 or bool. role: of state
    tensors; a "constant" is set when a session is made.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.shape else f"one {self.dtype}"

    @classmethod
    def of(cls, spec: model_pb2.TensorSpec) -> TensorSpec:
        return cls(spec.name, spec.dtype, tuple(spec.shape), spec.role)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version of one served model. Inputs and outputs are in the order in which a row on the wire has them."""

    name: str
    version: str
    kind: str
    fingerprint: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    generates: bool
    allows_non_finite: bool
    latest: bool
    description: str
    batching: str
    """How rows of several sessions are computed, in words."""

    @property
    def constants(self) -> tuple[TensorSpec, ...]:
        """The state tensors that are set when a session is made, see AsyncClient.open."""
        return tuple(spec for spec in self.state if spec.role == "constant")

    @classmethod
    def of(cls, model: model_pb2.Model) -> ModelInfo:
        return cls(
            name=model.name,
            version=model.version,
            kind=model.kind,
            fingerprint=model.fingerprint,
            inputs=tuple(map(TensorSpec.of, model.inputs)),
            outputs=tuple(map(TensorSpec.of, model.outputs)),
            state=tuple(TensorSpec.of(spec) for spec in model.state),
            generates=model.generates,
            allows_non_finite=model.allows_non_finite,
            latest=model.latest,
            description=model.description,
            batching=model.batching,
        )


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its committed record has it. Times are UTC; None where the server did not say."""

    id: str
    model: str
    version: str
    fingerprint: str
    seq: int
    acknowledged_seq: int
    epoch: int
    created: datetime.datetime | None
    committed: datetime.datetime | None
    expires: datetime.datetime | None
    residency: str
    """"stored" (in Redis alone), "device" (in a server's arena too) or "" (unknown)."""

    @classmethod
    def of(cls, session: session_pb2.Session) -> SessionInfo:
        return cls(
            id=session.id,
            model=session.model,
            version=session.version,
            fingerprint=session.fingerprint,
            seq=session.seq,
            acknowledged_seq=session.acknowledged_seq,
            epoch=session.epoch,
            created=_time(session.create_time) if session.HasField("create_time") else None,
            committed=_time(session.commit_time) if session.HasField("commit_time") else None,
            expires=_time(session.expire_time) if session.HasField("expire_time") else None,
            residency=_RESIDENCY.get(session.residency, ""),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """What `Session.settle` has found out of steps whose fate was open."""

    seq: int
    """The last step of the session that is applied."""

    applied: int
    """How many of the open steps were applied; the others were not, and never will be."""

    outputs: Any
    """Theirs, [applied, *output shape], in order; zeros for inputs that were prefilled. A dict where the model has several."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself."""

    version: str
    device: str
    frame_bytes_max: int
    durability: str
    address: str
    """Where this very server can be reached; "" where it was not told."""

    @classmethod
    def of(cls, server: session_pb2.GetServerResponse) -> ServerInfo:
        durability = _DURABILITY.get(server.durability, "")
        return cls(server.server_version, server.device, server.frame_bytes_max, durability, server.address)


_RESIDENCY = {session_pb2.Session.RESIDENCY_STORED: "stored", session_pb2.Session.RESIDENCY_DEVICE: "device"}
_DURABILITY = {stream_pb2.DURABILITY_STEP: "step", stream_pb2.DURABILITY_INTERVAL: "interval"}


def _time(stamp: timestamp_pb2.Timestamp) -> datetime.datetime:
    return stamp.ToDatetime(tzinfo=datetime.UTC)
