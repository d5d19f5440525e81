"""What a client writes down, and the inputs that it sends: both are shared by clients and checker.

A history is a file of fixed rows, one file for each life of a client, appended after the SDK has answered; what is only asked for is
written down before it is. A row that a kill has torn is dropped, for its step was not yet acknowledged to anybody. Inputs are a pure function of session and seq, so
that nothing of them has to be written down and a client that begins again can carry on from any seq.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "digits-reader"
INPUTS, OUTPUTS = 8, 10

OPENED = 1  # the session was opened (again) and stands at seq
ANSWER = 2  # step seq was acknowledged with this output
PREFILLED = 3  # step seq was acknowledged without an output (prefill)
FINAL = 4  # at the end the session stands at seq, and this is the digest of its state in Redis
ASKED = 5  # steps up to seq are asked for, and their caller may not be there for the answer: their fate is open
SETTLED = 6  # the same client has learned what became of them: the session stands at seq
CLOSING = 7  # its end is asked for, and the caller may not be there for the answer
CLOSED = 8  # its end was acknowledged: it begins again at 0

ROW = np.dtype([
    ("kind", "u1"), ("interval", "u1"), ("pad", "u2"), ("session", "u4"), ("branch", "u4"), ("seq", "u8"), ("durable", "u8"),
    ("output", "f4", (OUTPUTS,)),
])  # fmt: skip

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SESSION, _SEQ, _COLUMN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03), np.uint64(0x8CB92BA72F3D8DD7)


def name_of(number: int) -> str:
    """The id of a session."""
    return f"session-{number}"


def inputs(
    sessions: NDArray[Any] | Sequence[int] | int, seqs: NDArray[Any] | Sequence[int] | int
) -> NDArray[np.float32]:
    """float32 [..., INPUTS] in [0, 1): splitmix64 of session, seq and column."""
    session, seq = np.broadcast_arrays(np.asarray(sessions, np.uint64), np.asarray(seqs, np.uint64))
    with np.errstate(over="ignore"):
        x = session[..., None] * _SESSION + seq[..., None] * _SEQ + np.arange(INPUTS, dtype=np.uint64) * _COLUMN
        for shift, factor in zip((30, 27), _MIX, strict=True):
            x = (x ^ (x >> np.uint64(shift))) * factor
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)).astype(np.float32)


def rows(
    kind: int,
    session: NDArray[Any] | int,
    seqs: NDArray[Any] | int,
    *,
    branch: int = 0,
    interval: bool = False,
    durable: NDArray[Any] | int = 0,
    output: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """History rows, one for each seq."""
    session, seqs = np.broadcast_arrays(session, seqs)
    made = np.zeros(session.size, ROW)
    made["kind"], made["interval"], made["branch"] = kind, interval, branch
    made["session"], made["seq"], made["durable"] = session.ravel(), seqs.ravel(), durable
    if output is not None:
        made["output"] = output.reshape(-1, OUTPUTS)
    return made


def digest(state: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """The bits of a state as they stand in a FINAL row."""
    value = hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in state)).digest()
    return np.frombuffer(value.ljust(4 * OUTPUTS, b"\0"), np.float32)


class Writer:
    """One life of one client."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def add(self, *pieces: NDArray[Any]) -> None:
        os.write(self._file, b"".join(piece.tobytes() for piece in pieces))


def read(path: pathlib.Path) -> NDArray[Any]:
    """The whole rows of a life."""
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // ROW.itemsize * ROW.itemsize], ROW)
