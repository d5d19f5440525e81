"""The scheduler: order, one run a session and tick, fairness, nothing lost. Pure, so it is tested without a server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_service.scheduler import Batch, Scheduler, Tick
from engram_service.sessions.backlog import Backlog
from engram_service.sessions.table import References


@dataclass
class Sender:
    id: int


def batch(stream: int, rows: list[int], seqs: list[int], deadline: float = np.inf) -> Batch:
    column = np.array(rows, np.int32)
    unique = len(set(rows)) == len(rows)
    inputs = np.array(seqs, np.uint8).reshape(-1, 1)
    sessions, handles = References(column, np.zeros(len(rows), np.uint32)), column.astype(np.uint32)
    return Batch(
        Sender(stream),
        sessions,
        handles,
        np.array(seqs, np.uint64),
        np.zeros(len(rows), np.uint8),
        inputs,
        unique,
        0.0,
        deadline,
    )


def test_all_that_is_ready_goes_at_once() -> None:
    scheduler, busy = Scheduler(16), np.zeros(10, np.bool_)
    scheduler.add(batch(1, [0, 1, 2], [1, 1, 1]))
    scheduler.add(batch(2, [3, 4], [1, 1]))
    tick = scheduler.next(busy, 100, 0.0)
    assert tick is not None
    assert tick.rows.tolist() == [0, 1, 2, 3, 4]
    assert busy[:5].all()
    assert not busy[5:].any()
    assert tick.waves == [None]
    assert tick.last is None
    assert scheduler.next(busy, 100, 0.0) is None
    assert scheduler.waiting_rows == 0


def test_a_busy_session_waits_and_the_others_go() -> None:
    scheduler, busy = Scheduler(16), np.zeros(4, np.bool_)
    busy[1] = True
    scheduler.add(batch(1, [0, 1, 2], [1, 1, 1]))
    tick = scheduler.next(busy, 100, 0.0)
    assert tick is not None
    assert tick.rows.tolist() == [0, 2]
    assert scheduler.next(busy, 100, 0.0) is None
    assert scheduler.waiting_rows == 1
    busy[:] = False
    tick = scheduler.next(busy, 100, 0.0)
    assert tick is not None
    assert tick.rows.tolist() == [1]


def test_a_run_of_one_session_goes_in_waves() -> None:
    scheduler, busy = Scheduler(3), np.zeros(4, np.bool_)
    scheduler.add(batch(1, [0, 0, 1, 0, 0], [1, 2, 1, 3, 4]))
    tick = scheduler.next(busy, 100, 0.0)
    assert tick is not None
    assert [(int(r), int(s)) for r, s in zip(tick.rows, tick.seqs, strict=True)] == [(0, 1), (0, 2), (1, 1), (0, 3)]
    assert [wave.tolist() for wave in tick.waves if wave is not None] == [[0, 2], [1], [3]]
    assert tick.last is not None
    assert tick.last.tolist() == [2, 3]


def test_small_streams_do_not_wait_for_a_large_one() -> None:
    scheduler, busy = Scheduler(1), np.zeros(2000, np.bool_)
    scheduler.add(batch(1, list(range(1000)), [1] * 1000))
    scheduler.add(batch(2, [1500, 1501], [1, 1]))
    ticks = [scheduler.next(busy, 64, 0.0) for _ in range(2)]
    assert [sorted(tick.rows.tolist()) for tick in ticks if tick] == [[1500, 1501], list(range(64))]


def test_large_streams_share_a_full_tick() -> None:
    scheduler, busy = Scheduler(1), np.zeros(3000, np.bool_)
    for stream in (0, 1):
        scheduler.add(batch(stream, list(range(1000 * stream, 1000 * stream + 1000)), [1] * 1000))
    tick = scheduler.next(busy, 64, 0.0)
    assert tick is not None and (np.bincount(tick.rows // 1000) == 32).all()


def test_large_streams_have_one_turn_together_while_small_ones_step() -> None:
    scheduler, busy = Scheduler(1), np.zeros(9000, np.bool_)
    for stream in range(1, 4):
        scheduler.add(batch(stream, list(range(2000 * stream, 2000 * stream + 2000)), [1] * 2000))
    for stream in range(4, 21):
        scheduler.add(batch(stream, [stream], [1]))
    ticks = [scheduler.next(busy, 1024, 0.5) for _ in range(3)]
    assert [len(tick) for tick in ticks if tick] == [17, 64, 64]
    for tick in ticks[1:]:
        assert tick is not None and set((tick.rows // 2000).tolist()) == {1, 2, 3}
    alone = scheduler.next(busy, 1024, 2.0)
    assert alone is not None and len(alone) == 1024, "no small one has stepped for more than a second"


@pytest.mark.parametrize(("small", "turn"), [(2000, 269), (500, 661), (2, 1727)])
def test_a_turn_is_longer_where_rows_are_quick_and_small_ones_few(small: int, turn: int) -> None:
    scheduler, busy = Scheduler(1), np.zeros(12000, np.bool_)
    scheduler.add(batch(1, list(range(8000)), [1] * 8000))
    for stream in range(2, 2 + small):
        scheduler.add(batch(stream, [8000 + stream], [1]))
    for _ in range(50):
        scheduler.took(128, 0.001)
        scheduler.took(3, 0.001)  # of which nothing is learnt
    assert [len(tick) for _ in range(2) if (tick := scheduler.next(busy, 4096, 0.0))] == [small, turn]


def test_only_small_streams_go_where_no_turns_are_wanted() -> None:
    scheduler, busy = Scheduler(1), np.zeros(3000, np.bool_)
    scheduler.add(batch(1, list(range(2000)), [1] * 2000))
    scheduler.add(batch(2, [2500], [1]))
    small = scheduler.next(busy, 1024, 0.0, turns=False)
    assert small is not None and small.rows.tolist() == [2500]
    assert scheduler.next(busy, 1024, 0.0, turns=False) is None
    turn = scheduler.next(busy, 1024, 0.0)
    assert turn is not None and turn.turn


def test_runs_are_short_beside_small_streams_and_long_among_large_ones() -> None:
    scheduler, busy = Scheduler(16), np.zeros(300, np.bool_)
    for stream in (0, 1):
        scheduler.add(batch(stream, [stream * 100 + n // 16 for n in range(1600)], [n % 16 + 1 for n in range(1600)]))
    among_large = scheduler.next(busy, 1024, 0.0)
    assert among_large is not None and len(among_large.waves) == 16
    busy[:] = False
    scheduler.add(batch(2, [299], [1]))
    small, large = (scheduler.next(busy, 200, 0.0) for _ in range(2))
    assert small is not None and small.rows.tolist() == [299]
    assert large is not None and len(large.waves) == 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 700)), min_size=1, max_size=20), st.integers(130, 400))
def test_every_stream_goes_within_four_ticks(frames: list[tuple[int, int]], rows_max: int) -> None:
    """Stream 0 always has a row waiting, as many small ones have together; the others send frames of up to 700."""
    scheduler, busy = Scheduler(1), np.zeros(4000, np.bool_)
    waiting = [0] * 4
    for stream, count in [*frames, *((1, 0) for _ in range(50))]:
        if not waiting[stream] and count:
            scheduler.add(batch(stream, list(range(1000 * stream, 1000 * stream + count)), [1] * count))
            waiting[stream] = count
        wanted, went = {stream for stream in range(4) if waiting[stream]}, set()
        for _ in range(4):
            if not waiting[0]:
                scheduler.add(batch(0, [0], [1]))
                waiting[0] = 1
            tick = scheduler.next(busy, rows_max, 0.0)
            assert tick is not None
            went |= set((tick.rows // 1000).tolist())
            waiting = [before - int((tick.rows // 1000 == stream).sum()) for stream, before in enumerate(waiting)]
            busy[tick.rows] = False
        assert wanted <= went
    assert not any(waiting[1:])


def test_rows_whose_time_is_up_are_not_taken_nor_any_behind_them() -> None:
    scheduler, busy = Scheduler(16), np.zeros(10, np.bool_)
    scheduler.add(batch(1, [0, 1], [1, 1], deadline=5.0))
    scheduler.add(batch(1, [0, 2], [2, 1], deadline=50.0))
    tick = scheduler.next(busy, 100, 10.0)
    assert tick is not None and tick.rows.tolist() == [2]
    assert scheduler.waiting_rows == 3 and scheduler.next(busy, 100, 10.0) is None
    dropped = scheduler.drop(lambda waiting: np.full(len(waiting.waiting), waiting.deadline < 10.0))
    assert [part.seqs[index].tolist() for part, index in dropped] == [[1, 1]]


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


def test_drop_takes_rows_out() -> None:
    scheduler, busy = Scheduler(16), np.zeros(4, np.bool_)
    scheduler.add(batch(1, [0, 1, 2], [1, 1, 1]))
    dropped = scheduler.drop(lambda waiting: waiting.rows[waiting.waiting] == 1)
    assert [index.tolist() for _, index in dropped] == [[1]]
    assert scheduler.waiting_rows == 2
    tick = scheduler.next(busy, 100, 0.0)
    assert tick is not None
    assert tick.rows.tolist() == [0, 2]


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Frames of a few streams; each session belongs to one stream. Sessions may repeat within a frame."""
    frames: list[tuple[int, list[int]]] = []
    for _ in range(draw(st.integers(1, 12))):
        stream = draw(st.integers(0, 2))
        frames.append((stream, [stream * 4 + draw(st.integers(0, 3)) for _ in range(draw(st.integers(1, 9)))]))
    return frames


