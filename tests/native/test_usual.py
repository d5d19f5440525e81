"""Rows that are let in with one call: all of them or none, as a look at each one has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_service.auth.tenants import UNKNOWN
from engram_service.auth.tokens import Limits
from engram_service.sessions import counts
from engram_service.sessions.handles import HandleTable
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Streams
from engram_service.wire.base import FIRST, NOT_ACKNOWLEDGED, NUMBER_BITS

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

WINDOW, WIDTH, MODEL = 4, 12, 1
COLUMNS = ("model", "slot", "opening", "admitted", "applied", "acked")


class World:
    """Two streams with some sessions each, as the server's own columns have them, and a session table."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.streams = Streams(None, _shares(), 10)  # type: ignore[arg-type]
        self.ids = [7, 9 | 3 << NUMBER_BITS]
        self.handles: list[list[int]] = []
        rows = generator.permutation(40).tolist()
        for stream in self.ids:
            made = self.streams.add(stream, caller=_Caller())  # type: ignore[arg-type]
            self.handles.append([made.handles.name(rows.pop()) for _ in range(6)])
            made.handles.end(self.handles[-1][5], -3)
        seqs = generator.integers(1, 9, 40).astype(np.uint64)
        self.table: dict[str, NDArray[Any]] = {
            "model": np.where(generator.random(40) < 0.95, MODEL, 0).astype(np.int16),
            "slot": np.where(generator.random(40) < 0.95, generator.integers(0, 99, 40), -1).astype(np.int32),
            "opening": (generator.random(40) < 0.05).astype(np.uint8),
            "admitted": seqs,
            "applied": seqs - generator.integers(0, 2, 40).astype(np.uint64),
            "acked": seqs - np.minimum(seqs, generator.integers(0, 6, 40).astype(np.uint64)),
        }
        self.native = native.Usual(*self.streams.columns, *self.table.values())

    def rows(self, generator: np.random.Generator, count: int) -> list[NDArray[Any]]:
        """Rows of steps, most of them good."""
        which = generator.integers(0, 2, count)
        calls = np.array([self.ids[k] for k in which], np.uint32)
        handles = np.array([self.handles[k][generator.integers(0, 5)] for k in which], np.uint32)
        seqs, taken = np.zeros(count, np.uint64), dict[int, int]()
        for n, (call, handle) in enumerate(zip(calls.tolist(), handles.tolist(), strict=True)):
            row = self.row(call, handle)
            taken[row] = taken.get(row, int(self.table["admitted"][row])) + 1
            seqs[n] = taken[row]
        acknowledged = np.where(generator.random(count) < 0.5, seqs - np.uint64(1), NOT_ACKNOWLEDGED).astype(np.uint64)
        came: list[NDArray[Any]] = [calls, handles, seqs, acknowledged, np.zeros(count, np.uint8),
                                    np.full(count, WIDTH, np.uint32)]  # fmt: skip
        came[4][0] |= FIRST
        if generator.random() < 0.5:
            column, place = generator.integers(0, 6), generator.integers(0, count)
            came[column][place] = generator.choice(
                [0, 1, 2, WIDTH + 1, 6, 8, 9, 9 | 2 << NUMBER_BITS, 2**32 - 1]
            ).astype(came[column].dtype)
        return came

    def row(self, call: int, handle: int) -> int:
        """Of the session table; negative: there is none."""
        stream = self.streams.get(call)
        return -1 if stream is None else stream.handles.row_of(handle)

    def expected(self, came: list[NDArray[Any]]) -> tuple[bool, list[int], dict[str, NDArray[Any]]]:
        """One after the other. What is acknowledged stays, whatever becomes of the others."""
        table = {name: column.copy() for name, column in self.table.items()}
        before, found = table["admitted"].copy(), list[int]()
        for call, handle, seq, acknowledged, flags, width in zip(*(column.tolist() for column in came), strict=True):
            row = self.row(call, handle)
            good = row >= 0 and table["model"][row] == MODEL and table["slot"][row] >= 0 and not table["opening"][row]
            if not good or flags & ~FIRST or width != WIDTH:
                return False, [], {**table, "admitted": before}
            if acknowledged != int(NOT_ACKNOWLEDGED):
                table["acked"][row] = max(int(table["acked"][row]), min(acknowledged, int(table["applied"][row])))
            if seq != int(table["admitted"][row]) + 1 or seq > int(table["acked"][row]) + WINDOW:
                return False, [], {**table, "admitted": before}
            table["admitted"][row] = seq
            found.append(row)
        return True, found, table


