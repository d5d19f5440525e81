"""The scheduler: order, one run a session and batch, fairness, nothing lost. Pure, so it is tested without a server."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_service.scheduling.columns import Steps, Waiting, joined, occurrence
from engram_service.scheduling.scheduler import Batch, Scheduler, batch_of
from engram_service.steps.backlog import Backlog

FOREVER = float("inf")


class Row(NamedTuple):
    """One row that waits, as the models of these tests have it."""

    row: int
    stream: int
    seq: int
    deadline: float = FOREVER


def steps_of(rows: list[Row]) -> Steps:
    """Rows as columns, of which no two are alike: a row whose columns are mixed up with another's is found out."""
    row, stream, seq, deadline = (
        np.array(column, dtype) for column, dtype in zip(
            zip(*rows, strict=True) if rows else ((), (), (), ()), (np.int32, np.uint32, np.uint64, float), strict=True
        )
    )  # fmt: skip
    times = (seq * 1.5)[:, None] + np.arange(4)
    mark = np.stack([row, seq], axis=1).astype("<u4").view(np.uint8).reshape(-1, 8)
    return Steps(row, stream, (row + 100).astype(np.uint32), seq, (seq % 4).astype(np.uint8), deadline, times, mark)


def rows_of(steps: Steps | None) -> list[Row]:
    """The same backwards."""
    if steps is None:
        return []
    columns = (steps.rows.tolist(), steps.streams.tolist(), steps.seqs.tolist(), steps.deadlines.tolist())
    rows = [Row(*columns) for columns in zip(*columns, strict=True)]
    whole, again = steps_of(rows), steps
    for name in (
        Steps.__slots__ if steps.inputs.shape[1] else set(Steps.__slots__) - {"inputs"}
    ):  # of dropped ones none are left
        assert np.array_equal(getattr(whole, name), getattr(again, name)), f"{name} of other rows"
    return rows


def frame(stream: int, rows: list[int], seqs: list[int] | None = None, deadline: float = FOREVER) -> Steps:
    seqs = seqs or [1] * len(rows)
    return steps_of([Row(row, stream, seq, deadline) for row, seq in zip(rows, seqs, strict=True)])


def nobody(count: int = 16) -> NDArray[np.bool_]:
    return np.zeros(count, np.bool_)


def taken(batch: Batch | None) -> list[int]:
    assert batch is not None
    rows: list[int] = batch.steps.rows.tolist()
    return rows


def test_all_that_is_ready_goes_at_once() -> None:
    scheduler, busy = Scheduler(16), nobody()
    scheduler.add(0, frame(1, [0, 1, 2]))
    scheduler.add(0, frame(2, [3, 4]))
    batch = scheduler.next(0, busy, 100, 0.0)
    assert taken(batch) == [0, 1, 2, 3, 4]
    assert busy[:5].all() and not busy[5:].any()
    assert batch is not None and batch.waves == [None] and batch.last is None
    assert scheduler.next(0, busy, 100, 0.0) is None
    assert scheduler.waiting_rows == 0


def test_a_busy_session_waits_and_the_others_go() -> None:
    scheduler, busy = Scheduler(16), nobody()
    busy[1] = True
    scheduler.add(0, frame(1, [0, 1, 2]))
    assert taken(scheduler.next(0, busy, 100, 0.0)) == [0, 2]
    assert scheduler.next(0, busy, 100, 0.0) is None
    assert scheduler.waiting_rows == 1
    busy[:] = False
    assert taken(scheduler.next(0, busy, 100, 0.0)) == [1]


def test_a_run_of_one_session_goes_in_waves() -> None:
    scheduler, busy = Scheduler(3), nobody()
    scheduler.add(0, frame(1, [0, 0, 1, 0, 0], [1, 2, 1, 3, 4]))
    batch = scheduler.next(0, busy, 100, 0.0)
    assert batch is not None
    assert [(row.row, row.seq) for row in rows_of(batch.steps)] == [(0, 1), (0, 2), (1, 1), (0, 3)]
    assert [wave.tolist() for wave in batch.waves if wave is not None] == [[0, 2], [1], [3]]
    assert batch.last is not None and batch.last.tolist() == [2, 3]
    busy[:] = False
    assert [row.seq for row in rows_of(scheduler.drop_model(0))] == [4], "one session has so many at most"


