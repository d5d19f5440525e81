"""Work that many ask for at once begins a few pieces in each round of the loop, in order, whoever gives up meanwhile."""

from __future__ import annotations

import asyncio

from engram_service.pacing import Pacing


def test_few_begin_in_a_round_and_in_their_order() -> None:
    async def run() -> None:
        pacing, begun, rounds = Pacing(3), list[int](), list[int]()

        async def work(number: int) -> None:
            await pacing.turn()
            begun.append(number)

        tasks = [asyncio.create_task(work(number)) for number in range(20)]
        while not all(task.done() for task in tasks):
            before = len(begun)
            await asyncio.sleep(0)
            rounds.append(len(begun) - before)
        assert begun == list(range(20))
        assert max(rounds) <= 6, "of three that were waiting and three that had just come"
        assert len([count for count in rounds if count]) >= 5

    asyncio.run(run())


def test_who_gives_up_takes_nobodys_turn() -> None:
    async def run() -> None:
        pacing = Pacing(1)
        await pacing.turn()
        waiting = [asyncio.create_task(pacing.turn()) for _ in range(5)]
        await asyncio.sleep(0)
        for task in waiting[:4]:
            task.cancel()
        await asyncio.wait_for(waiting[4], 5)
        await asyncio.wait_for(pacing.turn(), 5)

    asyncio.run(run())


def test_one_alone_does_not_wait() -> None:
    async def run() -> None:
        pacing = Pacing(1)
        for _ in range(3):
            turn = pacing.turn()
            try:
                turn.send(None)
            except StopIteration:
                pass
            else:
                raise AssertionError("it waited")
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(run())
