"""References to rows of the session table, and handles: what is out of date names nobody. Against models, by hypothesis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_service.sessions.handles import (
    CLOSED,
    ENDED,
    PLACE_BITS,
    REMEMBERED,
    TAKEN_OVER,
    UNKNOWN,
    Handles,
    HandleTable,
)
from engram_service.sessions.table import References, SessionTable


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@pytest.mark.promise(10)
def test_a_reference_ends_with_its_session_and_not_with_its_row() -> None:
    table = SessionTable()
    first = table.add("tenant/first")
    kept = table.refer(rows(first))
    assert table.alive(kept).all() and table.row_of(kept.one(0)) == first
    table.remove(rows(first))
    second = table.add("tenant/second")
    assert second == first, "the row is used again"
    assert not table.alive(kept).any() and table.row_of(kept.one(0)) is None and not len(table.rows_of(kept))
    assert table.alive(table.refer(rows(second))).all()


def test_a_session_that_is_in_a_batch_or_being_flushed_is_not_forgotten() -> None:
    table = SessionTable()
    for column in (table.busy, table.flushing):
        row = table.add("tenant/pinned")
        column[row] = True
        with pytest.raises(RuntimeError):
            table.remove(rows(row))
        column[row] = False
        table.remove(rows(row))


@pytest.mark.promise(10)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_references_against_a_model(actions: list[tuple[bool, int]]) -> None:
    table, living, kept = SessionTable(4), dict[str, int](), list[tuple[str, References]]()
    for number, (adds, which) in enumerate(actions):
        if adds or not living:
            key = f"t/{number}"
            living[key] = table.add(key)
            kept.append((key, table.refer(rows(living[key]))))
        else:
            table.remove(rows(living.pop(list(living)[which % len(living)])))
    for key, reference in kept:
        assert table.alive(reference).tolist() == [key in living]
        assert table.rows_of(reference).tolist() == ([living[key]] if key in living else [])


@pytest.mark.promise(10)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["name", "end", "close"]), st.integers(0, 40)), max_size=300))
def test_handles_against_a_model(actions: list[tuple[str, int]]) -> None:
    handles, named, ended = Handles(HandleTable(), 1), dict[int, int](), set[int]()
    for number, (what, which) in enumerate(actions):
        if what == "name" or not named:
            handle = handles.name(number)
            assert handle not in named and handle not in ended, "no handle is given twice"
            named[handle] = number
        else:
            handle = list(named)[which % len(named)]
            handles.end(handle, ENDED if what == "end" else CLOSED)
            del named[handle]
            ended.add(handle)
    assert len(handles) == len(named) and sorted(handles.attached().tolist()) == sorted(named.values())
    for handle, row in named.items():
        assert handles.row_of(handle) == row
    for handle in ended:
        assert handles.row_of(handle) < 0
    every = np.array([*named, *ended, 999_999, 0xFFFFFFFF], np.uint32)
    assert handles.rows_of(every).tolist() == [handles.row_of(handle) for handle in every.tolist()]


def test_a_stream_on_which_sessions_come_and_go_does_not_grow() -> None:
    handles, seen = Handles(HandleTable(), 1), set[int]()
    for number in range(3000):
        handle = handles.name(number)
        assert handle & ((1 << PLACE_BITS) - 1) <= REMEMBERED, "as many places as it remembers are enough"
        seen.add(handle)
        handles.end(handle, ENDED)
        assert handles.row_of(handle) == ENDED, "it is known why, until the place is used again"
    assert len(seen) == 3000 and handles.row_of(min(seen)) == UNKNOWN


class Named:
    """What one stream's handles are to mean: a row of the session table, or why they are void."""

    def __init__(self, table: HandleTable, number: int) -> None:
        self.handles = Handles(table, number)
        self.meaning: dict[int, int] = {}
        self._at: dict[int, int] = {}  # the handle that has a place

    @property
    def living(self) -> list[int]:
        return [handle for handle, row in self.meaning.items() if row >= 0]

    def name(self, row: int) -> None:
        handle = self.handles.name(row)
        assert handle not in self.meaning, "no handle is given twice"
        place = handle & ((1 << PLACE_BITS) - 1)
        if place in self._at:
            assert self.meaning[self._at[place]] < 0, "no place is given to two at once"
            self.meaning[self._at[place]] = UNKNOWN
        self._at[place], self.meaning[handle] = handle, row

    def end(self, handle: int, why: int) -> None:
        self.handles.end(handle, why)
        self.meaning[handle] = why


