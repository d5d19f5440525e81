"""What an open or attach asks for, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engram.v1 import model_pb2
from engram_service.catalog import Served
from engram_service.errors import ServiceError

VOID_HANDLE = 0xFFFFFFFF


@dataclass(slots=True)
class Wanted:
    """What an OpenFrame or AttachFrame asks for."""

    model: str
    version: str
    tenant: str
    ids: Sequence[str]  # keys, all of this tenant
    interval: bool
    client_id: int
    ttl_ms: int
    attach: bool
    confirms: bool = False  # the client can be asked whether it is still there
    shared: bool = False  # whoever opens the session on this stream opens it for all that do
    constants: Sequence[model_pb2.Constant] = ()  # of the sessions that this makes
    start: NDArray[np.uint8] | None = None  # the state that they begin with; None: the model's initial one


@dataclass(slots=True)
class Opened:
    """What became of it, row by row."""

    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    acked: NDArray[np.uint64]
    created: NDArray[np.uint8]
    ids: list[str]
    served: Served | None = None
    losses: int = 0  # of the store, before the claims
    errors: dict[int, ServiceError] = field(default_factory=dict)

    @classmethod
    def refused(cls, count: int, ids: list[str], refusal: ServiceError | None) -> Opened:
        """Every row refused; with no refusal, every row still open."""
        zeros = np.zeros(count, np.uint64)
        errors = {} if refusal is None else dict.fromkeys(range(count), refusal)
        return cls(
            np.full(count, VOID_HANDLE, np.uint32), zeros, zeros.copy(), np.zeros(count, np.uint8), ids, errors=errors
        )
