"""Admission: which rows of a frame are fresh, repeated or out of order, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.v1 import stream_pb2
from engram_service.errors import InvalidArgumentError
from engram_service.steps.frames import Classes, classify, classify_frames, read_columns
from engram_service.wire.base import FEEDBACK


def frame(**columns: bytes) -> stream_pb2.StepsFrame:
    return stream_pb2.StepsFrame(**columns)  # type: ignore[arg-type]


def u32(*values: int) -> bytes:
    return np.array(values, np.uint32).tobytes()


def u64(*values: int) -> bytes:
    return np.array(values, np.uint64).tobytes()


def loop(rows: list[int], seqs: list[int], admitted: dict[int, int], refused: list[bool]) -> list[str]:
    """What classify does, row by row."""
    expected = {row: seq + 1 for row, seq in admitted.items()}
    spoiled: set[int] = set()
    kinds = []
    for row, seq, out in zip(rows, seqs, refused, strict=True):
        if seq < admitted[row] + 1:
            kinds.append("refused" if out else "repeated")
        elif out:
            spoiled.add(row)
            kinds.append("refused")
        elif row in spoiled or seq != expected[row]:
            spoiled.add(row)
            kinds.append("gap")
        else:
            expected[row] += 1
            kinds.append("fresh")
    return kinds


def kinds_of(classes: Classes) -> list[str]:
    kinds = []
    for i in range(len(classes.fresh)):
        names = [name for name in ("fresh", "repeated", "gap") if getattr(classes, name)[i]]
        assert len(names) <= 1
        kinds.append(names[0] if names else "refused")
    return kinds


@pytest.mark.promise(1)
@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 8), st.booleans()), min_size=1, max_size=20),
    st.lists(st.integers(0, 4), min_size=5, max_size=5),
)
def test_classify_agrees_with_a_loop(given_rows: list[tuple[int, int, bool]], admitted: list[int]) -> None:
    rows, seqs, refused = (list(column) for column in zip(*given_rows, strict=True))
    classes = classify(
        np.array(rows, np.int32),
        np.array(seqs, np.uint64),
        np.array([admitted[row] for row in rows], np.uint64),
        np.array(refused),
    )
    assert kinds_of(classes) == loop(rows, seqs, dict(enumerate(admitted)), refused)


@pytest.mark.promise(1)
@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans(), st.booleans()), min_size=1, max_size=24),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_frames_that_come_together_are_as_if_they_had_come_one_by_one(
    given_rows: list[tuple[int, int, bool, bool]], before: list[int]
) -> None:
    rows, seqs, refused, first = (list(column) for column in zip(*given_rows, strict=True))
    frames, admitted, expected = np.cumsum(first), dict(enumerate(before)), list[str]()
    for frame in np.unique(frames).tolist():
        own = np.flatnonzero(frames == frame).tolist()
        kinds = loop([rows[n] for n in own], [seqs[n] for n in own], admitted, [refused[n] for n in own])
        expected += kinds
        for n, kind in zip(own, kinds, strict=True):
            admitted[rows[n]] += kind == "fresh"
    columns = (
        np.array(rows, np.int32), np.array(seqs, np.uint64), np.array([before[row] for row in rows], np.uint64),
        np.array(refused),
    )  # fmt: skip
    classes = classify_frames(*columns, frames, classify(*columns))
    assert kinds_of(classes) == expected


def test_repeats_become_rows_that_feed_on_themselves() -> None:
    columns = read_columns(frame(handles=u32(7, 8), seqs=u64(3, 1), inputs=b"ab", repeats=u32(2, 0)), 10)
    assert columns.handles.tolist() == [7, 7, 7, 8]
    assert columns.seqs.tolist() == [3, 4, 5, 1]
    assert columns.flags.tolist() == [0, FEEDBACK, FEEDBACK, 0]


@pytest.mark.parametrize(
    ("columns", "reason", "words"),
    [
        ({"handles": b"abc", "seqs": b""}, "INVALID_FRAME", "multiple of 4"),
        ({"handles": u32(1), "seqs": u64(1, 2)}, "INVALID_FRAME", "seqs has 2 rows"),
        ({"handles": u32(1), "seqs": u64(1), "flags": b"\x01\x01"}, "INVALID_FRAME", "flags has 2 rows"),
        ({"handles": u32(1), "seqs": u64(1), "flags": b"\x80"}, "INVALID_FRAME", "bits that are not known"),
        (
            {"handles": u32(1), "seqs": u64(1), "acknowledged_seqs": b"12345678" * 2},
            "INVALID_FRAME",
            "acknowledged_seqs",
        ),
        ({"handles": u32(*range(11)), "seqs": u64(*range(11))}, "FRAME_TOO_LARGE", "at most 10"),
        ({"handles": u32(1), "seqs": u64(1), "repeats": u32(10)}, "FRAME_TOO_LARGE", "with its repeats"),
        (
            {"handles": u32(1, 2), "seqs": u64(1, 1), "repeats": u32(2**32 - 1, 2**32 - 1)},
            "FRAME_TOO_LARGE",
            "with its repeats",
        ),
    ],
)
def test_unusable_frames_are_refused_with_what_is_wrong(columns: dict[str, bytes], reason: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_columns(frame(**columns), 10)
    assert caught.value.reason == reason
    assert words in caught.value.message
