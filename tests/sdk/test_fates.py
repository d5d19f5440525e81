"""What becomes of a step whose call failed: by timeout, cancel and lost connection, with a server cut off at every point of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import pathlib
import random
import sys
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_peer import WIDTH, FakePeer

import engram
from engram.v1 import error_pb2, stream_pb2

OPTIONS = engram.ClientOptions(
    timeout_s=10.0, connect_timeout_s=3.0, reconnect_timeout_s=0.4, backoff_initial_s=0.01, backoff_max_s=0.05
)
POINTS = ("before", "half", "read", "applied")
HOW = ("timeout", "cancel", "loss")


def row(value: float) -> np.ndarray:
    return np.full(WIDTH, value, np.float32)


class Wire:
    """Between client and peer: passes so many bytes more towards the peer, then ends every connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._left: int | None = None  # None: any number
        self._away = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def cut_after(self, nbytes: int) -> None:
        self._left = nbytes

    def cut(self) -> None:
        self._away = True
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def heal(self) -> None:
        self._left, self._away = None, False

    async def stop(self) -> None:
        self.cut()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, far_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, far_writer, True), self._pump(far_reader, writer, False))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        while data := await reader.read(1 << 16):
            if counted and self._left is not None:
                data, self._left = data[: self._left], max(0, self._left - len(data))
            writer.write(data)
            if counted and self._left == 0:
                await asyncio.sleep(0.02)
                self.cut()
        writer.transport.abort()


@asynccontextmanager
async def playing(options: engram.ClientOptions = OPTIONS) -> AsyncIterator[tuple[FakePeer, Wire, engram.AsyncClient]]:
    peer = FakePeer()
    wire = Wire(await peer.start())
    try:
        async with engram.AsyncClient(f"127.0.0.1:{await wire.start()}", options) as client:
            yield peer, wire, client
    finally:
        await wire.stop()
        await peer.stop()


Body = Callable[[FakePeer, Wire, engram.AsyncClient], Awaitable[None]]


def play(body: Body, options: engram.ClientOptions = OPTIONS) -> None:
    async def main() -> None:
        async with playing(options) as parts:
            await body(*parts)

    asyncio.run(asyncio.wait_for(main(), 60))


def play_each(body: Callable[..., Awaitable[None]], cases: Iterable[tuple[Any, ...]]) -> None:
    """All cases beside each other, each with a peer of its own."""

    async def one(case: tuple[Any, ...]) -> None:
        try:
            async with playing() as parts:
                await body(*parts, *case)
        except BaseException as error:
            error.add_note(f"case: {case}")
            raise

    async def main() -> None:
        await asyncio.gather(*map(one, cases))

    asyncio.run(asyncio.wait_for(main(), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def fail_at(
    point: str, how: str, peer: FakePeer, wire: Wire, calling: Callable[[float], Awaitable[Any]]
) -> engram.EngramError | None:
    """Makes a call that gets as far as the point and fails in this way. None: cancelled, so there is no error."""
    peer.faults.gate.clear()
    frames = peer.frames
    if point == "before":
        wire.cut()
        await asyncio.sleep(0.05)
    elif point == "half":
        wire.cut_after(30)
    else:
        peer.faults.stop_at = point
    task = asyncio.ensure_future(calling(0.15 if how == "timeout" else 10.0))
    if point in ("read", "applied"):
        await until(lambda: peer.frames > frames)
    if how == "loss":
        await asyncio.sleep(0.05)
        wire.cut()
    elif how == "cancel":
        await asyncio.sleep(0.1)
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        try:
            await task
        except engram.EngramError as error:
            assert how != "cancel"
            return error
        raise AssertionError("it was answered")
    assert how == "cancel"
    return None


def go_on(peer: FakePeer, wire: Wire, cut: bool) -> None:
    """The server goes on where it stood, or is cut there."""
    peer.faults.cut = cut
    peer.faults.gate.set()
    wire.heal()


@pytest.mark.parametrize("how", HOW)
def test_the_repeat_of_a_failed_step_is_applied_once(how: str) -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient, point: str, cut: bool) -> None:
        session = await client.open("count", "a")
        await session.step(row(1))
        error = await fail_at(point, how, peer, wire, lambda t: session.step(row(5), timeout=t))
        sent = point != "before"
        assert session.in_doubt == sent
        if error is not None:
            assert (error.applied, error.seq) == ((None, 2) if sent else (False, None))
        go_on(peer, wire, cut)
        if not cut:
            await asyncio.sleep(0.1)
        assert session.seq == 1, "what is open is not counted"
        assert (await session.step(row(5)))[0] == 6
        assert (session.seq, session.in_doubt) == (2, False)
        assert error is None or error.applied is False, "the repeat has its seq"
        assert (await session.step(row(7)))[0] == 9
        assert peer.records["a"].inputs == [1, 5, 7]

    play_each(body, itertools.product(POINTS, (False, True)))


@pytest.mark.parametrize("how", HOW)
def test_who_asks_is_told(how: str) -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient, point: str, cut: bool) -> None:
        session = await client.open("count", "a")
        await session.step(row(1))
        error = await fail_at(point, how, peer, wire, lambda t: session.step(row(5), timeout=t))
        if point != "before":
            with pytest.raises(engram.EngramError) as caught:
                await session.settle(timeout=0.05)
            assert (caught.value.applied, caught.value.seq) == (None, 2)
        go_on(peer, wire, cut)
        settled = await session.settle()
        applied = peer.records["a"].inputs == [1, 5]
        assert (settled.applied, settled.seq, session.seq) == (int(applied), 1 + applied, 1 + applied)
        assert settled.outputs[:, 0].tolist() == ([6] if applied else [])
        assert error is None or error.applied is applied
        # It has been told: the same input is a new step now.
        assert (await session.step(row(5)))[0] == 6 + applied
        assert peer.records["a"].inputs == ([1, 5, 5] if applied else [1, 5])

    play_each(body, itertools.product(POINTS, (False, True)))


