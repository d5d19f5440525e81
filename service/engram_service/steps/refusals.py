"""Why rows of a frame are refused, and what is known of their fate. Pure; admission.py, repeats.py and opening.py ask.

Every refusal of a row says in its metadata what became of the step, as far as this server can know (`applied`):

    no       no submission of this seq was applied, or will be: the client may send another input under it
    yes      the step was applied before; repeat its seq for the answer
    unknown  it is under way, or the session is somebody else's by now: repeat its seq to learn more
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.errors import (
    AbortedError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
)
from engram_service.sessions.handles import CLOSED, ENDED, TAKEN_OVER, UNKNOWN
from engram_service.sessions.table import SessionTable
from engram_service.store import Verdict

Refused = list[tuple[NDArray[np.bool_], ServiceError]]

RETRY_MS = 50  # what is in the way is so for a moment
_GAPS_MAX = 64  # places of sessions that are told in answer to one frame
_FATES = ("no", "yes", "unknown")
_NO, _YES, _OPEN = range(3)


def taken_over() -> ServiceError:
    return AbortedError("TAKEN_OVER", "a newer open holds this session")


def closed() -> ServiceError:
    return AbortedError("SESSION_CLOSED", "the session was closed by another client, or has expired")


def ended() -> ServiceError:
    return AbortedError("SESSION_CLOSED", "this stream has closed the session, or let go of it; open it again")


def held() -> ServiceError:
    message = "the session is being opened, moved or closed just now; try again"
    return ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=RETRY_MS)


def behind_late() -> ServiceError:
    message = "the step that this one repeats was dropped, since the time of a step before it was up; send it again"
    return ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=RETRY_MS)


def lost(verdict: Verdict) -> ServiceError:
    return taken_over() if verdict.fenced else closed()


def uncommitted(verdict: Verdict) -> ServiceError:
    """For steps whose commit was refused."""
    refusal = lost(verdict)
    refusal.metadata["applied"] = "no" if verdict in (Verdict.FENCED, Verdict.GONE) else "unknown"
    return refusal


def void(why: int) -> ServiceError:
    """What a handle is told that names no session any more."""
    unknown = NotFoundError("INVALID_HANDLE", "no session of this stream has this handle; open it first")
    return {TAKEN_OVER: taken_over(), CLOSED: closed(), ENDED: ended()}.get(why, unknown)


def bad_handles(rows: NDArray[np.int32]) -> Refused:
    if (rows >= 0).all():
        return []
    return [(rows == why, void(why)) for why in (TAKEN_OVER, CLOSED, ENDED, UNKNOWN) if (rows == why).any()]


def gaps(gap: NDArray[np.bool_], admitted: NDArray[np.uint64]) -> Refused:
    """The rows of `gap`, put together by the step that their sessions expect."""
    refused: Refused = []
    for last in np.unique(admitted[gap])[:_GAPS_MAX].tolist():
        message = f"the next step of this session is {last + 1}; send steps in order"
        refused.append((gap & (admitted == last), FailedPreconditionError("SEQ_GAP", message, next_seq=last + 1)))
    others = FailedPreconditionError("SEQ_GAP", "this is not the session's next step; send steps in order")
    return [*refused, (gap, others)] if len(refused) == _GAPS_MAX else refused


def fates(table: SessionTable, rows: NDArray[np.int32], seqs: NDArray[np.uint64]) -> NDArray[np.int8]:
    """What is known of these steps. Negative rows: the session is not the stream's any more."""
    known = rows >= 0
    safe = np.where(known, rows, 0)
    under_way = seqs <= table.admitted[safe]
    found = np.where(seqs <= table.applied[safe], _YES, np.where(under_way, _OPEN, _NO))
    return np.where(seqs == 0, _NO, np.where(known, found, _OPEN)).astype(np.int8)


def errors_frame(
    handles: NDArray[np.uint32], seqs: NDArray[np.uint64], refused: Refused, fate: NDArray[np.int8]
) -> stream_pb2.StreamResponse:
    """The refused rows, each with the first refusal whose mask it is in, and with its fate."""
    index = np.full(len(handles), -1, np.int64)
    for number, (mask, _) in enumerate(refused):
        index[mask & (index < 0)] = number
    rows = np.flatnonzero(index >= 0)
    kinds, places = np.unique(index[rows] * len(_FATES) + fate[rows], return_inverse=True)
    errors = []
    for kind in kinds.tolist():
        detail = refused[kind // len(_FATES)][1].detail()
        if "applied" not in detail.metadata:
            detail.metadata["applied"] = _FATES[kind % len(_FATES)]
        errors.append(detail)
    return stream_pb2.StreamResponse(
        errors=stream_pb2.ErrorsFrame(
            handles=handles[rows].tobytes(),
            seqs=seqs[rows].tobytes(),
            error_indexes=places.astype(np.uint32).tobytes(),
            errors=errors,
        )
    )