_NUMBERS = st.integers(0, 200)  # more than there is room for at first


@pytest.mark.promise(10)
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("begin"), st.one_of(st.integers(0, 5), _NUMBERS), st.just(0)),
            st.tuples(st.just("forget"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("name"), st.integers(0, 9), st.sampled_from([1, 3, 5, 40, 700])),
            st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 99)),
            st.tuples(st.just("churn"), st.integers(0, 9), st.just(REMEMBERED + 5)),
        ),
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_handles_of_many_streams_against_a_model(actions: list[tuple[str, int, int]], random: Any) -> None:
    """Streams begin and end, and their numbers are used again; the rows of all are looked up at once."""
    table, streams, row = HandleTable(), dict[int, Named](), 0
    gone: list[tuple[Handles, int]] = []
    for what, which, count in actions:
        if what == "begin":
            if which not in streams:
                streams[which] = Named(table, which)
                assert not len(streams[which].handles) and not len(streams[which].handles.attached())
        elif streams:
            number = list(streams)[which % len(streams)]
            stream = streams[number]
            match what:
                case "forget":
                    gone += [(stream.handles, handle) for handle in stream.living[:3]]
                    streams.pop(number).handles.forget()
                case "end" if stream.living:
                    stream.end(stream.living[count % len(stream.living)], (TAKEN_OVER, CLOSED, ENDED)[count % 3])
                case "name" | "churn":
                    for _ in range(count):
                        stream.name(row)
                        row += 1
                        if what == "churn":
                            stream.end(next(reversed(stream.meaning)), CLOSED)
    asked = [
        (number, handle) for number in streams for other in streams.values() for handle in list(other.meaning)[-50:]
    ]
    asked += [(number, handle) for number in streams for handle in (0, 1 << PLACE_BITS, 999_999, 0xFFFFFFFF)]
    random.shuffle(asked)
    numbers, handles = (np.array([one[n] for one in asked], np.uint32) for n in range(2))
    expected = [streams[number].meaning.get(handle, UNKNOWN) for number, handle in asked]
    assert table.rows_of(numbers, handles).tolist() == expected
    for number, stream in streams.items():
        living = stream.living
        assert len(stream.handles) == len(living)
        assert sorted(stream.handles.attached().tolist()) == sorted(stream.meaning[handle] for handle in living)
        own = [
            (handle, meaning)
            for one, handle, meaning in zip(numbers.tolist(), handles.tolist(), expected, strict=True)
            if one == number
        ]
        assert all(stream.handles.row_of(handle) == meaning for handle, meaning in own)
    for old, handle in gone:
        assert old.row_of(handle) == UNKNOWN and not len(old) and not len(old.attached())
        old.end(handle, CLOSED)  # which says nothing of whoever has the number now


def test_a_number_that_is_used_again_knows_none_of_the_handles_before() -> None:
    table = HandleTable()
    first, other = Handles(table, 1), Handles(table, 2)
    old = [first.name(row) for row in range(6)]
    kept = other.name(77)
    first.end(old[2], ENDED)
    first.forget()
    assert len(first) == 0
    again = Handles(table, 1)
    both = np.array([1] * len(old) + [2], np.uint32), np.array([*old, kept], np.uint32)
    assert table.rows_of(*both).tolist() == [UNKNOWN] * len(old) + [77]
    assert again.name(5) == old[0], "it counts from the beginning"
    assert table.rows_of(*both).tolist() == [5] + [UNKNOWN] * (len(old) - 1) + [77]


def test_segments_of_streams_that_come_and_go_are_used_again() -> None:
    table = HandleTable()
    for number in range(2000):
        handles = Handles(table, number % 3)
        for row in range(100):
            handles.name(row)
        handles.forget()
    assert len(table.rows) == len(table.names) == 1024, "as many places as there were at first are enough"