@pytest.mark.parametrize("how", HOW)
def test_another_step_goes_when_the_fate_is_known(how: str) -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient, point: str, cut: bool) -> None:
        session = await client.open("count", "a")
        await session.step(row(1))
        error = await fail_at(point, how, peer, wire, lambda t: session.step(row(5), timeout=t))
        frames = peer.frames
        other = asyncio.create_task(session.step(row(7)))
        await asyncio.sleep(0.05)
        assert peer.frames == frames, "it went before"
        go_on(peer, wire, cut)
        y = await other
        applied = peer.records["a"].inputs == [1, 5, 7]
        assert applied or peer.records["a"].inputs == [1, 7]
        assert (float(y[0]), session.seq) == (8 + applied, 2 + applied)
        assert error is None or error.applied is applied

    play_each(body, itertools.product(POINTS, (False, True)))


@pytest.mark.parametrize("how", HOW)
def test_a_run_that_failed_half_way(how: str) -> None:
    """Sixteen rows, the window, are on their way at most; those behind never leave."""

    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient, point: str) -> None:
        session = await client.open("count", "a")
        X = np.arange(1, 41, dtype=np.float32)[:, None].repeat(WIDTH, 1)
        first = await session.run(X[:8])
        error = await fail_at(point, how, peer, wire, lambda t: session.run(X[8:], timeout=t))
        if error is not None:
            assert (error.metadata["row"], session.seq) == ("0", 8)
            assert (error.applied, error.seq) == ((False, None) if point == "before" else (None, 9))
        go_on(peer, wire, cut=True)
        second = await session.run(X[session.seq :])
        assert peer.records["a"].inputs == X[:, 0].tolist()
        whole = np.concatenate([first, second])
        assert whole[:, 0].tolist() == [x + i for i, x in enumerate(X[:, 0].tolist())]
        assert error is None or error.applied is False

    play_each(body, zip(POINTS))


def test_a_run_that_is_begun_otherwise_goes_behind() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        X = np.arange(1, 6, dtype=np.float32)[:, None].repeat(WIDTH, 1)
        error = await fail_at("applied", "timeout", peer, wire, lambda t: session.run(X, timeout=t))
        go_on(peer, wire, cut=False)
        await session.run(X[:3])  # not all that was open: no repeat
        assert error is not None
        assert error.applied is True
        assert peer.records["a"].inputs == [1, 2, 3, 4, 5, 1, 2, 3]
        assert session.seq == 8

    play(body)


