"""Calls of the store that many ask for at once, made as one: each would cost a thread's turn and round trips of its own. Event loop
only.

What is asked for in one round of the event loop, or while calls are under way, waits for the next call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_THINGS_MAX = 32  # of one call: Redis does other work between two calls, and not within one
_UNDER_WAY_MAX = 2  # a call that hangs does not keep the others waiting


class Together(Generic[T, R]):
    """Calls of one kind, in the order in which they are asked for."""

    def __init__(self, work: Callable[[list[T]], Sequence[R]], pool: Executor | None = None) -> None:
        """`work`, which blocks, returns an answer to each thing that it is given. `pool` has its threads; None: the loop's own."""
        self.work = work
        self._pool = pool
        self._waiting: deque[tuple[Sequence[T], asyncio.Future[list[R]]]] = deque()
        self._under_way = 0
        self._called = False  # _begin is about to run

    async def ask(self, things: Sequence[T]) -> list[R]:
        """The answers to these things, of a call that may be about others too. Raises what that call raises."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[list[R]] = loop.create_future()
        self._waiting.append((things, answered))
        if not self._called and self._under_way < _UNDER_WAY_MAX:
            self._called = True
            loop.call_soon(self._begin)
        return await answered

    async def alone(self, things: Sequence[T]) -> list[R]:
        """The same by a call of their own."""
        return list(await asyncio.get_running_loop().run_in_executor(self._pool, self.work, list(things)))

    def _begin(self) -> None:
        self._called = False
        while self._under_way < _UNDER_WAY_MAX and (some := self._next()):
            things = [thing for asked, _ in some for thing in asked]
            try:
                call = asyncio.get_running_loop().run_in_executor(self._pool, self.work, things)
            except RuntimeError as error:  # the pool was shut down
                _answer(some, error)
                continue
            self._under_way += 1
            call.add_done_callback(partial(self._ended, some))

    def _next(self) -> list[tuple[Sequence[T], asyncio.Future[list[R]]]]:
        """Who is asked for in the next call; whoever has given up is left out."""
        some: list[tuple[Sequence[T], asyncio.Future[list[R]]]] = []
        left = _THINGS_MAX
        while self._waiting and (self._waiting[0][1].done() or not some or len(self._waiting[0][0]) <= left):
            things, answered = self._waiting.popleft()
            if not answered.done():
                some.append((things, answered))
                left -= len(things)
        return some

    def _ended(
        self, some: Sequence[tuple[Sequence[T], asyncio.Future[list[R]]]], call: asyncio.Future[Sequence[R]]
    ) -> None:
        self._under_way -= 1
        self._begin()
        if call.cancelled():
            for _, answered in some:
                answered.cancel()
        elif (error := call.exception()) is not None:
            _answer(some, error)
        else:
            answers, at = call.result(), 0
            for things, answered in some:
                if not answered.done():  # else he has given up
                    answered.set_result(list(answers[at : at + len(things)]))
                at += len(things)


def _answer(some: Sequence[tuple[Any, asyncio.Future[Any]]], error: BaseException) -> None:
    for _, answered in some:
        if not answered.done():
            answered.set_exception(error)
