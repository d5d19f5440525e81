"""Inputs from any iterable, without keeping the event loop waiting for it. Used by Session.stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

from numpy.typing import ArrayLike

_AHEAD = 64  # inputs read from a plain iterable before they are asked for


async def inputs_of(source: Iterable[ArrayLike] | AsyncIterable[ArrayLike]) -> AsyncIterator[ArrayLike]:
    """The source's items as they come. A plain iterable that is no list or array is read in a thread of its own: it may
    block, as a file or a queue does."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    elif hasattr(source, "__len__"):
        for item in source:
            yield item
    else:
        async for item in _pumped(source):
            yield item


async def _pumped(source: Iterable[ArrayLike]) -> AsyncIterator[ArrayLike]:
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    room = threading.Semaphore(_AHEAD)
    stopped = threading.Event()

    def put(kind: str, item: Any) -> None:
        if not stopped.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(items.put_nowait, (kind, item))

    def pump() -> None:
        try:
            for item in source:
                put("item", item)
                room.acquire()
                if stopped.is_set():
                    return
            put("end", None)
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