def test_step_many_tells_of_each_row() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        sessions = await client.open_many("count", ["a", "b", "c"])
        busy = error_pb2.ErrorDetail(code=8, reason="QUEUE_FULL", message="full", retry_after_ms=20)
        away = error_pb2.ErrorDetail(
            code=14, reason="STORE_UNAVAILABLE", message="no store", retry_after_ms=20, metadata={"applied": "unknown"}
        )
        told = {"b": busy, "c": away}
        peer.faults.rows = lambda names, seqs: {i: told[name] for i, name in enumerate(names) if name in told}
        X = np.stack([row(1), row(2), row(3)])
        with pytest.raises(engram.EngramError) as caught:
            await client.step_many(sessions, X, timeout=0.3)
        await asyncio.sleep(0.05)
        assert {at: (error.applied, error.seq) for at, error in caught.value.rows.items()} == {
            1: (False, 1),
            2: (None, 1),
        }
        assert caught.value.outputs is not None
        assert caught.value.outputs[:, 0].tolist() == [1, 0, 0]
        assert [one.in_doubt for one in sessions] == [False, False, True]
        peer.faults.rows = None
        await client.step_many(sessions[1:], X[1:])
        assert [peer.records[name].inputs for name in "abc"] == [[1], [2], [3]]

    play(body)


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_what_backpressure_refused_is_taken_back(how: str) -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        busy = error_pb2.ErrorDetail(code=8, reason="QUEUE_FULL", message="full", retry_after_ms=1000)
        peer.faults.rows = lambda names, seqs: dict.fromkeys(range(len(names)), busy)
        task = asyncio.create_task(session.step(row(5), timeout=0.2))
        behind = asyncio.create_task(session.step(row(6)))
        await until(lambda: peer.frames > 0)
        await asyncio.sleep(0.05)
        if how == "cancel":
            task.cancel()
        results = await asyncio.gather(task, return_exceptions=True)
        assert not session.in_doubt
        if how == "timeout":
            assert isinstance(results[0], engram.ResourceExhaustedError)
            assert (results[0].applied, results[0].seq) == (False, 1)
        peer.faults.rows = None
        assert (await behind)[0] == 6
        assert peer.records["a"].inputs == [6]

    play(body)


def test_a_refusal_of_the_repeat_says_nothing_of_the_first() -> None:
    """The first time, the server could not say; that it then refuses to take the seq again does not mean that it was not applied."""

    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        away = error_pb2.ErrorDetail(
            code=14, reason="STORE_UNAVAILABLE", message="no store", metadata={"applied": "unknown"}
        )
        busy = error_pb2.ErrorDetail(code=8, reason="QUEUE_FULL", message="full", metadata={"applied": "no"})
        answers = [away, busy, busy]
        peer.faults.rows = lambda names, seqs: {0: answers.pop(0)} if answers else {}
        with pytest.raises(engram.EngramError) as caught:
            await session.step(row(5), timeout=0.02)
        assert caught.value.applied is None
        await until(lambda: not answers)
        peer.records["a"].inputs.append(5.0)  # the first is committed now
        peer.records["a"].seq, peer.records["a"].outputs = 1, {1: row(5).tobytes()}
        assert (await session.settle()).applied == 1
        assert (await session.step(row(1)))[0] == 2
        assert peer.records["a"].inputs == [5, 1]

    play(body)


def test_a_failing_server_is_asked_what_became_of_the_step() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        failed = error_pb2.ErrorDetail(code=13, reason="INTERNAL", message="a fault", metadata={"applied": "unknown"})
        peer.faults.rows = lambda names, seqs: dict.fromkeys(range(len(names)), failed)
        with pytest.raises(engram.InternalError) as caught:
            await session.step(row(5))
        peer.faults.rows = None
        assert (await session.settle()).applied == 0
        assert caught.value.applied is False
        assert (await session.step(row(1)))[0] == 1
        assert peer.records["a"].inputs == [1]

    play(body)


def test_what_was_never_sent_was_not_applied() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        with pytest.raises(engram.InvalidInputError) as unfit:
            await session.step(np.zeros(WIDTH + 1, np.float32))
        peer.faults.rows = lambda names, seqs: {
            0: error_pb2.ErrorDetail(code=3, reason="NON_FINITE_INPUT", message="NaN")
        }
        with pytest.raises(engram.InvalidInputError) as refused:
            await session.step(row(5))
        await session.close()
        with pytest.raises(engram.SessionClosedError) as closed:
            await session.step(row(5))
        assert [one.value.applied for one in (unfit, refused, closed)] == [False, False, False]
        assert refused.value.seq == 1

    play(body)