def test_models_take_turns_and_those_without_rows_have_none() -> None:
    scheduler, busy = Scheduler(16), nobody()
    for model in range(3):
        scheduler.add(model, frame(1, [model]))
    assert {tuple(scheduler.models()) for _ in range(3)} == {(0, 1, 2), (1, 2, 0), (2, 0, 1)}
    assert taken(scheduler.next(1, busy, 100, 0.0)) == [1], "the rows of a model are its own"
    assert sorted(scheduler.models()) == [0, 2] and scheduler.waiting_rows == 2


# Fairness


@settings(max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 200))
def test_nobody_has_a_second_row_before_everybody_has_a_first(counts: list[int], rows_max: int) -> None:
    scheduler, busy = Scheduler(1), nobody(1000)
    for stream, count in enumerate(counts):
        scheduler.add(0, frame(stream + 1, list(range(60 * stream, 60 * stream + count))))
    rows = taken(scheduler.next(0, busy, rows_max, 0.0))
    shares = np.bincount(np.array(rows) // 60, minlength=len(counts)).tolist()
    assert sum(shares) == min(rows_max, sum(counts)), "nothing stays while there is room"
    for share, count in zip(shares, counts, strict=True):
        assert share == count or max(shares) <= share + 1
    for stream, share in enumerate(shares):
        assert [row for row in rows if row // 60 == stream] == list(range(60 * stream, 60 * stream + share))


def test_of_steps_without_a_stream_each_session_has_its_share_in_its_order() -> None:
    """Those of unary calls, of which each names a stream of its own, and those of the server's own stream."""
    scheduler, busy, call = Scheduler(8), nobody(), 1 << 31
    scheduler.add(0, frame(0, [3, 3, 3], [1, 2, 3]))
    scheduler.add(0, frame(call | 7, [3], [4]))
    scheduler.add(0, frame(call | 8, [4], [1]))
    scheduler.add(0, frame(9, [5, 6]))
    assert taken(scheduler.next(0, busy, 4, 0.0)) == [3, 3, 4, 5]
    busy[:] = False
    left = scheduler.next(0, busy, 100, 0.0)
    assert left is not None
    assert [(row.row, row.seq) for row in rows_of(left.steps)] == [(3, 3), (3, 4), (6, 1)]


def test_small_streams_do_not_wait_for_a_large_one() -> None:
    scheduler, busy = Scheduler(1), nobody(2000)
    scheduler.add(0, frame(1, list(range(1000))))
    scheduler.add(0, frame(2, [1500, 1501]))
    assert taken(scheduler.next(0, busy, 64, 0.0)) == [*range(62), 1500, 1501]


def test_large_streams_share_a_full_batch() -> None:
    scheduler, busy = Scheduler(1), nobody(3000)
    for stream in (0, 1):
        scheduler.add(0, frame(stream + 1, list(range(1000 * stream, 1000 * stream + 1000))))
    assert (np.bincount(np.array(taken(scheduler.next(0, busy, 64, 0.0))) // 1000) == 32).all()


def test_batches_are_short_while_some_have_many_rows_and_some_few_and_for_a_second_afterwards() -> None:
    scheduler, busy = Scheduler(1), nobody(9000)
    for stream in range(1, 4):
        scheduler.add(0, frame(stream, list(range(2000 * stream, 2000 * stream + 2000))))
    scheduler.add(0, frame(4, [4]))
    first = taken(scheduler.next(0, busy, 1024, 0.5))
    assert len(first) == 64 and 4 in first
    assert np.bincount(np.array(first) // 2000).tolist() == [1, 21, 21, 21]
    assert len(taken(scheduler.next(0, busy, 1024, 0.6))) == 64, "who had few rows may come again at any time"
    assert len(taken(scheduler.next(0, busy, 1024, 1.49))) == 64
    assert len(taken(scheduler.next(0, busy, 1024, 1.51))) == 1024, "none has come for more than a second"
    scheduler.add(0, frame(5, [5]))
    assert len(taken(scheduler.next(0, busy, 1024, 2.0))) == 64


def test_whoever_is_alone_has_whole_batches() -> None:
    scheduler, busy = Scheduler(16), nobody(9000)
    for begin in range(0, 8000, 1000):
        scheduler.add(0, frame(1, list(range(begin, begin + 1000))))
    assert [len(taken(scheduler.next(0, busy, 2048, 0.0))) for _ in range(3)] == [2048] * 3


def test_middling_frames_of_one_client_are_no_small_stream_beside_itself() -> None:
    scheduler, busy = Scheduler(16), nobody(9000)
    scheduler.add(0, frame(1, list(range(100))))
    assert len(taken(scheduler.next(0, busy, 1024, 0.0))) == 100
    for begin in range(100, 700, 100):  # they came while that was computed
        scheduler.add(0, frame(1, list(range(begin, begin + 100))))
    assert len(taken(scheduler.next(0, busy, 1024, 0.01))) == 600


def test_what_another_model_is_asked_for_makes_no_batch_shorter() -> None:
    scheduler, busy = Scheduler(1), nobody(3000)
    scheduler.add(0, frame(1, list(range(2000))))
    scheduler.add(1, frame(2, [2500]))
    assert taken(scheduler.next(1, busy, 1024, 0.0)) == [2500]
    assert len(taken(scheduler.next(0, busy, 1024, 0.0))) == 1024


@pytest.mark.parametrize(("rows", "seconds", "expected"), [(128, 0.001, 305), (64, 0.0001, 2048), (128, 0.01, 64)])
def test_a_short_batch_takes_two_milliseconds(rows: int, seconds: float, expected: int) -> None:
    scheduler, busy = Scheduler(1), nobody(12000)
    scheduler.add(0, frame(1, list(range(8000))))
    scheduler.add(0, frame(2, [8001]))
    for _ in range(100):
        scheduler.took(0, rows, seconds)
        scheduler.took(0, 3, 1.0)  # of which nothing is learnt
        scheduler.took(1, rows, 1.0)  # which is another model's
    found = len(taken(scheduler.next(0, busy, 2048, 0.0)))
    assert found == pytest.approx(expected, abs=1)


def test_runs_are_short_beside_small_streams_and_long_among_large_ones() -> None:
    scheduler, busy = Scheduler(16), nobody(300)
    for stream in (0, 1):
        rows = [stream * 100 + n // 16 for n in range(1600)]
        scheduler.add(0, frame(stream + 1, rows, [n % 16 + 1 for n in range(1600)]))
    among_large = scheduler.next(0, busy, 1024, 0.0)
    assert among_large is not None and len(among_large.waves) == 16
    busy[:] = False
    scheduler.add(0, frame(3, [299]))
    beside_small = scheduler.next(0, busy, 200, 0.0)
    assert beside_small is not None and len(beside_small.waves) == 2 and 299 in taken(beside_small)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 700)), min_size=1, max_size=20), st.integers(130, 400))
def test_every_stream_goes_with_every_batch(frames: list[tuple[int, int]], rows_max: int) -> None:
    """One stream always has a row waiting; the others send frames of up to 700."""
    scheduler, busy = Scheduler(1), nobody(4000)
    waiting = [0] * 4
    for stream, count in [*frames, *((1, 0) for _ in range(50))]:
        if not waiting[stream] and count:
            scheduler.add(0, frame(stream, list(range(1000 * stream, 1000 * stream + count))))
            waiting[stream] = count
        if not waiting[0]:
            scheduler.add(0, frame(4, [0]))
            waiting[0] = 1
        wanted = {stream for stream in range(4) if waiting[stream]}
        rows = np.array(taken(scheduler.next(0, busy, rows_max, 0.0)))
        assert set((rows // 1000).tolist()) == wanted
        waiting = [before - int((rows // 1000 == stream).sum()) for stream, before in enumerate(waiting)]
        busy[rows] = False
    assert not any(waiting[1:])


# What is taken out


def test_rows_whose_time_is_up_are_not_taken_nor_any_behind_them() -> None:
    scheduler, busy = Scheduler(16), nobody()
    scheduler.add(0, frame(1, [0, 1], deadline=5.0))
    scheduler.add(0, frame(1, [0, 2], [2, 1], deadline=50.0))
    assert taken(scheduler.next(0, busy, 100, 10.0)) == [2]
    assert scheduler.waiting_rows == 3 and scheduler.next(0, busy, 100, 10.0) is None
    dropped = rows_of(scheduler.drop_late(10.0))
    assert [(row.row, row.seq) for row in dropped] == [(0, 1), (1, 1), (0, 2)]
    assert scheduler.drop_late(10.0) is None and scheduler.waiting_rows == 0


def test_rows_of_several_models_are_dropped_at_once() -> None:
    """Their inputs are of several widths."""
    scheduler = Scheduler(16)
    narrow, wide = frame(1, [0], deadline=5.0), frame(1, [1], deadline=5.0)
    scheduler.add(0, narrow)
    scheduler.add(1, replace(wide, inputs=np.zeros((1, 32), np.uint8)))
    assert [row.row for row in rows_of(scheduler.drop_late(10.0))] == [0, 1]
    assert scheduler.waiting_rows == 0


def test_rows_before_a_late_one_of_their_session_stay() -> None:
    scheduler, busy = Scheduler(16), nobody()
    scheduler.add(0, frame(1, [0], [1], deadline=50.0))
    scheduler.add(0, frame(1, [0, 0], [2, 3], deadline=5.0))
    assert [row.seq for row in rows_of(scheduler.drop_late(10.0))] == [2, 3]
    assert taken(scheduler.next(0, busy, 100, 10.0)) == [0]


@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_frame_alone_whose_time_is_up_does_not_go(rows: list[int]) -> None:
    scheduler, busy = Scheduler(16), nobody()
    scheduler.add(0, frame(1, rows, deadline=5.0))
    assert scheduler.next(0, busy, 100, 5.1) is None and not busy.any()
    assert len(rows_of(scheduler.drop_late(5.1))) == len(rows)


def test_drops_take_out_what_they_name_and_nothing_else() -> None:
    scheduler, busy = Scheduler(16), nobody()
    scheduler.add(0, frame(1, [0, 1, 2]))
    scheduler.add(0, frame(2, [3]))
    scheduler.add(1, frame(1, [4, 5]))
    assert [row.row for row in rows_of(scheduler.drop_sessions(np.array([1, 4, 9], np.int32)))] == [1, 4]
    assert scheduler.waiting_rows == 4
    assert [row.row for row in rows_of(scheduler.drop_stream(1))] == [0, 2, 5]
    assert scheduler.drop_stream(1) is None and scheduler.drop_model(1) is None and scheduler.drop_model(7) is None
    assert taken(scheduler.next(0, busy, 100, 0.0)) == [3]


def test_prolonged_rows_have_more_time_and_never_less() -> None:
    scheduler, busy = Scheduler(16), nobody()
    scheduler.add(0, frame(1, [0, 0, 0, 1], [1, 2, 3, 1], deadline=5.0))
    scheduler.prolong(np.array([0], np.int32), np.uint64(2), 20.0)
    scheduler.prolong(np.array([0], np.int32), np.uint64(2), 10.0)
    assert [(row.row, row.seq) for row in rows_of(scheduler.drop_late(19.0))] == [(0, 3), (1, 1)]
    assert taken(scheduler.next(0, busy, 100, 19.0)) == [0, 0]


# Against a model


class Model:
    """What the scheduler does, row by row."""

    def __init__(self, run_max: int) -> None:
        self._run_max = run_max
        self.waiting: list[list[Row]] = [[], []]  # by model

    def next(self, model: int, busy: set[int], rows_max: int, now: float) -> list[Row]:
        late = {row.row for row in self.waiting[model] if row.deadline < now}
        runs: dict[int, int] = {}
        ready = []
        for row in self.waiting[model]:
            if row.row not in busy | late:
                runs[row.row] = runs.get(row.row, 0) + 1
                if runs[row.row] <= self._run_max:
                    ready.append(row)
        ranks: dict[int, int] = {}
        ranked = []
        for place, row in enumerate(ready):
            sharer = row.stream or -1 - row.row  # of steps without a stream, each session
            ranks[sharer] = ranks.get(sharer, 0) + 1
            ranked.append((ranks[sharer], place))
        chosen = [ready[place] for place in sorted(place for _, place in sorted(ranked)[:rows_max])]
        return self._out(model, chosen)

    def drop(self, wanted: set[Row]) -> list[Row]:
        return [row for model in range(2) for row in self._out(model, [r for r in self.waiting[model] if r in wanted])]

    def late(self, now: float) -> set[Row]:
        found = set[Row]()
        for waiting in self.waiting:
            up = set[int]()
            for row in waiting:
                if row.deadline < now:
                    up.add(row.row)
                if row.row in up:
                    found.add(row)
        return found

    def prolong(self, which: int, seq: int, deadline: float) -> None:
        for waiting in self.waiting:
            waiting[:] = [
                row._replace(deadline=max(row.deadline, deadline)) if row.row == which and row.seq <= seq else row
                for row in waiting
            ]

    def every(self) -> list[Row]:
        return [row for waiting in self.waiting for row in waiting]

    def _out(self, model: int, rows: list[Row]) -> list[Row]:
        self.waiting[model] = [row for row in self.waiting[model] if row not in rows]
        return rows


_SESSION = st.integers(0, 23)  # of three streams and two models
_ACTIONS = st.one_of(
    st.tuples(
        st.just("add"), st.integers(0, 5), st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 9)
    ),
    st.tuples(st.just("next"), st.integers(0, 1), st.integers(1, 20)),
    st.tuples(st.just("next"), st.integers(0, 1), st.integers(1, 20)),
    st.tuples(st.just("finish"), st.integers(0, 9)),
    st.tuples(st.just("sessions"), st.lists(_SESSION, max_size=4)),
    st.tuples(st.just("stream"), st.integers(0, 2)),
    st.tuples(st.just("model"), st.integers(0, 1)),
    st.tuples(st.just("late")),
    st.tuples(st.just("prolong"), _SESSION, st.integers(0, 6), st.integers(1, 20)),
    st.tuples(st.just("time"), st.integers(1, 5)),
)


@pytest.mark.promise(1)
@settings(max_examples=400)
@given(st.lists(_ACTIONS, max_size=60), st.integers(1, 4))
def test_nothing_is_lost_doubled_or_out_of_order(actions: list[tuple[object, ...]], run_max: int) -> None:
    """Session 4 i + k is stream i // 2's (0: it has none) and model i % 2's. What is dropped is sent again with the same seqs."""
    scheduler, model, now = Scheduler(run_max), Model(run_max), 0.0
    busy, sent, done = nobody(24), [0] * 24, [0] * 24
    under_way: list[Batch] = []

    def dropped(steps: Steps | None, wanted: set[Row]) -> None:
        gone = model.drop(wanted)
        assert sorted(rows_of(steps), key=lambda row: row.row // 4 % 2) == gone, "by model, each in its order"
        for row in gone:
            sent[row.row] = min(sent[row.row], row.seq - 1)

    def go(which: int, rows_max: int) -> None:
        if which not in scheduler.models():
            return
        expected = model.next(which, set(np.flatnonzero(busy).tolist()), rows_max, now)
        batch = scheduler.next(which, busy, rows_max, now)
        assert (batch is None) == (not expected) and rows_of(None if batch is None else batch.steps) == expected
        if batch is not None:
            assert busy[batch.steps.rows].all()
            under_way.append(batch)

    def finish(batch: Batch) -> None:
        steps, count = batch.steps, len(batch)
        waves = [np.arange(count) if wave is None else wave for wave in batch.waves]
        assert np.array_equal(np.sort(np.concatenate(waves)), np.arange(count)), "each row is in one wave"
        for wave in waves:
            rows = steps.rows[wave].tolist()
            assert len(set(rows)) == len(rows)
            for row, seq in zip(rows, steps.seqs[wave].tolist(), strict=True):
                assert seq == done[row] + 1, "a step ran out of order"
                done[row] = seq
        last = np.arange(count) if batch.last is None else batch.last
        assert sorted(steps.rows[last].tolist()) == sorted(set(steps.rows.tolist()))
        assert all(done[row] == seq for row, seq in zip(steps.rows[last], steps.seqs[last], strict=True))
        busy[steps.rows] = False

    for what, *told in actions:
        match what, told:
            case "add", (int(place), list(of), int(time)):
                rows = []
                for one in of:
                    session = 4 * place + one
                    sent[session] += 1
                    rows.append(Row(session, place // 2, sent[session], now + time))
                scheduler.add(place % 2, steps_of(rows))
                model.waiting[place % 2] += rows
            case "next", (int(which), int(rows_max)):
                go(which, rows_max)
            case "finish", (int(which),) if under_way:
                finish(under_way.pop(which % len(under_way)))
            case "sessions", (list(sessions),):
                wanted = {row for row in model.every() if row.row in sessions}
                dropped(scheduler.drop_sessions(np.array(sessions, np.int32)), wanted)
            case "stream", (int(stream),):
                wanted = {row for row in model.every() if row.stream == stream}
                dropped(scheduler.drop_stream(stream), wanted)
            case "model", (int(which),):
                dropped(scheduler.drop_model(which), set(model.waiting[which]))
            case "late", _:
                dropped(scheduler.drop_late(now), model.late(now))
            case "prolong", (int(session), int(more), int(time)):
                seq = done[session] + more
                scheduler.prolong(np.array([session], np.int32), np.uint64(seq), now + time)
                model.prolong(session, seq, now + time)
            case "time", (int(seconds),):
                now += seconds
        assert scheduler.waiting_rows == len(model.every())
        assert sorted(scheduler.models()) == [which for which in range(2) if model.waiting[which]]
    now = 0.0  # nobody's time is up
    while under_way or model.every():
        while under_way:
            finish(under_way.pop())
        go(0, 20)
        go(1, 20)
    assert done == sent


# The columns of rows that wait


def test_rows_that_come_alone_are_taken_as_they_came() -> None:
    waiting, first, second = Waiting(8), frame(1, [0, 1]), frame(2, [2])
    waiting.add(first)
    assert (waiting.whole, waiting.count) == (first, 2)
    waiting.take_whole()
    assert (waiting.whole, waiting.count, len(waiting.places())) == (None, 0, 0)
    waiting.add(second)
    assert (waiting.whole, waiting.count) == (second, 1)
    waiting.add(first)
    assert (waiting.whole, waiting.count) == (None, 3), "not all of them came at once"
    assert rows_of(waiting.take(waiting.places())) == rows_of(joined([second, first]))
    assert waiting.count == 0
    waiting.add(first)
    assert waiting.whole is first, "once all have been taken it begins anew"


def test_rows_that_came_alone_and_are_looked_at_stay_in_their_order() -> None:
    waiting, one = Waiting(8), frame(1, [3, 1, 2])
    waiting.add(one)
    places = waiting.places()
    assert waiting.columns.rows[places].tolist() == [3, 1, 2] and waiting.count == 3
    waiting.columns.deadlines[places] = 7.0
    assert one.deadlines.tolist() == [FOREVER] * 3, "whose columns they were has them unchanged"
    assert rows_of(waiting.take(places[1:2])) == [Row(1, 1, 1, 7.0)]
    assert waiting.columns.rows[waiting.places()].tolist() == [3, 2]


@settings(max_examples=200)
@given(st.lists(st.one_of(st.integers(1, 90), st.floats(0, 1)), max_size=40), st.randoms(use_true_random=False))
def test_places_are_filled_up_and_the_order_stays(actions: list[int | float], random: object) -> None:
    waiting, expected, seq = Waiting(8), list[Row](), 0
    for action in actions:
        if isinstance(action, int):
            rows = [Row(n, n % 3, seq + n) for n in range(action)]
            seq += action
            waiting.add(steps_of(rows))
            expected += rows
        else:
            picked = sorted(random.sample(range(len(expected)), int(action * len(expected))))  # type: ignore[attr-defined]
            assert rows_of(waiting.take(waiting.places()[picked])) == [expected[n] for n in picked]
            expected = [row for n, row in enumerate(expected) if n not in set(picked)]
        assert waiting.count == len(expected)
    assert rows_of(waiting.take(waiting.places())) == expected


def test_a_queue_that_never_empties_does_not_grow() -> None:
    waiting = Waiting(8)
    waiting.add(frame(1, list(range(50))))
    for beat in range(2000):
        waiting.add(frame(1, list(range(50)), [beat + 2] * 50))
        waiting.take(waiting.places()[:50])
    assert waiting.count == 50 and len(waiting.columns) <= 256


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_occurrence_counts_equal_ones_before(values: list[int]) -> None:
    assert occurrence(np.array(values)).tolist() == [values[:n].count(value) for n, value in enumerate(values)]


def test_a_batch_may_be_made_of_any_rows() -> None:
    batch = batch_of(frame(1, [2, 0, 2], [1, 5, 2]))
    assert [wave.tolist() for wave in batch.waves if wave is not None] == [[0, 1], [2]]
    assert batch.last is not None and batch.last.tolist() == [1, 2]


def test_refused_rows_come_again_one_after_another_at_the_rate_of_the_machine() -> None:
    backlog = Backlog()
    assert backlog.retry_ms(0.0, 4096) == 50, "nothing is known yet"
    for beat in range(51):
        backlog.observe(beat * 0.02, beat * 20, waiting=500)  # a thousand rows a second
    assert backlog.rate == pytest.approx(1000)
    assert [backlog.retry_ms(1.0, 100) for _ in range(3)] == [100, 200, 300]
    assert backlog.retry_ms(1.25, 100) == 150, "a quarter of a second later, 250 of them have had their room"
    assert backlog.retry_ms(1.25, 1_000_000) == 5000, "and nobody is sent away for long"
    for beat in range(50):
        backlog.observe(2.0 + beat * 0.02, 1000 + beat, waiting=0)
    assert backlog.rate == pytest.approx(1000), "what an idle machine is asked for says nothing of what it can do"
