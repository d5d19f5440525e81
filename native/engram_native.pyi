"""What Engram does for each message, in Rust. src/wire/mod.rs says what each of these does."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

__version__: str

@final
class Event:
    """What happened to a call that is no row of steps."""

    kind: str
    """"begin", "message", "half_close", "end"; "step": a unary Step that has come whole, which is one event; or "refused": a call
    of somebody without a token that is known. Of these some are told."""
    call: int
    rows_before: int
    """How many rows have come before it, ever, on any call."""
    path: str
    identity: int | None
    metadata: list[tuple[str, str]]
    timeout_ms: int | None
    peer: str
    """The other end of a call's connection, as gRPC spells it; of a call that begins."""
    data: bytes

@final
class StepModel:
    """What the wire must know of a model for unary steps: of its input and output row bytes, and whether all are float32."""

    def __init__(
        self, name: str, version: str, *, takes: tuple[int, bool], gives: tuple[int, bool], shape: list[int]
    ) -> None: ...

@final
class Wire:
    """Connections of gRPC clients, ended in threads of their own. One Python thread calls it, and waits for `descriptor`."""

    descriptor: int
    input_nbytes: int

    def __init__(
        self,
        *,
        connections: int = 65536,
        calls: int = 1024,
        header_nbytes: int = 16384,
        message_nbytes: int = 4194304,
        rows: int = 16384,
        inbox_nbytes: int = 268435456,
        handshake_s: float = 10.0,
        idle_s: float = 300.0,
        keepalive_s: float = 30.0,
        resets: int = 200,
        frame_rows: int = 16384,
        frame_nbytes: int = 4194304,
        threads: int = 1,
        head: list[tuple[str, str]] = ...,
        relay: str | None = None,
        relayed: int = 256,
        refusals: dict[str, tuple[int, str, bytes]] = ...,
        edges: Sequence[float] = ...,
        step_s: float = 30.0,
    ) -> None: ...
    def listen(self, descriptor: int) -> None: ...
    def set_tls(self, certificate: bytes, key: bytes, clients: bytes | None = None) -> None: ...
    def set_tokens(self, identities: dict[bytes, int] | None) -> None: ...
    def set_steppers(self, callers: dict[int, tuple[str, float]] | None) -> None: ...
    def know(self, tenant: str, session: str, handle: int, model: StepModel) -> None: ...
    def forget(self, handle: int) -> None: ...
    def again(self, call: int, given: bool, numbered: bool) -> bool: ...
    def take(self) -> tuple[int, int, list[Event]]: ...
    def columns(
        self,
        calls: NDArray[np.uint32],
        handles: NDArray[np.uint32],
        seqs: NDArray[np.uint64],
        acknowledged: NDArray[np.uint64],
        flags: NDArray[np.uint8],
        timeouts_ms: NDArray[np.uint32],
        input_nbytes: NDArray[np.uint32],
        inputs: NDArray[np.uint8],
        times: NDArray[np.float64],
    ) -> None: ...
    def answer(
        self,
        calls: NDArray[np.uint32],
        handles: NDArray[np.uint32],
        seqs: NDArray[np.uint64],
        outputs: NDArray[np.uint8],
        durable: NDArray[np.uint64],
    ) -> None: ...
    def send(self, call: int, message: bytes, rows: int = 0) -> None: ...
    def expect(self, call: int, rows: int) -> None: ...
    def respond(self, call: int, message: bytes) -> None: ...
    def finish(self, call: int, code: int = 0, message: str = "", details: bytes | None = None) -> None: ...
    def drain(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def written(self) -> tuple[list[int], float]: ...
    def close(self, grace_s: float = 0.0) -> None: ...

@final
class Usual:
    """What rows of steps that are like most are checked against, and are let in with one call."""

    def __init__(
        self,
        ids: NDArray[np.uint32],
        in_flight: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.uint32],
        rows: NDArray[np.int32],
        handles: NDArray[np.uint32],
        model: NDArray[np.int16],
        slot: NDArray[np.int32],
        opening: NDArray[np.uint8],
        admitted: NDArray[np.uint64],
        applied: NDArray[np.uint64],
        acked: NDArray[np.uint64],
    ) -> None: ...
    def admit(
        self,
        calls: NDArray[np.uint32],
        handles: NDArray[np.uint32],
        seqs: NDArray[np.uint64],
        acknowledged: NDArray[np.uint64],
        flags: NDArray[np.uint8],
        input_nbytes: NDArray[np.uint32],
        inputs: NDArray[np.uint8],
        found: NDArray[np.int32],
        model: int,
        window: int,
        width: int,
        floats: int,
    ) -> bool: ...