def test_interval_steps_that_nobody_waits_for_are_not_replayed() -> None:
    """Computed and not durable when the server was lost: those that were answered are replayed, the failed one is not."""

    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a", durability="interval")
        await session.run(np.ones((10, WIDTH), np.float32))
        error = await fail_at("applied", "timeout", peer, wire, lambda t: session.step(row(5), timeout=t))
        peer.faults.forget_on_connect = lambda name, seq: 4
        go_on(peer, wire, cut=True)
        assert (await session.step(row(7)))[0] == 17
        assert error is not None
        assert error.applied is False
        assert peer.records["a"].inputs == [1] * 10 + [7]
        wire.cut()
        await asyncio.sleep(0.05)

    with pytest.raises(engram.CloseIncompleteError) as caught:  # the attach said that four were
        play(body)
    assert caught.value.not_durable == {"a": 4}


# Close


def test_a_close_that_failed_can_be_repeated() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        late = error_pb2.ErrorDetail(code=4, reason="DEADLINE_EXCEEDED", message="late")
        away = error_pb2.ErrorDetail(code=14, reason="STORE_UNAVAILABLE", message="no store", retry_after_ms=400)
        for failure, kind in ((late, engram.DeadlineExceededError), (away, engram.UnavailableError)):
            peer.faults.close = [failure]
            with pytest.raises(kind):
                await session.close(timeout=0.2)
        assert (await session.step(row(1)))[0] == 1, "it is as it was"
        peer.faults.close = [
            error_pb2.ErrorDetail(code=14, reason="STORE_UNAVAILABLE", message="no store", retry_after_ms=10)
        ]
        await session.close()
        assert peer.closes == 4
        await session.close()
        assert peer.closes == 4

    play(body)


def test_a_close_of_a_session_that_another_has_is_an_error() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        peer.faults.close = [error_pb2.ErrorDetail(code=10, reason="TAKEN_OVER", message="taken")]
        with pytest.raises(engram.TakenOverError):
            await session.close()
        with pytest.raises(engram.TakenOverError):
            await session.close()
        await session.detach()

    play(body)


def test_the_client_says_what_it_could_not_do() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        open_one, answered, _ = await client.open_many("count", ["open", "answered", "refused"])
        await answered.step(row(1))
        await fail_at("read", "timeout", peer, wire, lambda t: open_one.step(row(5), timeout=t))
        wire.cut()
        await asyncio.sleep(0.05)
        with pytest.raises(engram.CloseIncompleteError) as caught:
            await client.aclose()
        assert caught.value.open_steps == {"open": 1}
        assert caught.value.not_durable == {}
        assert "'open'" in str(caught.value)
        await client.aclose()  # has been told

    play(body)


