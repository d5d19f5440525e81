"""Inputs from any iterable, without keeping the event loop waiting for it. Used by Session.stream.

An item is the caller's until it is taken, and may be one buffer that is filled again and again: so it is turned into what
is sent in the same breath, where it was read, before the source is asked for the next one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from typing import Any, TypeVar

_AHEAD = 1  # items read from a plain iterable before they are asked for

_T = TypeVar("_T")


async def inputs_of(source: Iterable[Any] | AsyncIterable[Any], take: Callable[[Any], _T]) -> AsyncGenerator[_T]:
    """The source's items as they come, each as `take` makes it. A plain iterable that is no list or array is read in a thread
    of its own: it may block, as a file or a queue does."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield take(item)
    elif hasattr(source, "__len__"):
        for item in source:
            yield take(item)
    else:
        async for taken in _pumped(source, take):
            yield taken


async def _pumped(source: Iterable[Any], take: Callable[[Any], _T]) -> AsyncGenerator[_T]:
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    room = threading.Semaphore(_AHEAD)
    stopped = threading.Event()

    def put(kind: str, item: Any) -> None:
        if not stopped.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(items.put_nowait, (kind, item))

    def pump() -> None:
        try:
            items_left = iter(source)
            end = object()
            while room.acquire() and not stopped.is_set():
                item = next(items_left, end)
                if item is end:
                    put("end", None)
                    return
                put("item", take(item))
        except BaseException as error:  # handed to the reader, whatever it is
            put("error", error)

    # A daemon: a source that blocks for ever must not keep the program from ending.
    threading.Thread(target=pump, name="engram-source", daemon=True).start()
    try:
        while True:
            kind, item = await items.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