@settings(max_examples=300, deadline=None)
@given(arrivals(), st.integers(1, 20), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_session_advances_in_order_and_nothing_is_lost(
    frames: list[tuple[int, list[int]]], rows_max: int, run_max: int, random: object
) -> None:
    scheduler, busy = Scheduler(run_max), np.zeros(16, np.bool_)
    sent, done = np.zeros(16, np.int64), np.zeros(16, np.int64)
    under_way: list[Tick] = []
    queue = list(frames)
    while queue or scheduler.waiting_rows or under_way:
        if queue:
            stream, rows = queue.pop(0)
            seqs = []
            for row in rows:
                sent[row] += 1
                seqs.append(int(sent[row]))
            scheduler.add(batch(stream, rows, seqs))
        tick = scheduler.next(busy, rows_max, 0.0)
        if tick is not None:
            assert 0 < len(tick) <= rows_max
            _, counts = np.unique(tick.rows, return_counts=True)
            assert counts.max() <= run_max
            under_way.append(tick)
        if under_way and (tick is None or random.random() < 0.5):  # type: ignore[attr-defined]
            finished = under_way.pop(0)
            waves = [np.arange(len(finished)) if wave is None else wave for wave in finished.waves]
            assert np.array_equal(np.sort(np.concatenate(waves)), np.arange(len(finished)))
            for wave in waves:
                assert len(np.unique(finished.rows[wave])) == len(wave)
                assert np.array_equal(finished.seqs[wave], done[finished.rows[wave]] + 1), "a step ran out of order"
                done[finished.rows[wave]] += 1
            last = np.arange(len(finished)) if finished.last is None else finished.last
            assert np.array_equal(finished.seqs[last], done[finished.rows[last]])
            busy[finished.rows] = False
    assert np.array_equal(sent, done)
