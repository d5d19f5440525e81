"""An event loop in a thread of its own, for the blocking client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from engram._errors import ClientClosedError
from engram._poller import check, mark

_T = TypeVar("_T")

_END_S = 0.5


class LoopThread:
    """A daemon: it ends with the program."""

    def __init__(self) -> None:
        self._mark = mark()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engram-client", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs it there; its result here. Interrupting the wait cancels the work."""
        if not self._thread.is_alive():
            work.close()
            check(self._mark)
            raise ClientClosedError("the client was closed", reason="CLIENT_CLOSED")
        # Held until the work has ended. A bare lock, which Ctrl-C leaves whole: raised inside a Future's condition, it may
        # leave that locked for ever.
        under_way = threading.Lock()
        under_way.acquire()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(ended)

        def ended(task: asyncio.Task[_T]) -> None:
            if not task.cancelled():
                task.exception()  # looked at, also where an interrupted caller does not
            under_way.release()

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            under_way.acquire()
        except BaseException:
            self._loop.call_soon_threadsafe(cancel)
            raise
        return tasks[0].result()

    def iterate(self, items: AsyncIterator[_T]) -> Iterator[_T]:
        """The items, one by one as they are asked for."""
        end = object()
        running: list[asyncio.Task[Any]] = []

        async def following() -> Any:
            task = asyncio.current_task()
            assert task is not None  # a coroutine runs in one
            running[:] = [task]
            return await anext(items, end)

        async def ending() -> None:
            # An interrupted wait leaves the step towards the next item to be cancelled first.
            for task in running:
                task.cancel()
                await asyncio.wait([task])
            if isinstance(items, AsyncGenerator):
                await items.aclose()

        try:
            while (item := self.wait(following())) is not end:
                yield item
        finally:
            if self._thread.is_alive():
                self.wait(ending())

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in a process from which this one was forked."""
        return self._mark != mark()

    def stop(self) -> None:
        """Ends what still runs there, gRPC's own tasks with it, and the thread."""
        if self._thread.is_alive():
            self.wait(_end_tasks())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _end_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_END_S)  # gRPC's tasks end by themselves once a call has its status
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
