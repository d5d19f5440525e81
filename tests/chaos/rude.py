"""Streams that end as the SDK ends none: half-closed with steps in flight, or cancelled with an open, steps, a close or a detach under way.

A client has some sessions for it, each stepped on a stream of its own making. Where it is found by the next open settles what was
open. Used by client.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from chaos.histories import ANSWER, ASKED, CLOSING, MODEL, OPENED, Writer, inputs, name_of, rows
from chaos.wire import VOID, Broken, Wire, wire_to
from engram.v1 import stream_pb2

SESSIONS = 4
BRANCH = 1  # of all of them, in every life
_PATIENCE_S = 90.0
_FRAMES_MAX, _STEPS_MAX = 4, 8  # of an act; a frame has so many steps of each session


class Rude:
    """One act at a time."""

    def __init__(self, addresses: Sequence[str], first: int, writer: Writer, draws: random.Random) -> None:
        self._addresses = addresses
        self._numbers = np.arange(first, first + SESSIONS)
        self._writer = writer
        self._random = draws
        self._client_id = draws.getrandbits(63) | 1
        self._turn = asyncio.Lock()

    async def half_close(self) -> None:
        """What was sent before the half-close is answered before the stream ends in order."""
        await self._insist(self._half_close)

    async def cancel(self) -> None:
        await self._insist(self._cancel)

    async def _insist(self, act: Any) -> None:
        async with self._turn:
            deadline = time.monotonic() + _PATIENCE_S
            while True:
                try:
                    async with wire_to(self._random.choice(self._addresses), life_s=_PATIENCE_S) as wire:
                        try:
                            await act(wire)
                        finally:
                            await wire.gone()
                            self._note(wire)
                    return
                except (Broken, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                    if time.monotonic() > deadline:
                        raise AssertionError(f"{act.__name__} cannot be done: {error!r}") from error
                    await asyncio.sleep(0.1)

    def _note(self, wire: Wire) -> None:
        """Writes down what was answered by the time that the stream is gone."""
        for handle, seq, y in wire.outputs:
            self._write(ANSWER, wire.numbers[handle], seq, output=y)

    async def _half_close(self, wire: Wire) -> None:
        await self._steps(wire, *await self._open(wire))
        if await wire.half_close() and not wire.draining:
            assert not wire.unanswered, f"a half-closed stream ended with {len(wire.unanswered)} steps unanswered"

    async def _cancel(self, wire: Wire) -> None:
        what = self._random.choice(("open", "steps", "close", "detach"))
        if what == "open":
            await wire.ask(open=self._open_frame())
        else:
            handles, seqs = await self._open(wire)
            await self._steps(wire, handles, seqs)
            if what != "steps":
                if what == "close":
                    self._write(CLOSING, self._numbers, 0)
                await wire.ask(close=stream_pb2.CloseFrame(handles=handles.tobytes(), detach=what == "detach"))
        await asyncio.sleep(self._random.random() ** 2 * 0.02)
        wire.cancel()

    def _open_frame(self) -> stream_pb2.OpenFrame:
        ids = [f"{name_of(number)}-rude" for number in self._numbers.tolist()]
        return stream_pb2.OpenFrame(model=MODEL, session_ids=ids, client_id=self._client_id, confirms=True)

    async def _open(self, wire: Wire) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        opened = (await (await wire.ask(open=self._open_frame()))).opened
        handles, seqs = np.frombuffer(opened.handles, "<u4"), np.frombuffer(opened.seqs, "<u8").astype(np.int64)
        good = handles != VOID
        self._write(OPENED, self._numbers[good], seqs[good])
        if not good.all():
            raise Broken(f"an open was refused: {opened.errors[0].error.reason}: {opened.errors[0].error.message}")
        wire.numbers = dict(zip(handles.tolist(), self._numbers.tolist(), strict=True))
        return handles, seqs

    async def _steps(self, wire: Wire, handles: NDArray[np.uint32], seqs: NDArray[np.int64]) -> None:
        last = seqs.copy()
        for _ in range(self._random.randint(1, _FRAMES_MAX)):
            count = self._random.randint(1, _STEPS_MAX)
            steps = (last[:, None] + np.arange(1, count + 1)).ravel()
            last += count
            self._write(ASKED, self._numbers, last)
            numbers = self._numbers.repeat(count)
            await wire.step(handles.repeat(count), steps, inputs(numbers, steps), seqs.repeat(count))

    def _write(self, kind: int, numbers: Any, seqs: Any, **columns: Any) -> None:
        self._writer.add(rows(kind, numbers, seqs, branch=BRANCH, **columns))
