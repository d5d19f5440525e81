"""Work that many ask for at once begins a few pieces at a time, in the order in which it was asked for. Event loop only."""

from __future__ import annotations

import asyncio
from collections import deque


class Pacing:
    """Lets so many begin in each round of the event loop: asyncio runs all that is ready before it looks at anything else, and
    steps, deadlines and the manager's question whether the loop lives would wait for thousands of opens."""

    def __init__(self, each_round: int) -> None:
        self._each_round = each_round
        self._left = each_round
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop = asyncio.get_running_loop()

    async def turn(self) -> None:
        """Returns when it is one's turn; at once as a rule."""
        if self._left == self._each_round:
            self._loop.call_soon(self._round)
        if self._left:
            self._left -= 1
            return
        turn = self._loop.create_future()
        self._waiting.append(turn)
        await turn

    def _round(self) -> None:
        self._left = self._each_round
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # who waited may be gone
                turn.set_result(None)
                self._left -= 1
        if self._left < self._each_round:
            self._loop.call_soon(self._round)
