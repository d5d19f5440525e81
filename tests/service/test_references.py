"""References to rows of the session table, and handles: what is out of date names nobody. Against models, by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_service.sessions.handles import CLOSED, ENDED, PLACE_BITS, REMEMBERED, UNKNOWN, Handles
from engram_service.sessions.table import References, SessionTable


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["name", "end", "close"]), st.integers(0, 40)), max_size=300))
def test_handles_against_a_model(actions: list[tuple[str, int]]) -> None:
    handles, named, ended = Handles(), dict[int, int](), set[int]()
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
    handles, seen = Handles(), set[int]()
    for number in range(3000):
        handle = handles.name(number)
        assert handle & ((1 << PLACE_BITS) - 1) <= REMEMBERED, "as many places as it remembers are enough"
        seen.add(handle)
        handles.end(handle, ENDED)
        assert handles.row_of(handle) == ENDED, "it is known why, until the place is used again"
    assert len(seen) == 3000 and handles.row_of(min(seen)) == UNKNOWN
