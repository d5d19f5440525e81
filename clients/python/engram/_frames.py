"""Parts as StepsFrames, and the other frames that a client sends. Pure; used by _core.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engram._log import Part
from engram._table import SessionTable
from engram.v1 import stream_pb2

_MARGIN_S = 0.25
_TIMEOUT_MS_MAX = 0xFFFFFFFF


def steps_frames(
    table: SessionTable, parts: Sequence[Part], rows_max: int, now: float
) -> Iterator[stream_pb2.StreamRequest]:
    """Frames of parts of one model, in order. What has been answered is acknowledged on the way."""
    part = parts[0] if len(parts) == 1 else _joined(parts)
    weights = part.lasts - part.firsts + 1
    if int(weights.sum()) <= rows_max:
        yield _steps_frame(table, part, now)
        return
    # Cut so that the rows, with their repeats, stay within the limit; a row is never cut.
    total = np.cumsum(weights)
    start = 0
    while start < len(total):
        base = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, base + rows_max, side="right")))
        yield _steps_frame(table, part.only(slice(start, stop)), now)
        start = stop


def _steps_frame(table: SessionTable, part: Part, now: float) -> stream_pb2.StreamRequest:
    # A step's answer cannot have come before the step was sent; a replayed step is older than what was answered.
    acked = np.minimum(table.answered[part.slots], part.firsts - 1)
    frame = stream_pb2.StepsFrame(
        handles=table.handle[part.slots].tobytes(),
        seqs=part.firsts.tobytes(),
        inputs=b"" if part.inputs is None else part.inputs.tobytes(),
        acknowledged_seqs=acked.tobytes(),
    )
    if not isinstance(part.flags, int):
        frame.flags = part.flags.tobytes()
    elif part.flags:
        frame.flags = bytes([part.flags]) * len(part.slots)
    if part.deadline != math.inf:
        # A little less than the caller has, so that the server's reason arrives before the caller's time is up.
        left_s = max(0.0, part.deadline - now)
        frame.timeout_ms = min(_TIMEOUT_MS_MAX, max(1, int(1000 * (left_s - min(_MARGIN_S, left_s / 10)))))
    repeats = part.lasts - part.firsts
    if repeats.any():
        frame.repeats = repeats.astype(np.uint32).tobytes()
    table.acked[part.slots] = np.maximum(table.acked[part.slots], acked)
    return stream_pb2.StreamRequest(steps=frame)


def _joined(parts: Sequence[Part]) -> Part:
    width = next((part.inputs.shape[1] for part in parts if part.inputs is not None), 0)
    inputs: NDArray[np.uint8] | None = None
    if width:
        rows = [np.zeros((len(part.slots), width), np.uint8) if part.inputs is None else part.inputs for part in parts]
        inputs = np.concatenate(rows)
    plain = all(isinstance(part.flags, int) and part.flags == 0 for part in parts)
    return Part(
        parts[0].model,
        np.concatenate([part.slots for part in parts]),
        np.concatenate([part.firsts for part in parts]),
        np.concatenate([part.lasts for part in parts]),
        inputs,
        0 if plain else np.concatenate([part.flag_column() for part in parts]),
        max(part.deadline for part in parts),
    )


def acknowledge_frame(table: SessionTable, slots: NDArray[np.int64]) -> stream_pb2.StreamRequest:
    """Says that all that was answered has arrived."""
    table.acked[slots] = table.answered[slots]
    frame = stream_pb2.AcknowledgeFrame(
        handles=table.handle[slots].tobytes(), acknowledged_seqs=table.answered[slots].tobytes()
    )
    return stream_pb2.StreamRequest(acknowledge=frame)


def close_frame(handles: NDArray[np.uint32], detach: bool) -> stream_pb2.StreamRequest:
    """Ends sessions, or lets go of them. The request id is set when it is sent."""
    return stream_pb2.StreamRequest(close=stream_pb2.CloseFrame(handles=handles.tobytes(), detach=detach))