@final
class RecordSource:
    """Where a model's records are made of: columns of the session table, and of the model's arena."""

    def __init__(
        self,
        tags: NDArray[np.uint8],
        tokens: NDArray[np.uint8],
        ttl_ms: NDArray[np.uint64],
        acked: NDArray[np.uint64],
        epoch: NDArray[np.uint64],
        slot: NDArray[np.int32],
        states: list[NDArray[np.uint8]],
        outputs: NDArray[np.uint8],
        window: int,
        state_nbytes: int,
        fingerprint: int,
        runtime: int,
        prefix: bytes,
    ) -> None: ...

@final
class CommitLink:
    """One connection for commits, of one thread. A commit is one `send`, or several of which the last one counts or waits; then
    `progress` until it is True; then `verdicts`. Whatever raises an OSError ends the link."""

    descriptor: int
    """-1 after an error or `close`."""
    wants_write: bool
    in_doubt: bool
    """Commands were sent, or parts of them, whose replies have not come: also after an error."""

    def __init__(self, descriptor: int) -> None: ...
    @staticmethod
    def over_tls(stream: TlsStream) -> CommitLink: ...
    def send(
        self,
        tags: NDArray[np.uint8],
        tokens: NDArray[np.uint8],
        records: NDArray[np.uint8],
        ttl_ms: NDArray[np.uint64],
        prefix: bytes,
        counting_key: bytes = b"",
        wait: bytes = b"",
        more: bool = False,
    ) -> None: ...
    def commit(
        self,
        source: RecordSource,
        rows: NDArray[np.int32],
        seqs: NDArray[np.uint64],
        states: list[NDArray[np.uint8]],
        now_ms: int,
        counting_key: bytes = b"",
        wait: bytes = b"",
        timeout_s: float = 0.0,
    ) -> tuple[int, int | None, list[int]] | None: ...
    def progress(self, timeout_s: float = 0.0) -> bool: ...
    def verdicts(self) -> tuple[bytes | None, list[tuple[int, bytes]], int | None, list[int]]: ...
    def close(self) -> None: ...

@final
class TlsStream:
    """A connected socket under TLS, the handshake made, until a CommitLink takes it over. A time that passes is a TimeoutError."""

    version: str | None

    def __init__(
        self,
        descriptor: int,
        name: str,
        timeout_s: float | None = None,
        ca: bytes | None = None,
        system: list[str] = ...,
        certificate: bytes | None = None,
        key: bytes | None = None,
    ) -> None: ...
    def settimeout(self, timeout_s: float | None = None) -> None: ...
    def sendall(self, data: bytes) -> None: ...
    def recv(self, size: int) -> bytes: ...
    def close(self) -> None: ...

def pack_records(
    out: NDArray[np.uint8],
    fingerprint: int,
    runtime: int,
    seq: NDArray[np.uint64],
    acked: NDArray[np.uint64],
    epoch: NDArray[np.uint64],
    counts: NDArray[np.uint32],
    states: list[NDArray[np.uint8]],
    outputs: NDArray[np.uint8],
    now_ms: int,
) -> None: ...
def seize(busy: NDArray[np.uint8], rows: NDArray[np.int32], deadlines: NDArray[np.float64], now: float) -> bool:
    """places.py says what this does, and `keep`."""

def keep(
    rings: NDArray[np.uint8],
    window: int,
    slots: NDArray[np.int32],
    seqs: NDArray[np.uint64],
    outputs: NDArray[np.uint8],
) -> None: ...
def leave(ids: NDArray[np.uint32], in_flight: NDArray[np.int64], calls: NDArray[np.uint32]) -> int:
    """Takes a row off `in_flight`, by the number of its stream, for each of these ids, but for streams that have ended; how many
    it were."""