class _Caller:
    tenant = ""


def _shares() -> Shares:
    return Shares(lambda tenant: Limits(), lambda tenant: UNKNOWN, counts.alone(), 10, 10)


@settings(deadline=None, max_examples=400)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12))
def test_rows_are_let_in_as_one_after_the_other_would_be(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    world = World(generator)
    for _ in range(3):
        came = world.rows(generator, count)
        good, rows, table = world.expected(came)
        in_flight = [world.streams.in_flight_of(stream) for stream in world.ids]
        found = np.full(count, -7, np.int32)
        assert world.native.admit(*came, _inputs(count), found, MODEL, WINDOW, WIDTH, 4) is good
        for name in COLUMNS:
            assert np.array_equal(world.table[name], table[name]), name
        more = [int(good) * int((came[0] == stream).sum()) for stream in world.ids]
        now = [world.streams.in_flight_of(stream) for stream in world.ids]
        assert now == [before + own for before, own in zip(in_flight, more, strict=True)]
        assert not good or found.tolist() == rows


def test_columns_that_do_not_fit_are_refused() -> None:
    world = World(np.random.default_rng(1))
    columns = [*world.streams.columns, *world.table.values()]
    for place, column in enumerate(columns):
        others = [*columns[:place], column.astype(np.float32), *columns[place + 1 :]]
        with pytest.raises(ValueError, match="is no column"):
            native.Usual(*others)
    for place in (1, 3, 5, 7, 8, 9, 10, 11):
        short = [*columns[:place], columns[place][:-1], *columns[place + 1 :]]
        with pytest.raises(ValueError, match=r"has \d+ rows of"):
            native.Usual(*short)
    frozen = columns[9].copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="cannot be written to"):
        native.Usual(*columns[:9], frozen, *columns[10:])
    came = world.rows(np.random.default_rng(2), 3)
    with pytest.raises(ValueError, match=r"has \d+ rows of"):
        world.native.admit(*came, _inputs(3), np.empty(2, np.int32), MODEL, WINDOW, WIDTH, 0)
    with pytest.raises(ValueError, match="no floats of 3 bytes"):
        world.native.admit(*came, _inputs(3), np.empty(3, np.int32), MODEL, WINDOW, WIDTH, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_let_in_by_none(dtype: type[np.floating[Any]], value: float) -> None:
    generator = np.random.default_rng(3)
    limits = np.finfo(dtype)
    for place in range(5):
        world = World(generator)
        world.table["model"][:], world.table["slot"][:], world.table["opening"][:] = MODEL, 1, 0
        world.table["acked"][:] = world.table["applied"][:] = world.table["admitted"]
        handle = world.handles[0][0]
        row = world.row(world.ids[0], handle)
        seq = world.table["admitted"][row] + np.uint64(1)
        inputs = np.array([[limits.max, limits.min, 0.0, limits.smallest_subnormal, 1.0]], dtype)
        bad = inputs.copy()
        bad[0, place] = value
        for values, nbytes, good in ((bad, inputs.itemsize, False), (inputs, inputs.itemsize, True)):
            came = [np.array([one], kind) for one, kind in ((world.ids[0], np.uint32), (handle, np.uint32), (seq, np.uint64),
                    (NOT_ACKNOWLEDGED, np.uint64), (FIRST, np.uint8), (inputs.nbytes, np.uint32))]  # fmt: skip
            found = np.empty(1, np.int32)
            told = world.native.admit(*came, values.view(np.uint8), found, MODEL, WINDOW, inputs.nbytes, nbytes)
            assert told is good
            assert world.table["admitted"][row] == seq - np.uint64(not good)
        seq += np.uint64(1)
        came[2][0] = seq
        assert world.native.admit(*came, bad.view(np.uint8), found, MODEL, WINDOW, inputs.nbytes, 0)  # not looked at


def _inputs(count: int) -> NDArray[np.uint8]:
    return np.zeros((count, WIDTH), np.uint8)


def test_the_table_of_handles_has_its_columns_where_the_extension_looks_for_them() -> None:
    places = HandleTable()
    assert (places.starts.dtype, places.counts.dtype) == (np.int64, np.uint32)
    assert (places.rows.dtype, places.names.dtype) == (np.int32, np.uint32)
