"""A stream whose frames are made by hand, which may be ended in any way. Used by rude.py and churn.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from chaos.histories import OUTPUTS
from engram.v1 import service_pb2_grpc, stream_pb2

VOID = 0xFFFFFFFF  # the handle of a session that was not opened
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 300), ("grpc.enable_http_proxy", 0),
)  # fmt: skip


class Broken(Exception):
    """The stream ended before it was ended here, or the server refused."""


class Wire:
    """One stream. `unanswered`: steps sent and neither answered nor refused; `numbers`: for its user, whom a handle names."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._writing = asyncio.Lock()
        self._requests = itertools.count(1)
        self._asked: dict[int, asyncio.Future[stream_pb2.StreamResponse]] = {}
        self.unanswered: set[tuple[int, int]] = set()
        self.outputs: list[tuple[int, int, NDArray[np.float32]]] = []  # handle, seq, output, in the order of arrival
        self.numbers: dict[int, int] = {}
        self.draining = False
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def send(self, **frame: Any) -> None:
        async with self._writing:
            await self._call.write(stream_pb2.StreamRequest(**frame))

    async def ask(self, **frame: Any) -> asyncio.Future[stream_pb2.StreamResponse]:
        """Sends an open or a close; what it returns is answered, or Broken."""
        (body,) = frame.values()
        body.request_id = next(self._requests)
        answer = self._asked[body.request_id] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda one: one.cancelled() or one.exception())  # it may be that nobody waits
        await self.send(**frame)
        return answer

    async def step(
        self, handles: NDArray[Any], seqs: NDArray[Any], X: NDArray[np.float32], acked: NDArray[Any] | None = None
    ) -> None:
        self.unanswered |= set(zip(handles.tolist(), seqs.tolist(), strict=True))
        frame = stream_pb2.StepsFrame(
            handles=handles.astype("<u4").tobytes(), seqs=seqs.astype("<u8").tobytes(), inputs=X.astype("<f4").tobytes(),
            acknowledged_seqs=b"" if acked is None else acked.astype("<u8").tobytes(),
        )  # fmt: skip
        await self.send(steps=frame)

    async def half_close(self) -> bool:
        """No more frames; reads what comes. Whether the stream ended in order."""
        async with self._writing:
            await self._call.done_writing()
        await asyncio.wait([self._reader])
        return bool(await self._call.code() == grpc.StatusCode.OK)

    def cancel(self) -> None:
        self._call.cancel()

    async def gone(self) -> None:
        """Cancelled, if it has not ended; everything that came is known when this returns."""
        self._call.cancel()
        await asyncio.wait([self._reader])

    async def _read(self) -> None:
        try:
            async for response in self._call:
                await self._take(response)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # how it ended, its code says
        finally:
            for answer in [one for one in self._asked.values() if not one.done()]:
                answer.set_exception(Broken("the stream ended before its answer came"))

    async def _take(self, response: stream_pb2.StreamResponse) -> None:
        match response.WhichOneof("frame"):
            case "opened":
                self._asked.pop(response.opened.request_id).set_result(response)
            case "closed":
                self._asked.pop(response.closed.request_id).set_result(response)
            case "confirm":
                await self.send(confirm=response.confirm)
            case "outputs":
                answers = _columns(response.outputs)
                Y = np.frombuffer(response.outputs.outputs, "<f4").reshape(len(answers), OUTPUTS)
                self.outputs += [(*answer, y) for answer, y in zip(answers, Y, strict=True)]
                self.unanswered -= set(answers)
            case "errors":
                self.unanswered -= set(_columns(response.errors))
            case "event":
                self.draining |= response.event.type == stream_pb2.EventFrame.TYPE_DRAINING


def _columns(frame: Any) -> list[tuple[int, int]]:
    handles, seqs = np.frombuffer(frame.handles, "<u4"), np.frombuffer(frame.seqs, "<u8")
    return list(zip(handles.tolist(), seqs.tolist(), strict=True))


@asynccontextmanager
async def wire_to(
    address: str, metadata: Sequence[tuple[str, str]] = (), life_s: float | None = None
) -> AsyncIterator[Wire]:
    """A connection and a stream of its own, which ends after `life_s` in any case."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL) as channel:
        wire = Wire(service_pb2_grpc.EngramServiceStub(channel).Stream(timeout=life_s, metadata=tuple(metadata)))
        try:
            yield wire
        finally:
            await wire.gone()
