"""The stream to a server, kept up: connects, attaches, reads, writes, and starts anew when the stream is lost.

_connected.py makes one. All logic of steps is in _core.py; here is only what waits for the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import TypeVar

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from engram._answers import FrameError
from engram._core import Core
from engram._errors import (
    RETRYABLE,
    AccessDeniedError,
    ClientClosedError,
    DeadlineExceededError,
    EngramError,
    InvalidInputError,
    UnavailableError,
    UnsupportedError,
    of_detail,
)
from engram._options import ClientOptions
from engram._poller import enter, leave, mark
from engram._rpc import StreamCall, call_unary, let_in, open_channel, open_stream
from engram._status import of_rpc_error
from engram.v1 import stream_pb2

_ATTACH_ROWS = 256  # sessions in one AttachFrame: while Redis claims some, the server reads the next
_OUTAGE_CHECK_S = 0.1
_HOPELESS = (AccessDeniedError, InvalidInputError, UnsupportedError)
_HINT_S = 1.0
_DRAIN_S = 30.0  # a server that drains ends the stream itself; one that does not is left after so long

_Response = TypeVar("_Response", bound=Message)


class StreamLostError(Exception):
    """The stream ended while a request was waiting for its answer."""


class Link:
    """One client's connection. `addresses` are tried in turn, from the one that worked last; before them, once, the address
    that the server itself gave."""

    def __init__(self, addresses: Sequence[str], options: ClientOptions, client_id: int, base: int) -> None:
        enter(self)
        self.mark = mark()
        self.options = options
        self.client_id = client_id
        self.loop = asyncio.get_running_loop()
        self.core = Core(options, base, self.loop, self._wake, self._on_draining, self._attach_again)
        self._addresses = list(addresses)
        self._turn = 0
        self._known_as = ""  # where the server of the last stream said that it can be found
        self._channel: grpc.aio.Channel | None = None
        self._control: list[stream_pb2.StreamRequest] = []
        self._requests: dict[int, asyncio.Future[stream_pb2.StreamResponse]] = {}
        self._request_id = 0
        self._posted = asyncio.Event()
        self._up = asyncio.Event()  # connected, and every session that could be is attached
        self._draining = False
        self._ever_up = False
        self._down_since = self.loop.time()
        self._trouble: EngramError | None = None
        self._closing = False
        self._again: set[asyncio.Task[None]] = set()  # attaches of sessions that were said to be another's
        self._tasks = [asyncio.create_task(self._keep_up()), asyncio.create_task(self._tend())]

    # For the client

    async def up(self) -> None:
        """Returns when there is a stream. Raises UnavailableError when there has been none for too long."""
        waiting_since = self.loop.time()
        while not self._up.is_set():
            if self._closing:
                raise ClientClosedError("the client is closed", reason="CLIENT_CLOSED")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OUTAGE_CHECK_S):
                    await self._up.wait()
            if not self._up.is_set() and self.loop.time() - max(waiting_since, self._down_since) >= self._patience():
                raise self._given_up()

    async def request(self, frame: stream_pb2.StreamRequest) -> stream_pb2.StreamResponse:
        """Sends an open, attach or close frame; its answer. Raises StreamLostError."""
        self._request_id += 1
        body = getattr(frame, frame.WhichOneof("frame") or "")
        body.request_id = self._request_id
        future: asyncio.Future[stream_pb2.StreamResponse] = self.loop.create_future()
        self._requests[self._request_id] = future
        self._send(frame)
        try:
            return await future
        finally:
            self._requests.pop(body.request_id, None)

    async def unary(
        self, method: str, request: Message, response_type: type[_Response], timeout_s: float | None
    ) -> _Response:
        """A unary call, tried again while the server or its store is away. Raises EngramError."""
        deadline = None if timeout_s is None else self.loop.time() + timeout_s
        attempt = 0
        while True:
            await self.up()
            channel = self._channel
            left = None if deadline is None else max(0.001, deadline - self.loop.time())
            try:
                if channel is None:
                    continue
                return await call_unary(channel, method, request, response_type, left, self.options)
            except grpc.aio.AioRpcError as failure:
                error = of_rpc_error(failure)
            except (grpc.aio.UsageError, asyncio.InvalidStateError):
                error = UnavailableError("the connection was lost", reason="CONNECTION_LOST")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # It was the call that was cancelled: its channel was closed because the stream was lost.
                error = UnavailableError("the connection was lost", reason="CONNECTION_LOST")
            wait = error.retry_after or self._backoff(attempt)
            attempt += 1
            if error.code not in RETRYABLE or (deadline is not None and self.loop.time() + wait >= deadline):
                raise error
            await asyncio.sleep(wait)

    async def close(self) -> None:
        """Ends the stream in order, and every call that still waits with ClientClosedError."""
        self._closing = True
        ending = [*self._tasks, *self._again]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        # They hold what they waited for, and with it gRPC's poller, which a fork must not find at work.
        self._tasks, self._trouble = [], None
        leave(self)
        self.core.fail_waiting(ClientClosedError("the client was closed", reason="CLIENT_CLOSED"), 0.0, 0.0)

    # Keeping it up

    async def _keep_up(self) -> None:
        attempt = 0
        while True:
            hint, self._known_as = self._known_as, ""
            address = hint or self._addresses[self._turn % len(self._addresses)]
            was_up = False
            try:
                await self._one_stream(address, _HINT_S if hint else self.options.attempt_timeout_s)
            except grpc.aio.AioRpcError as failure:
                self._trouble = self._renewable(of_rpc_error(failure))
            except EngramError as failure:
                self._trouble = failure
            except (
                FrameError,
                StreamLostError,
                TimeoutError,
                grpc.aio.UsageError,
                asyncio.InvalidStateError,
            ) as failure:
                self._trouble = UnavailableError(
                    f"the stream to {address} was given up: {failure}", reason="CONNECTION_LOST"
                )
            finally:
                was_up = self._up.is_set()
                self._mark_down()
            if was_up:
                attempt = 0
            drained, self._draining = self._draining, False
            if drained:
                self._known_as = ""
            if self._known_as or hint:
                continue  # once, without a wait; then the addresses have their turns
            if not was_up or drained:
                self._turn += 1
            # A connection that was lost is looked for at every address before the first wait.
            rounds, rest = divmod(attempt, len(self._addresses))
            if rest == 0 and (attempt or len(self._addresses) == 1):
                await asyncio.sleep(self._backoff(rounds))
            attempt += 1

    async def _one_stream(self, address: str, timeout_s: float) -> None:
        """Connects, in time, and serves; returns or raises when the stream is over."""
        channel = open_channel(address, self.options)
        tasks: list[asyncio.Task[None]] = []
        attaching: asyncio.Task[None] | None = None
        call: StreamCall | None = None
        try:
            call = open_stream(channel, self.options)
            async with asyncio.timeout(timeout_s):
                told = await let_in(call)
            if told is None:
                raise StreamLostError("the server ended it at once")
            tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]
            attaching = asyncio.create_task(self._attach_all())
            done, _ = await asyncio.wait([*tasks, attaching], return_when=asyncio.FIRST_COMPLETED)
            if attaching in done:
                attaching.result()
                self._channel = channel
                self._ever_up = True
                if self.options.follow and told not in self._addresses and self.options.may_go_to(told):
                    self._known_as = told
                self._up.set()
            else:
                tasks.append(attaching)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.cancelled():
                    raise StreamLostError("its channel was closed")
                if task.done():
                    task.result()
        finally:
            ending = [*tasks, *([attaching] if attaching is not None else [])]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            if call is not None:
                call.cancel()
            await channel.close()

    def _mark_down(self) -> None:
        if self._up.is_set():
            self._down_since = self.loop.time()
        self._up.clear()
        self._channel = None
        self._control.clear()
        self.core.lost()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(StreamLostError("the stream ended"))
        self._requests.clear()

    async def _read(self, call: StreamCall) -> None:
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                return  # in order; `read` raises where the status says otherwise
            assert isinstance(response, stream_pb2.StreamResponse)  # what else `read` returns
            kind = response.WhichOneof("frame")
            if kind in ("opened", "closed"):
                future = self._requests.get(getattr(response, kind).request_id)
                if future is not None and not future.done():
                    future.set_result(response)
            elif kind == "confirm":
                self._send(stream_pb2.StreamRequest(confirm=response.confirm))
            else:
                self.core.receive(response)

    async def _write(self, call: StreamCall) -> None:
        """Whatever became ready while the last frame was written goes as the next one: no timers."""
        core = self.core
        while True:
            await self._posted.wait()
            self._posted.clear()
            while self._control or (core.pending and not self._draining):
                while self._control:
                    await call.write(self._control.pop(0))
                if not self._draining:
                    frames = core.frames()
                    if not frames:
                        break
                    for frame in frames:
                        await call.write(frame)

    def _send(self, frame: stream_pb2.StreamRequest) -> None:
        """Before any steps that wait."""
        self._control.append(frame)
        self._posted.set()

    def _wake(self) -> None:
        self._posted.set()

    def _on_draining(self) -> None:
        self._draining = True

    async def _tend(self) -> None:
        """Now and then: acknowledges for idle sessions; ends calls that have waited too long for a connection."""
        last_ack = draining_since = self.loop.time()
        while True:
            await asyncio.sleep(_OUTAGE_CHECK_S)
            now = self.loop.time()
            self.core.expire()
            if not self._up.is_set():
                self.core.fail_waiting(self._given_up(), self._down_since, self._patience())
            elif now - last_ack >= self.options.acknowledge_idle_s:
                last_ack = now
                frame = self.core.idle_acknowledgements()
                if frame is not None and not self._draining:
                    self._send(frame)
            if not self._draining:
                draining_since = now
            elif now - draining_since > _DRAIN_S and self._channel is not None:
                await self._channel.close()

    def _patience(self) -> float:
        if isinstance(self._trouble, _HOPELESS):
            return 0.0  # no use in waiting
        return self.options.reconnect_timeout_s if self._ever_up else self.options.connect_timeout_s

    def _given_up(self) -> EngramError:
        if isinstance(self._trouble, _HOPELESS):
            return self._trouble.copy()
        where = ", ".join(self._addresses)
        why = f": {self._trouble.message}" if self._trouble is not None else ""
        return UnavailableError(
            f"no connection to {where} within {self._patience():g} s{why}", reason="CONNECTION_LOST"
        )

    def _renewable(self, error: EngramError) -> EngramError:
        """A stream that was up was put out: the token may have been replaced meanwhile, so it is tried once more."""
        if isinstance(error, AccessDeniedError) and self._up.is_set():
            return UnavailableError(error.message, reason=error.reason)
        return error

    def _backoff(self, attempt: int) -> float:
        wait = min(self.options.backoff_max_s, self.options.backoff_initial_s * 2.0 ** min(attempt, 16))
        return wait * random.uniform(0.5, 1.0)

    # Attaching

    async def _attach_all(self) -> None:
        """Carries the sessions on, in bulk, on the new stream."""
        table = self.core.table
        await self._attach_many(np.array(sorted(slot for slot in table.ids if not table.lost[slot]), np.int64))

    def _attach_again(self, slots: NDArray[np.int64]) -> None:
        """On this stream, while others go on; if it ends first, the next one attaches all."""

        async def attach() -> None:
            with contextlib.suppress(StreamLostError):
                await self._attach_many(slots)

        task = asyncio.create_task(attach())
        self._again.add(task)
        task.add_done_callback(self._again.discard)

    async def _attach_many(self, slots: NDArray[np.int64]) -> None:
        table = self.core.table
        pieces: list[NDArray[np.int64]] = []
        for model in np.unique(table.model[slots]).tolist():
            mine = slots[table.model[slots] == model]
            pieces += [mine[start : start + _ATTACH_ROWS] for start in range(0, len(mine), _ATTACH_ROWS)]
        await asyncio.gather(*(self._attach(piece) for piece in pieces))

    async def _attach(self, slots: NDArray[np.int64]) -> None:
        """Attaches sessions of one model; rows that the server cannot take just now are tried again beside."""
        table = self.core.table
        link = self.core.models[int(table.model[slots[0]])]
        attempt = 0
        ids = {slot: table.ids[slot] for slot in slots.tolist()}
        while len(slots := slots[~table.lost[slots]]):
            frame = stream_pb2.AttachFrame(
                model=link.info.name,
                version=link.info.version,
                session_ids=[ids[slot] for slot in slots.tolist()],
                durability=stream_pb2.Durability.Name(link.durability),
                client_id=self.client_id,
                ttl_ms=link.ttl_ms,
            )
            opened = (await self.request(stream_pb2.StreamRequest(attach=frame))).opened
            same = np.array([table.ids.get(slot) == ids[slot] for slot in slots.tolist()], np.bool_)
            again, wait = self._attached(slots, same, opened)
            if not len(again):
                return
            await asyncio.sleep(max(wait, self._backoff(attempt)))
            attempt, slots = attempt + 1, again

    def _attached(
        self, slots: NDArray[np.int64], same: NDArray[np.bool_], opened: stream_pb2.OpenedFrame
    ) -> tuple[NDArray[np.int64], float]:
        """Takes the answer in; the slots to try again, and the seconds to wait first. Slots that are not the `same`
        session's any more are left alone."""
        refused = {row.row: of_detail(row.error) for row in opened.errors if same[row.row]}
        table = self.core.table
        good = np.array([row for row in range(len(slots)) if row not in refused and same[row]], np.int64)
        handles, seqs = np.frombuffer(opened.handles, "<u4"), np.frombuffer(opened.seqs, "<i8")
        alive = good[~table.lost[slots[good]]]
        self.core.attached(slots[alive], handles[alive], seqs[alive])
        again: list[int] = []
        wait = 0.0
        for row, error in refused.items():
            if error.code in RETRYABLE or isinstance(error, DeadlineExceededError):
                again.append(int(slots[row]))
                wait = max(wait, error.retry_after or 0.0)
            else:
                self.core.lose(int(slots[row]), error)
        return np.array(again, np.int64), wait
