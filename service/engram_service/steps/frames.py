"""Columns of frames, and what their rows are to their sessions. Pure; called by admission.py.

A refused row spoils the later rows of the same session that came with it: they would leave a gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.errors import InvalidArgumentError
from engram_service.wire.base import FEEDBACK, FLAGS_KNOWN

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class StepColumns:
    """The columns of a StepsFrame, read in place, and with `repeats` written out as rows of their own."""

    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    inputs: bytes
    source: NDArray[np.intp] | None  # row of `inputs` for each row; None: one to one
    acked: NDArray[np.uint64] | None  # of the frame's own rows, before repeats were written out

    def __len__(self) -> int:
        return len(self.handles)


def column(data: bytes, dtype: type[Number], name: str, rows: int | None = None) -> NDArray[Number]:
    """A bytes field as an array, without a copy. Raises InvalidArgumentError where the length is not a whole number of rows."""
    width = np.dtype(dtype).itemsize
    if len(data) % width:
        raise InvalidArgumentError("INVALID_FRAME", f"column {name} has {len(data)} bytes, not a multiple of {width}")
    values: NDArray[Number] = np.frombuffer(data, dtype)  # little-endian, as the machines are that this runs on
    if rows is not None and len(values) != rows:
        raise InvalidArgumentError("INVALID_FRAME", f"column {name} has {len(values)} rows, handles has {rows}")
    return values


def read_columns(frame: stream_pb2.StepsFrame, rows_max: int) -> StepColumns:
    """The frame's columns. Raises InvalidArgumentError if they are of unequal length, unusable, or too many rows."""
    handles = column(frame.handles, np.uint32, "handles")
    rows = len(handles)
    if rows > rows_max:
        raise InvalidArgumentError(
            "FRAME_TOO_LARGE", f"the frame has {rows} rows; send at most {rows_max} in one frame"
        )
    seqs = column(frame.seqs, np.uint64, "seqs", rows)
    flags = column(frame.flags, np.uint8, "flags", rows) if frame.flags else np.zeros(rows, np.uint8)
    acked = column(frame.acknowledged_seqs, np.uint64, "acknowledged_seqs", rows) if frame.acknowledged_seqs else None
    if np.any(flags & ~np.uint8(FLAGS_KNOWN)):
        raise InvalidArgumentError(
            "INVALID_FRAME", "column flags has bits that are not known: use 1 (prefill) and 2 (feedback)"
        )
    if not frame.repeats:
        return StepColumns(handles, seqs, flags, frame.inputs, None, acked)
    repeats = column(frame.repeats, np.uint32, "repeats", rows)
    total = rows + int(repeats.sum(dtype=np.uint64))
    if total > rows_max:
        raise InvalidArgumentError(
            "FRAME_TOO_LARGE", f"with its repeats the frame has {total} rows; at most {rows_max} in one frame"
        )
    source = np.repeat(np.arange(rows), repeats.astype(np.intp) + 1)
    # The first copy of a row is the row itself; the others run on the output of the one before.
    offset = np.arange(total) - np.searchsorted(source, source)
    written_flags = flags[source] | np.where(offset > 0, FEEDBACK, 0).astype(np.uint8)
    return StepColumns(
        handles[source], seqs[source] + offset.astype(np.uint64), written_flags, frame.inputs, source, acked
    )


@dataclass(slots=True)
class Classes:
    """What each row is to its session: exactly one of the four, unless it was refused before."""

    fresh: NDArray[np.bool_]  # the next step
    repeated: NDArray[np.bool_]  # a step that was accepted before
    gap: NDArray[np.bool_]  # ahead of the next step, or behind a refused row of this frame


def classify(
    rows: NDArray[np.int32], seqs: NDArray[np.uint64], admitted: NDArray[np.uint64], refused: NDArray[np.bool_]
) -> Classes:
    """Sorts a frame's rows into fresh, repeated and gap.

    `rows` names each row's session, `admitted` (one per row) its last accepted seq, `refused` what is already out.
    """
    expected = admitted + np.uint64(1)
    if len(rows) < 2 or bool((rows[1:] > rows[:-1]).all()):
        return _classify_unique(seqs, expected, refused)
    order = np.argsort(rows, kind="stable")
    by_session = rows[order]
    starts = np.flatnonzero(np.concatenate(([True], by_session[1:] != by_session[:-1])))
    if len(starts) == len(rows):
        return _classify_unique(seqs, expected, refused)

    segment = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))
    seq, want, out = seqs[order], expected[order], refused[order]
    ahead = seq >= want
    rank = _count_before(ahead, starts, segment)
    misplaced = ahead & ((seq != want + rank.astype(np.uint64)) | out)
    spoiled = _count_before(misplaced, starts, segment) > 0
    fresh_sorted = ahead & ~misplaced & ~spoiled

    fresh = np.empty(len(rows), np.bool_)
    repeated = np.empty(len(rows), np.bool_)
    fresh[order] = fresh_sorted
    repeated[order] = ~ahead & ~out
    return Classes(fresh, repeated, ~(fresh | repeated | refused))


def classify_frames(
    rows: NDArray[np.int32], seqs: NDArray[np.uint64], admitted: NDArray[np.uint64], refused: NDArray[np.bool_],
    frames: NDArray[np.intp], classes: Classes,
) -> Classes:  # fmt: skip
    """Corrects `classify` for rows of several frames, which `frames` numbers: each is as if the frames had come one by one.
    So a step may be asked for again by a frame behind its own, and a refused row spoils none but those of its frame."""
    if frames[0] == frames[-1]:
        return classes
    fresh, repeated, gap = classes.fresh.copy(), classes.repeated.copy(), classes.gap.copy()
    odd = np.flatnonzero(np.isin(rows, rows[~fresh]))
    wanted: dict[int, int] = {}  # by session, the seq of its next step
    known: dict[int, tuple[int, int]] = {}  # the frame of its last row, and what was wanted when that began
    spoiled: dict[int, int] = {}  # the frame in which a row of it was refused last
    each = (odd, rows[odd], seqs[odd], admitted[odd], refused[odd], frames[odd])
    for place, row, seq, last, out, frame in zip(*(column.tolist() for column in each), strict=True):
        want = wanted.setdefault(row, last + 1)
        if known.get(row, (-1, 0))[0] != frame:
            known[row] = frame, want
        fresh[place] = repeated[place] = gap[place] = False
        if seq < known[row][1]:
            repeated[place] = not out
        elif out or spoiled.get(row) == frame or seq != want:
            spoiled[row], gap[place] = frame, not out
        else:
            fresh[place], wanted[row] = True, seq + 1
    return Classes(fresh, repeated, gap)


def _classify_unique(seqs: NDArray[np.uint64], expected: NDArray[np.uint64], refused: NDArray[np.bool_]) -> Classes:
    kept = ~refused
    return Classes((seqs == expected) & kept, (seqs < expected) & kept, (seqs > expected) & kept)


def _count_before(mask: NDArray[np.bool_], starts: NDArray[np.intp], segment: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each row, how many rows of its segment before it are set in `mask`."""
    running: NDArray[np.intp] = np.cumsum(mask) - mask
    before: NDArray[np.intp] = running - running[starts][segment]
    return before
