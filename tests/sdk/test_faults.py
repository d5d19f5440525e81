"""Faults that a real server cannot be made to have on demand, against the fake peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from fake_peer import WIDTH, FakePeer

import engram
from engram._table import VOID_HANDLE
from engram.v1 import error_pb2, stream_pb2

QUICK = engram.ClientOptions(
    timeout_s=10.0, connect_timeout_s=3.0, reconnect_timeout_s=5.0, backoff_initial_s=0.01, acknowledge_idle_s=0.1
)
Body = Callable[[FakePeer, engram.AsyncClient], Awaitable[None]]


@asynccontextmanager
async def playing(options: engram.ClientOptions = QUICK) -> AsyncIterator[tuple[FakePeer, engram.AsyncClient]]:
    peer = FakePeer()
    await peer.start()
    try:
        async with engram.AsyncClient(f"127.0.0.1:{peer.port}", options) as client:
            yield peer, client
    finally:
        await peer.stop()


def play(body: Body, options: engram.ClientOptions = QUICK) -> None:
    async def main() -> None:
        async with playing(options) as (peer, client):
            await body(peer, client)

    asyncio.run(asyncio.wait_for(main(), 30))


def row(value: float) -> np.ndarray:
    return np.full(WIDTH, value, np.float32)


def refuse_once(
    value_rows: dict[int, error_pb2.ErrorDetail],
) -> Callable[[list[str], np.ndarray], dict[int, error_pb2.ErrorDetail]]:
    """Refuses the rows with these seqs, each once."""
    left = dict(value_rows)

    def rows(names: list[str], seqs: np.ndarray) -> dict[int, error_pb2.ErrorDetail]:
        return {i: left.pop(int(seq)) for i, seq in enumerate(seqs.tolist()) if int(seq) in left}

    return rows


@pytest.mark.promise(4)
def test_reply_lost_with_the_stream_is_answered_after_reconnect() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        peer.faults.cut_after_frames = 1
        outputs = [await session.step(row(10 * i)) for i in range(4)]
        assert [float(y[0]) for y in outputs] == [0, 11, 22, 33]
        assert peer.streams == 2
        assert peer.records["a"].inputs == [0, 10, 20, 30]  # each applied once

    play(body)


@pytest.mark.promise(4)
def test_many_sessions_cut_in_the_middle_of_a_run() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        sessions = await client.open_many("count", [f"s{i}" for i in range(20)])
        peer.faults.cut_after_frames = 3
        X = np.zeros((200, WIDTH), np.float32)
        results = await asyncio.gather(*(session.run(X) for session in sessions))
        for Y in results:
            assert Y[:, 0].tolist() == list(range(200))
        assert peer.streams == 2

    play(body)


def test_replies_in_another_order_than_the_rows() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        peer.faults.reverse_frames = True
        session = await client.open("count", "a")
        assert (await session.run(np.zeros((100, WIDTH))))[:, 0].tolist() == list(range(100))
        outputs = await asyncio.gather(*(session.step(row(0)) for _ in range(50)))
        assert [float(y[0]) for y in outputs] == list(range(100, 150))

    play(body)


def test_prefills_overtaking_other_rows() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        y, _, z = await asyncio.gather(
            session.step(row(0)), session.prefill(np.zeros((5, WIDTH))), session.step(row(0))
        )
        assert (y[0], z[0], session.seq) == (0, 6, 7)

    play(body)


def test_refused_for_good_fails_only_its_caller() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session, other = await client.open("count", "a"), await client.open("count", "b")
        refuse = refuse_once({3: error_pb2.ErrorDetail(code=3, reason="NON_FINITE_INPUT", message="NaN")})
        peer.faults.rows = lambda names, seqs: refuse(names, np.where(np.array(names) == "a", seqs, 0))
        tasks = [asyncio.create_task(session.step(row(10 * i))) for i in range(6)]
        others = [asyncio.create_task(other.step(row(0))) for _ in range(6)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[2], engram.InvalidInputError)
        assert results[2].reason == "NON_FINITE_INPUT"
        # The three behind it moved up by one.
        assert [float(r[0]) for r in results if not isinstance(r, BaseException)] == [0, 11, 32, 43, 54]
        assert (peer.records["a"].seq, session.seq) == (5, 5)
        assert [float(y[0]) for y in await asyncio.gather(*others)] == list(range(6))
        assert float((await session.step(row(0)))[0]) == 5

    play(body)


def test_run_stops_at_its_first_bad_row_and_the_next_call_goes_on() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        peer.faults.rows = refuse_once({6: error_pb2.ErrorDetail(code=3, reason="NON_FINITE_INPUT", message="NaN")})
        run = asyncio.create_task(session.run(np.zeros((40, WIDTH))))
        after = asyncio.create_task(session.step(row(100)))
        with pytest.raises(engram.InvalidInputError) as caught:
            await run
        assert caught.value.metadata["row"] == "5"
        assert (await after)[0] == 105
        assert peer.records["a"].inputs == [0] * 5 + [100]

    play(body)


@pytest.mark.parametrize(("code", "reason"), [(8, "QUEUE_FULL"), (14, "STORE_UNAVAILABLE"), (4, "DEADLINE_EXCEEDED")])
def test_what_may_succeed_later_is_sent_again(code: int, reason: str) -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        peer.faults.rows = refuse_once(
            {
                i: error_pb2.ErrorDetail(code=code, reason=reason, message="later", retry_after_ms=20)
                for i in (1, 5, 6, 17)
            }
        )
        assert (await session.run(np.zeros((60, WIDTH))))[:, 0].tolist() == list(range(60))

    play(body)


def test_timeout_says_what_the_server_said() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        away = error_pb2.ErrorDetail(code=14, reason="STORE_UNAVAILABLE", message="no store", retry_after_ms=20)
        peer.faults.rows = lambda names, seqs: dict.fromkeys(range(len(names)), away)
        with pytest.raises(engram.UnavailableError) as caught:
            await session.step(row(5), timeout=0.3)
        assert caught.value.reason == "STORE_UNAVAILABLE"
        peer.faults.rows = None
        # The step was on its way: it is applied, its output dropped, and the session goes on.
        assert (await session.step(row(0)))[0] == 1
        assert peer.records["a"].inputs == [5, 0]

    play(body)


def test_a_step_that_was_not_applied_and_that_nobody_waits_for_is_not_sent_again() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        sessions = await client.open_many("count", ["a", "b"])
        late = error_pb2.ErrorDetail(
            code=4, reason="DEADLINE_EXCEEDED", message="late", retry_after_ms=20, metadata={"applied": "no"}
        )
        peer.faults.rows = lambda names, seqs: dict.fromkeys(range(len(names)), late)
        calls = [sessions[0].step(row(5), timeout=0.2), client.step_many(sessions, np.stack([row(7)] * 2), timeout=0.3)]
        given_up = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in given_up] == [engram.DeadlineExceededError] * 2
        patient = asyncio.create_task(sessions[1].step(row(9)))
        await asyncio.sleep(0.3)
        peer.faults.rows = None
        assert (await patient)[0] == 9
        assert (await sessions[0].step(row(1)))[0] == 1
        assert (peer.records["a"].inputs, peer.records["b"].inputs) == ([1], [9])
        assert (sessions[0].seq, sessions[1].seq) == (1, 1)

    play(body)


def test_default_timeout_of_a_run_is_for_a_server_that_stands_still() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        peer.delay_s = 0.05
        assert len(await session.run(np.zeros((160, WIDTH)))) == 160  # takes longer than the timeout, but goes on
        with pytest.raises(engram.DeadlineExceededError):
            await session.run(np.zeros((160, WIDTH)), timeout=0.2)
        peer.delay_s = 60
        with pytest.raises(engram.DeadlineExceededError):
            await session.run(np.zeros((160, WIDTH)))
        with pytest.raises(engram.DeadlineExceededError):
            await session.detach(timeout=0.1)

    with pytest.raises(engram.CloseIncompleteError) as caught:
        play(body, engram.ClientOptions(timeout_s=0.3))
    assert list(caught.value.open_steps) == ["a"]


def test_cancelled_callers_leave_the_session_usable() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        tasks = [asyncio.create_task(session.step(row(i))) for i in range(100)]
        await asyncio.sleep(0.005)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(not isinstance(r, BaseException) for r in results[1::2])
        values = [float(r[0]) - i for i, r in enumerate(results) if not isinstance(r, BaseException)]
        assert values == sorted(values)
        assert float((await session.step(row(0)))[0]) == peer.records["a"].seq - 1

    play(body)


@pytest.mark.promise(2)
def test_interval_crash_is_replayed_without_the_caller_noticing() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a", durability="interval")
        await session.run(np.arange(400, dtype=np.float32).reshape(100, 4))
        # Answers without durable_seqs: nothing is durable yet, so the crash may lose all but ten.
        peer.faults.forget_on_connect = lambda name, seq: 10
        peer.faults.cut_after_frames = 0
        outputs = [await session.step(row(i)) for i in range(5)]
        assert [float(y[0]) for y in outputs] == [100, 102, 104, 106, 108]
        assert peer.records["a"].inputs == [4.0 * i for i in range(100)] + [0, 1, 2, 3, 4]

    play(body)


def test_steps_that_were_durable_and_are_gone_are_a_typed_error() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        lost, kept = await client.open("count", "lost"), await client.open("count", "kept")
        await asyncio.gather(lost.run(np.zeros((10, WIDTH))), kept.run(np.zeros((10, WIDTH))))
        peer.faults.forget_on_connect = lambda name, seq: 3 if name == "lost" else seq
        peer.faults.cut_after_frames = 0
        results = await asyncio.gather(lost.step(row(0)), kept.step(row(0)), return_exceptions=True)
        assert isinstance(results[0], engram.DataLossError)
        assert results[0].reason == "STATE_REWOUND"
        assert float(results[1][0]) == 10
        with pytest.raises(engram.DataLossError):
            await lost.step(row(0))

    play(body)


def taken_over(handle: int) -> stream_pb2.StreamResponse:
    event = stream_pb2.EventFrame(
        type=stream_pb2.EventFrame.TYPE_TAKEN_OVER, handles=np.array([handle], "<u4").tobytes()
    )
    return stream_pb2.StreamResponse(event=event)


def test_a_session_that_its_own_late_attach_took_over_goes_on() -> None:
    """An attach that was sent on an earlier stream may come late, and take the session from the server that has it now."""

    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        a, b = await client.open_many("count", ["a", "b"])
        await client.step_many([a, b], np.zeros((2, WIDTH)))
        running = asyncio.gather(a.run(np.zeros((200, WIDTH))), b.run(np.zeros((200, WIDTH))))
        peer.push(taken_over(1))
        for Y in await running:
            assert Y[:, 0].tolist() == list(range(1, 201))
        assert peer.streams == 1, "the other sessions of the stream are not disturbed"

    play(body)


def test_events_end_only_the_sessions_they_name() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        a, b, c = await client.open_many("count", ["a", "b", "c"])
        await client.step_many([a, b, c], np.zeros((3, WIDTH)))
        peer.faults.taken.add("b")
        peer.push(taken_over(1))
        await asyncio.sleep(0.1)
        with pytest.raises(engram.TakenOverError):
            await b.step(row(0))
        with pytest.raises(engram.TakenOverError):
            await client.step_many([a, b], np.zeros((2, WIDTH)))
        assert (await client.step_many([a, c], np.zeros((2, WIDTH))))[:, 0].tolist() == [1, 1]
        again = await client.open("count", "b")
        assert float((await again.step(row(0)))[0]) == 1

    play(body)


def test_a_server_that_drains_for_ever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram._link._DRAIN_S", 0.3)

    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count")
        peer.push(stream_pb2.StreamResponse(event=stream_pb2.EventFrame(type=stream_pb2.EventFrame.TYPE_DRAINING)))
        await asyncio.sleep(0.1)
        assert (await session.step(row(3)) == row(3)).all()
        assert peer.streams == 2

    play(body)


def test_draining_server_is_left_without_an_error() -> None:
    async def main() -> None:
        first, second = FakePeer(), FakePeer()
        await first.start()
        await second.start()
        second.records = first.records
        async with engram.AsyncClient([f"127.0.0.1:{p.port}" for p in (first, second)], QUICK) as client:
            session = await client.open("count", "a")
            await session.step(row(0))
            first.push(stream_pb2.StreamResponse(event=stream_pb2.EventFrame(type=stream_pb2.EventFrame.TYPE_DRAINING)))
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(session.run(np.zeros((50, WIDTH))))
            await asyncio.sleep(0.05)
            assert first.records["a"].seq == 1
            await first.stop()
            assert (await waiting)[:, 0].tolist() == list(range(1, 51))
            assert second.streams == 1
        await second.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_client_that_cannot_connect_leaves_nothing_behind() -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        with pytest.raises(engram.UnavailableError):
            async with engram.AsyncClient("127.0.0.1:1", engram.ClientOptions(connect_timeout_s=0.2)):
                pass
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(main(), 30))


def test_no_server_is_unavailable_in_time() -> None:
    async def main() -> None:
        options = engram.ClientOptions(connect_timeout_s=0.5, backoff_initial_s=0.01)
        with pytest.raises(engram.UnavailableError) as caught:
            async with engram.AsyncClient("127.0.0.1:1", options):
                pass
        assert caught.value.reason == "CONNECTION_LOST"

    asyncio.run(asyncio.wait_for(main(), 10))


def test_server_that_stays_away_fails_the_calls_that_wait() -> None:
    async def main() -> None:
        options = engram.ClientOptions(reconnect_timeout_s=0.5, backoff_initial_s=0.01, backoff_max_s=0.1)
        peer = FakePeer()
        port = await peer.start()
        async with engram.AsyncClient(f"127.0.0.1:{port}", options) as client:
            session = await client.open("count", "a")
            await session.step(row(0))
            await peer.stop()
            results = await asyncio.gather(
                session.step(row(7)), session.run(np.zeros((3, WIDTH))), return_exceptions=True
            )
            assert [type(r) for r in results] == [engram.UnavailableError] * 2
            back = FakePeer()
            back.records = peer.records
            await back.start(port)
            # What had been sent may have been applied; what had not left was withdrawn with its caller.
            y = await session.step(row(0))
            assert float(y[0]) == back.records["a"].seq - 1
            await back.stop()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_idle_sessions_acknowledge() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        await session.step(row(0))
        await asyncio.sleep(0.5)
        assert client._core.table.acked[session._slot] == 1

    play(body)


def test_full_buffer_waits_for_durability() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a", durability="interval")
        run = asyncio.create_task(session.run(np.zeros((200, WIDTH))))
        await asyncio.sleep(0.3)
        assert not run.done()
        applied = peer.records["a"].seq
        assert applied < 200
        while not run.done():
            durable = np.array([peer.records["a"].seq], "<u8").tobytes()
            frame = stream_pb2.DurableFrame(handles=np.array([0], "<u4").tobytes(), durable_seqs=durable)
            peer.push(stream_pb2.StreamResponse(durable=frame))
            await asyncio.sleep(0.01)
        assert (await run)[:, 0].tolist() == list(range(200))

    play(body, engram.ClientOptions(timeout_s=10.0, buffer_bytes_max=2000))


def test_coalescing_and_windows() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        sessions = await client.open_many("count", 300)
        await asyncio.gather(*(session.step(row(0)) for session in sessions))
        assert peer.frame_rows == [300]
        await asyncio.gather(*(sessions[0].step(row(0)) for _ in range(1000)))
        assert max(peer.frame_rows[1:]) <= peer.window

    play(body)


def test_generate_in_windows() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        await session.step(row(1))
        peer.faults.cut_after_frames = 2
        Y = await session.generate(50)
        expected, value = [], 1.0
        for seq in range(1, 51):
            value += seq
            expected.append(value)
        assert Y[:, 0].tolist() == expected

    play(body)


def test_step_many_tells_which_rows_failed() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        sessions = await client.open_many("count", [f"s{i}" for i in range(5)])
        bad = error_pb2.ErrorDetail(code=3, reason="NON_FINITE_INPUT", message="NaN")
        peer.faults.rows = lambda names, seqs: {i: bad for i, name in enumerate(names) if name in ("s1", "s3")}
        with pytest.raises(engram.InvalidInputError) as caught:
            await client.step_many(sessions, np.ones((5, WIDTH)))
        assert sorted(caught.value.rows) == [1, 3]
        assert caught.value.outputs is not None
        assert caught.value.outputs[:, 0].tolist() == [1, 0, 1, 0, 1]
        assert [s.seq for s in sessions] == [1, 0, 1, 0, 1]
        peer.faults.rows = None
        await client.step_many([*sessions, *sessions], np.ones((10, WIDTH)))
        assert [s.seq for s in sessions] == [3, 2, 3, 2, 3]

    play(body)


def test_a_close_waits_for_its_session_to_be_attached_again_and_lets_others_work() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        slot, table = session._slot, client._core.table
        handle = table.handle[slot]
        table.handle[slot] = VOID_HANDLE
        with pytest.raises(engram.DeadlineExceededError):
            await session.close(timeout=0.1)
        closing = asyncio.create_task(session.close())
        await asyncio.sleep(0.05)
        table.handle[slot] = handle
        await closing

    play(body)


def test_a_session_that_goes_on_beside_a_refused_one_is_refused_later() -> None:
    async def body(peer: FakePeer, client: engram.AsyncClient) -> None:
        a, b = await client.open_many("count", ["a", "b"])
        await asyncio.gather(a.step(row(0)), b.step(row(0)))
        busy = error_pb2.ErrorDetail(code=8, reason="QUEUE_FULL", message="full", retry_after_ms=10)
        for name in ("a", "b", "a", "b"):
            left = [name]
            peer.faults.rows = lambda names, seqs, left=left: {
                i: busy for i, one in enumerate(names) if left and one == left[0] and not left.clear()
            }
            for Y in await asyncio.gather(a.run(np.zeros((40, WIDTH))), b.run(np.zeros((40, WIDTH)))):
                assert (np.diff(Y[:, 0]) == 1).all()
            assert not left
        assert (a.seq, b.seq) == (161, 161)

    play(body)