def test_a_refused_detach_is_told_and_an_error_on_the_way_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = error_pb2.ErrorDetail(code=13, reason="INTERNAL", message="a fault")

    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        await client.open("count", "a")
        peer.faults.close = [refused]

    with pytest.raises(engram.CloseIncompleteError) as caught:
        play(body)
    assert caught.value.undetached == ["a"]

    async def fails(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        await body(peer, wire, client)
        raise KeyError("mine")

    with pytest.raises(KeyError) as mine:
        play(fails)
    assert "not let go of" in mine.value.__notes__[0]


def test_calls_that_wait_at_the_close_are_told() -> None:
    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a")
        wire.cut()
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(session.step(row(5)))
        await asyncio.sleep(0.01)
        await client.aclose()
        with pytest.raises(engram.ClientClosedError) as caught:
            await waiting
        assert caught.value.applied is False

    play(body)


# Any order of faults


class Unsteady(FakePeer):
    """Refuses rows, or applies them and says that it does not know, or is cut off, as its die falls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.die = random.Random(seed)
        self.calm = False
        self.faults.rows = self._refused

    def _refused(self, names: list[str], seqs: np.ndarray) -> dict[int, error_pb2.ErrorDetail]:
        kinds = ((8, "QUEUE_FULL", "no"), (4, "DEADLINE_EXCEEDED", "no"), (14, "STORE_UNAVAILABLE", "unknown"))
        refused = {}
        for i in range(len(names)):
            if not self.calm and self.die.random() < 0.2:
                code, reason, applied = self.die.choice(kinds)
                refused[i] = error_pb2.ErrorDetail(
                    code=code, reason=reason, message="so", metadata={"applied": applied}
                )
        return refused

    def _steps(self, frame: stream_pb2.StepsFrame, names: list[str]) -> list[stream_pb2.StreamResponse]:
        answers = super()._steps(frame, names)
        if self.calm or self.die.random() > 0.3:
            return answers
        if self.die.random() < 0.5:
            self.faults.cut_after_frames = 0
            return answers
        told = []
        for answer in answers:
            if answer.WhichOneof("frame") == "outputs":
                away = error_pb2.ErrorDetail(
                    code=14, reason="STORE_UNAVAILABLE", message="so", metadata={"applied": "unknown"}
                )
                indexes = bytes(len(answer.outputs.handles))
                lost = stream_pb2.ErrorsFrame(
                    handles=answer.outputs.handles, seqs=answer.outputs.seqs, error_indexes=indexes, errors=[away]
                )
                told.append(stream_pb2.StreamResponse(errors=lost))
            else:
                told.append(answer)
        return told


@pytest.mark.parametrize("interval", [False, True], ids=["step", "interval"])
def test_any_order_of_faults(interval: bool) -> None:
    """Calls one after the other and beside each other, of which many fail: what was applied is what was answered, and what an
    error says was applied, each once and in the order of the calls."""

    async def one(seed: int) -> None:
        peer, die = Unsteady(seed), random.Random(-seed)
        peer.delay_s = 0.005
        options = replace(OPTIONS, reconnect_timeout_s=3.0)
        async with engram.AsyncClient(f"127.0.0.1:{await peer.start()}", options) as client:
            session = await client.open("count", "a", durability="interval" if interval else "step")
            calls: list[tuple[list[float], engram.EngramError | None]] = []
            value = 0.0

            async def call(values: list[float]) -> None:
                place = len(calls)
                calls.append((values, None))
                timeout = die.choice((0.01, 0.03, 0.1, 5.0))
                try:
                    if len(values) == 1:
                        await session.step(row(values[0]), timeout=timeout)
                    else:
                        await session.run(np.stack([row(one) for one in values]), timeout=timeout)
                except engram.EngramError as error:
                    calls[place] = (values, error)

            for _ in range(40):
                failed = calls and calls[-1][1] is not None
                if failed and len(calls[-1][0]) == 1 and die.random() < 0.5:
                    await call(calls[-1][0])  # the repeat
                elif die.random() < 0.2:
                    await call([value + i for i in range(3)])
                else:
                    beside = die.choice((1, 1, 2, 4))
                    await asyncio.gather(*(call([value + i]) for i in range(beside)))
                value += 4
            peer.calm = True
            settled = await session.settle()
            expected: list[float] = []
            history = peer.records["a"].inputs
            for values, error in calls:
                done = len(values) if error is None else int(error.metadata.get("row", 0)) if len(values) > 1 else 0
                expected += values[:done]
                if error is not None:
                    assert error.applied is not None, f"seed {seed}: {error!r} is open"
                    while (
                        error.applied
                        and done < len(values)
                        and history[len(expected) : len(expected) + 1] == [values[done]]
                    ):
                        expected.append(values[done])
                        done += 1
            assert history == expected, f"seed {seed}"
            assert session.seq == settled.seq == len(history)
        await peer.stop()

    async def main() -> None:
        await asyncio.gather(*map(one, range(1, 13)))

    asyncio.run(asyncio.wait_for(main(), 60))


# Replay


def replay_calls(steps: int, waves_in_runs: bool) -> int:
    """How many calls the SDK makes to replay so many steps, of which each was a frame of its own or many were one."""
    counted = 0
    here = pathlib.Path(engram.__file__).parent

    def count(frame: types.FrameType, event: str, arg: object) -> None:
        nonlocal counted
        if event.endswith("call") and pathlib.PurePath(frame.f_code.co_filename).parent == here:
            counted += 1

    async def body(peer: FakePeer, wire: Wire, client: engram.AsyncClient) -> None:
        session = await client.open("count", "a", durability="interval")
        X = np.arange(1, steps + 1, dtype=np.float32)[:, None].repeat(WIDTH, 1)
        if waves_in_runs:
            await session.run(X)
        else:
            for x in X:
                await session.step(x)
        peer.faults.forget_on_connect = lambda name, seq: 0
        sys.setprofile(count)
        peer.faults.cut_after_frames = 0
        assert (await session.step(row(0)))[0] == steps
        sys.setprofile(None)
        assert peer.records["a"].inputs == [*X[:, 0].tolist(), 0]

    play(body, dataclasses.replace(OPTIONS, reconnect_timeout_s=30.0))  # under a profile everything takes long
    return counted


@pytest.mark.parametrize("waves_in_runs", [False, True], ids=["steps", "runs"])
def test_replay_grows_with_the_log_and_no_faster(waves_in_runs: bool) -> None:
    few, many = (replay_calls(steps, waves_in_runs) for steps in (250, 1000))
    assert many < 5 * few, f"{few} calls for 250 steps, {many} for 1,000"
