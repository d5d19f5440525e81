"""What each batch does to columns: the extension does what NumPy does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_service import places
from engram_service.sessions.streams import LOCAL
from engram_service.wire.base import CALL, NUMBER_BITS

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=300)
@given(seed=SEEDS, count=st.integers(0, 9))
def test_rows_are_seized_all_or_none(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 40, count).astype(np.int32)
    deadlines = np.where(generator.random(count) < 0.97, 5.0, 3.9)
    results = []
    for is_native in (True, False):
        busy = np.random.default_rng(seed).random(40) < 0.02
        before = busy.copy()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "NATIVE", is_native)
            done = places.seize(busy, rows, deadlines, 4.0)
        assert done or np.array_equal(busy, before)
        results.append((done, busy.tolist()))
    assert results[0] == results[1]


@settings(deadline=None, max_examples=100)
@given(seed=SEEDS, count=st.integers(0, 9), nbytes=st.sampled_from([0, 1, 12]))
def test_outputs_are_kept_where_their_seqs_belong(seed: int, count: int, nbytes: int) -> None:
    generator = np.random.default_rng(seed)
    slots = generator.permutation(12)[:count].astype(np.int32)
    seqs = generator.integers(0, 2**63, count).astype(np.uint64)
    outputs = generator.integers(0, 256, (count, 2 * nbytes)).astype(np.uint8)[:, :nbytes]  # rows lie apart
    found = []
    for is_native in (True, False):
        rings = np.zeros((12, 5, nbytes), np.uint8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "NATIVE", is_native)
            places.keep(rings, slots, seqs, outputs)
        found.append(rings)
    assert np.array_equal(*found)


@settings(deadline=None, max_examples=100)
@given(seed=SEEDS, count=st.integers(0, 12))
def test_rows_leave_the_streams_that_are_there(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    ids = np.array([LOCAL, 1, 2 | 3 << NUMBER_BITS, 2**32 - 1], np.uint32)
    calls = generator.choice([LOCAL, 1, 1 | 1 << NUMBER_BITS, 2 | 3 << NUMBER_BITS, 2, 7, CALL | 1, CALL | 99], count)
    in_flight, expected, left = np.full(4, 100, np.int64), np.full(4, 100, np.int64), 0
    for call in calls.tolist():
        number = LOCAL if call & CALL else call & ((1 << NUMBER_BITS) - 1)
        if number < 4 and (call & CALL or ids[number] == call):
            expected[number] -= 1
            left += 1
    assert native.leave(ids, in_flight, calls.astype(np.uint32)) == left
    assert np.array_equal(in_flight, expected)


def test_columns_that_do_not_fit_are_refused() -> None:
    busy, rows = np.zeros(4, np.uint8), np.array([1], np.int32)
    assert not native.seize(busy, np.array([1, 4], np.int32), np.ones(2), 0.0) and not busy.any()
    assert not native.seize(busy, np.array([1, -1], np.int32), np.ones(2), 0.0) and not busy.any()
    with pytest.raises(ValueError, match=r"deadlines has 2 rows of 1"):
        native.seize(busy, rows, np.ones(2), 0.0)
    frozen = busy.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="cannot be written to"):
        native.seize(frozen, rows, np.ones(1), 0.0)
    rings, seqs = np.zeros((4, 2, 3), np.uint8), np.zeros(1, np.uint64)
    for slot in (-1, 4):
        with pytest.raises(ValueError, match="no such slot"):
            native.keep(rings, 2, np.array([slot], np.int32), seqs, np.ones((1, 3), np.uint8))
    for window, width in ((0, 3), (3, 3), (2, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            native.keep(rings, window, rows, seqs, np.ones((1, width), np.uint8))
    assert not rings.any()
