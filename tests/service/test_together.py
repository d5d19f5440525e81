"""Calls of the store that many ask for at once are made as one: each gets its own answers, and nobody waits for who has given up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engram.v1 import stream_pb2
from engram_service.errors import UnavailableError
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.together import Together
from engram_service.store import StoreUnavailableError

OPENS = 400


class Work:
    """What is called: it keeps what it was given, and waits where it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.refuses: Callable[[list[int]], Exception | None] = lambda things: None
        self._lock = threading.Lock()

    def __call__(self, things: list[int]) -> list[int]:
        with self._lock:
            self.calls.append(things)
        assert self.goes_on.wait(10)
        if (error := self.refuses(things)) is not None:
            raise error
        return [10 * thing for thing in things]


@pytest.fixture
def work() -> Work:
    return Work()


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20))


async def begun(work: Work, count: int) -> None:
    while len(work.calls) < count:
        await asyncio.sleep(0.001)


async def written_back(deadline: float) -> None:
    pass


def test_who_asks_in_one_round_asks_together_and_gets_his_own(work: Work) -> None:
    async def body() -> None:
        together = Together(work)
        asked: list[Sequence[int]] = [[1], [2, 3], [], [4]]
        assert await asyncio.gather(*map(together.ask, asked)) == [[10], [20, 30], [], [40]]
        assert work.calls == [[1, 2, 3, 4]]
        assert await together.alone([5]) == [50]

    run(body)


def test_what_is_asked_for_meanwhile_goes_together_and_so_many_at_a_time(work: Work) -> None:
    async def body() -> None:
        together = Together(work)
        work.goes_on.clear()
        first = []
        for number in range(2):  # as many calls as may be under way
            first.append(asyncio.create_task(together.ask([number])))
            await begun(work, number + 1)
        others = [asyncio.create_task(together.ask([number, number])) for number in range(2, 102)]
        await asyncio.sleep(0.05)
        assert len(work.calls) == 2
        work.goes_on.set()
        assert await asyncio.gather(*first, *others) == [[0], [10]] + [[10 * n] * 2 for n in range(2, 102)]
        assert [len(things) for things in work.calls[2:]] == [32] * 6 + [8]
        assert sorted(thing for things in work.calls for thing in things)[2:] == [
            n for n in range(2, 102) for _ in range(2)
        ]

    run(body)


def test_more_than_fits_goes_in_a_call_of_its_own(work: Work) -> None:
    async def body() -> None:
        together = Together(work)
        many = list(range(100))
        answers = await asyncio.gather(together.ask([1]), together.ask(many), together.ask([2]))
        assert answers == [[10], [10 * n for n in many], [20]]
        assert sorted(map(len, work.calls)) == [1, 1, 100]

    run(body)


def test_who_has_given_up_is_left_out_and_disturbs_nobody(work: Work) -> None:
    async def body() -> None:
        together = Together(work)
        work.goes_on.clear()
        tasks = [asyncio.create_task(together.ask([number])) for number in range(3)]
        await begun(work, 1)
        tasks.append(asyncio.create_task(together.ask([3])))
        await begun(work, 2)
        tasks += [asyncio.create_task(together.ask([number])) for number in range(4, 8)]
        await asyncio.sleep(0.02)
        for number in (1, 4, 5, 6):  # the first one's call is under way, those of the others are not
            tasks[number].cancel()
        work.goes_on.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        gone = {n for n, answer in enumerate(answers) if isinstance(answer, asyncio.CancelledError)}
        assert gone == {1, 4, 5, 6} and [answers[n] for n in (0, 2, 3, 7)] == [[0], [20], [30], [70]]
        assert work.calls == [[0, 1, 2], [3], [7]]

    run(body)


def test_what_a_call_raises_is_told_to_all_who_asked_in_it(work: Work) -> None:
    async def body() -> None:
        together = Together(work)
        work.refuses = lambda things: ValueError("no") if 1 in things else None
        answers = await asyncio.gather(together.ask([1]), together.ask([2]), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["no", "no"]
        assert await together.ask([2]) == [20]

    run(body)


def test_a_pool_that_is_shut_down_keeps_nobody_waiting(work: Work) -> None:
    async def body() -> None:
        pool = ThreadPoolExecutor(1)
        together = Together(work, pool)
        work.goes_on.clear()
        tasks = [asyncio.create_task(together.ask([0]))]
        await begun(work, 1)
        tasks.append(asyncio.create_task(together.ask([1])))  # waits for the thread
        await asyncio.sleep(0.02)
        tasks.append(asyncio.create_task(together.ask([2])))  # waits for a call
        await asyncio.sleep(0.02)
        pool.shutdown(wait=False, cancel_futures=True)
        work.goes_on.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers[0] == [0]
        assert isinstance(answers[1], asyncio.CancelledError) and isinstance(answers[2], RuntimeError)

    run(body)


@pytest.mark.parametrize("everybodys", [True, False])
def test_each_asks_again_until_his_own_deadline(work: Work, everybodys: bool) -> None:
    async def body() -> None:
        together, calls = Together(work), StoreCalls(written_back)
        work.refuses = lambda things: StoreUnavailableError("away", everybodys)
        began = time.monotonic()
        late = asyncio.create_task(calls.together(began + 5, together, [1]))
        with pytest.raises(UnavailableError):
            await calls.together(began + 0.25, together, [2])
        assert 0.1 < time.monotonic() - began < 2
        work.refuses = lambda things: None
        assert await late == [10]
        assert sorted(work.calls[0]) == [1, 2]

    run(body)


def test_who_was_refused_for_what_may_be_anothers_reason_asks_alone(work: Work) -> None:
    async def body() -> None:
        together, calls = Together(work), StoreCalls(written_back)
        work.refuses = lambda things: StoreUnavailableError("TRYAGAIN", False) if 1 in things else None
        deadline = time.monotonic() + 1
        asked = [calls.together(deadline, together, [number]) for number in range(4)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[1], UnavailableError) and answers[::2] + answers[3:] == [[0], [20], [30]]
        assert work.calls[0] == [0, 1, 2, 3] and all(len(things) == 1 for things in work.calls[1:])

    run(body)


def test_a_store_that_is_away_is_asked_together(work: Work) -> None:
    async def body() -> None:
        together, calls = Together(work), StoreCalls(written_back)
        work.refuses = lambda things: StoreUnavailableError("away", True) if len(work.calls) < 3 else None
        asked = [calls.together(time.monotonic() + 5, together, [number]) for number in range(20)]
        assert await asyncio.gather(*asked) == [[10 * number] for number in range(20)]
        assert len(work.calls) < 9, work.calls

    run(body)


def test_opens_and_closes_at_once_are_few_calls_of_the_store(
    server_with: Callable[..., Any], redis_process: Any, connect: Callable[..., Any]
) -> None:
    with server_with("--redis-url", redis_process.url) as server:
        raws = [connect(server) for _ in range(4)]
        raws[0].open("first")
        redis_process.client.config_resetstat()
        for number in range(OPENS):
            frame = stream_pb2.OpenFrame(request_id=number, model="digits-reader", session_ids=[f"s-{number}"])
            raws[number % 4].send(open=frame)
        opened = [raws[number % 4].next("opened") for number in range(OPENS)]
        assert not any(one.errors for one in opened) and all(one.created == b"\1" for one in opened)
        counted = redis_process.client.info("commandstats")
        # Each call counts before its claims and behind them.
        assert counted["cmdstat_evalsha"]["calls"] == OPENS and counted["cmdstat_incrby"]["calls"] < OPENS
        redis_process.client.config_resetstat()
        for number, one in enumerate(opened):
            raws[number % 4].send(close=stream_pb2.CloseFrame(request_id=number, handles=one.handles))
        assert not any(raws[number % 4].next("closed").errors for number in range(OPENS))
        counted = redis_process.client.info("commandstats")
        assert counted["cmdstat_evalsha"]["calls"] == OPENS and counted["cmdstat_incrby"]["calls"] < OPENS / 2


def test_opens_at_once_of_the_same_sessions_leave_them_to_one(
    server_with: Callable[..., Any], redis_process: Any, connect: Callable[..., Any]
) -> None:
    """The newest open of each wins, though they go together: of a session one claim at a time is under way."""
    names, inputs = [f"s-{number}" for number in range(10)], np.zeros((1, 8), np.float32)
    with server_with("--redis-url", redis_process.url) as server:
        raws = [connect(server) for _ in range(6)]
        for number, name in enumerate(names):
            for raw in raws:
                frame = stream_pb2.OpenFrame(request_id=number, model="digits-reader", session_ids=[name], client_id=5)
                raw.send(open=frame)
        mine = [{(one := raw.next("opened")).request_id: one for _ in names} for raw in raws]
        owners = []
        for number in range(len(names)):
            handles = [int(np.frombuffer(of[number].handles, np.uint32)[0]) for of in mine]
            assert not any(of[number].errors for of in mine)
            taken = 0
            for place, (raw, handle) in enumerate(zip(raws, handles, strict=True)):
                raw.steps([handle], [1], inputs)
                response = raw.next()
                while response.WhichOneof("frame") not in ("errors", "outputs"):
                    response = raw.next()
                if response.WhichOneof("frame") == "outputs":
                    owners.append(place)
                else:
                    assert response.errors.errors[0].reason == "TAKEN_OVER"
                    taken += 1
            assert taken == len(raws) - 1, number
        assert len(owners) == len(names)
