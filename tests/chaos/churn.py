"""Churn: sessions are opened and let go of by the thousand, many in a frame, most of them by clients that go away in the middle.

What was let go is let go: when all is over the server knows no session, has no row in flight, and the tenant has its whole quota.
Used by test_churn.py and by tools/soak.py --churn.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from chaos.histories import INPUTS, MODEL
from chaos.proxy import Proxy
from chaos.wire import VOID, Broken, Wire, wire_to
from engram.v1 import service_pb2_grpc, session_pb2, stream_pb2
from engram_service.protocols.http.get import get

ENDS = ("close", "detach", "half-closed", "closed twice", "cancelled open", "cancelled steps", "cancelled close",
        "cancelled detach", "broken", "cancelled calls")  # fmt: skip
_REFUSED_S = 10.0  # a tenant that has let everything go is not at its limit for longer
_CALLS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    opens: int  # sessions to be opened, and let go of
    each: int = 100  # of a frame
    rude: int = 3  # streams at a time that end in all ways, beside one that lives on and ends its sessions in order
    quota: int = 2000  # what the tenant may have in use; far more than it has at any time
    over_s: float = 30.0  # after the last, for the server to let go


@dataclass
class Churned:
    """What was done, and what was left of it."""

    opened: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Churn:
    """One server under churn: `http` is where its metrics are, `proxy` what broken streams go through."""

    def __init__(self, plan: Plan, address: str, http: str, proxy: Proxy, proxied: str, token: str, seed: int) -> None:
        self._plan, self._address, self._http, self._proxy, self._proxied = plan, address, http, proxy, proxied
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._random = random.Random(seed)
        self._made = 0
        self.churned = Churned()

    async def run(self, loaded: Callable[[], None] = lambda: None) -> Churned:
        """`loaded` is called when the last session was opened, before what is left is looked at."""
        await asyncio.gather(self._polite(), *(self._rude() for _ in range(self._plan.rude)))
        loaded()
        await self._over()
        await self._quota()
        return self.churned

    @property
    def _done(self) -> bool:
        return self.churned.opened >= self._plan.opens or bool(self.churned.problems)

    # In order

    async def _polite(self) -> None:
        """One stream for all the time. An answer is true: what it closed begins anew, what it detached is still there."""
        async with wire_to(self._address, self._metadata) as wire:
            while not self._done:
                detach = self._random.random() < 0.3
                ids = self._names()
                handles = await self._open(wire, ids)
                await self._step(wire, handles)
                await self._end(wire, handles, detach)
                if self._random.random() < 0.1:
                    opened = await self._opened(wire, ids)
                    created = np.frombuffer(opened.created, "u1")
                    if (created == detach).any():
                        self._problem(f"{int((created == detach).sum())} sessions were answered as ended and were not")
                    handles = np.frombuffer(opened.handles, "<u4")
                    await self._end(wire, handles, detach=False)

    async def _end(self, wire: Wire, handles: NDArray[np.uint32], detach: bool) -> None:
        closed = (await (await wire.ask(close=_ending(handles, detach)))).closed
        if closed.errors:
            self._problem(f"{len(closed.errors)} sessions are not let go of: {closed.errors[0].error.reason}")

    # In all ways

    async def _rude(self) -> None:
        while not self._done:
            end = self._random.choice(ENDS)
            self.churned.ends[end] += 1
            address = self._proxied if end == "broken" else self._address
            try:
                if end == "cancelled calls":
                    await self._calls()
                    continue
                async with wire_to(address, self._metadata) as wire:
                    await self._ended(wire, end)
            except (Broken, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                continue  # a stream that was broken, or whose neighbour was

    async def _ended(self, wire: Wire, end: str) -> None:
        if end == "broken":
            self._proxy.break_after(self._random.randrange(8_000))
        if end == "cancelled open":
            await wire.ask(open=_opening(self._names()))
            await self._moment()
            return
        handles = await self._open(wire, self._names())
        await self._step(wire, handles, wait=end in ("close", "detach"))
        if end == "cancelled steps":
            await self._moment()
            return
        answer = await wire.ask(close=_ending(handles, detach="detach" in end))
        if end in ("close", "detach", "broken"):
            await answer
        elif end == "closed twice":
            await asyncio.gather(answer, await wire.ask(close=_ending(handles, detach=False)))
        elif end == "half-closed":
            await wire.half_close()
        else:
            await self._moment()

    async def _calls(self) -> None:
        """Unary calls whose callers do not wait for the answers: steps, forks, imports of what was exported."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: Any = service_pb2_grpc.EngramServiceStub(channel)
            ids = self._names()[:_CALLS]
            requests = [session_pb2.StepRequest(session_id=one, model=MODEL, inputs=[0.5] * INPUTS) for one in ids]
            await asyncio.gather(*(stub.Step(one, metadata=self._metadata) for one in requests))
            self.churned.opened += len(ids)
            exported = await stub.ExportSession(
                session_pb2.ExportSessionRequest(session_id=ids[0]), metadata=self._metadata
            )
            calls: list[Any] = [
                *(stub.Step(one, metadata=self._metadata) for one in requests),
                *(
                    stub.ForkSession(session_pb2.ForkSessionRequest(session_id=one), metadata=self._metadata)
                    for one in ids
                ),
                stub.ImportSession(
                    session_pb2.ImportSessionRequest(data=exported.data, session_id=f"{ids[0]}-i"),
                    metadata=self._metadata,
                ),
            ]
            await self._moment()
            for call in calls:
                call.cancel()

    async def _moment(self) -> None:
        await asyncio.sleep(self._random.random() ** 2 * 0.01)

    # Frames

    def _names(self) -> list[str]:
        self._made += self._plan.each
        return [f"churn-{number}" for number in range(self._made - self._plan.each, self._made)]

    async def _open(self, wire: Wire, ids: list[str]) -> NDArray[np.uint32]:
        opened = await self._opened(wire, ids)
        return np.frombuffer(opened.handles, "<u4")

    async def _opened(self, wire: Wire, ids: list[str]) -> stream_pb2.OpenedFrame:
        """Opens all of them. A limit that stays reached is a problem: this tenant never has so many."""
        deadline = time.monotonic() + _REFUSED_S
        while True:
            opened = (await (await wire.ask(open=_opening(ids)))).opened
            self.churned.opened += len(ids) - len(opened.errors)
            if not opened.errors:
                return opened
            if time.monotonic() > deadline:
                self._problem(f"an open is refused for {_REFUSED_S:.0f} s: {opened.errors[0].error.message}")
                raise Broken
            await self._end(wire, np.array([h for h in np.frombuffer(opened.handles, "<u4") if h != VOID], "<u4"), True)
            await asyncio.sleep(0.2)

    async def _step(self, wire: Wire, handles: NDArray[np.uint32], wait: bool = True) -> None:
        await wire.step(handles, np.ones(len(handles)), np.full((len(handles), INPUTS), 0.5, np.float32))
        deadline = time.monotonic() + _REFUSED_S
        while wait and wire.unanswered and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        wire.outputs.clear()
        if wait and wire.unanswered:
            self._problem(f"{len(wire.unanswered)} steps have no answer after {_REFUSED_S:.0f} s")

    # Afterwards

    async def _over(self) -> None:
        """The server has let go of everything."""

        async def left() -> dict[str, int]:
            found = await asyncio.to_thread(gauges, self._http)
            return {name: value for name, value in found.items() if value}

        await self._wait(left, "a while after the last client is gone the server still has")

    async def _quota(self) -> None:
        """The whole quota can be used."""
        async with wire_to(self._address, self._metadata) as wire:
            handles: list[NDArray[np.uint32]] = []
            for _ in range(0, self._plan.quota, self._plan.each):
                opened = (await (await wire.ask(open=_opening(self._names())))).opened
                if opened.errors:
                    self._problem(f"of the quota, {len(handles) * self._plan.each} sessions can be used: "
                                  f"{opened.errors[0].error.message}")  # fmt: skip
                    return
                handles.append(np.frombuffer(opened.handles, "<u4"))
            for some in handles:
                await self._end(wire, some, detach=False)

    async def _wait(self, left: Callable[[], Awaitable[dict[str, int]]], what: str) -> None:
        deadline = time.monotonic() + self._plan.over_s
        while found := await left():
            if time.monotonic() > deadline:
                self._problem(f"{what} {found}")
                return
            await asyncio.sleep(0.1)

    def _problem(self, text: str) -> None:
        self.churned.problems.append(text)


def gauges(http: str) -> dict[str, int]:
    """What the server has just now: sessions, rows in flight, streams."""
    lines = [line.split() for line in get(http, "/metrics").splitlines() if line[:1] != "#"]
    names = ("engram_sessions", "engram_rows_in_flight", "engram_streams")
    return {name: int(sum(float(value) for key, value in lines if key.partition("{")[0] == name)) for name in names}


def tokens(token_sha256: str, quota: int) -> str:
    """The tokens file of such a server."""
    return (
        f"[tenants.churn]\nsessions_max = {quota}\n[tokens.churn]\ntenant = \"churn\"\nsha256 = \"{token_sha256}\"\n"
        'rights = ["read", "step", "manage"]\n'
    )  # fmt: skip


def _opening(ids: list[str]) -> stream_pb2.OpenFrame:
    return stream_pb2.OpenFrame(model=MODEL, session_ids=ids, client_id=7)


def _ending(handles: NDArray[np.uint32], detach: bool) -> stream_pb2.CloseFrame:
    return stream_pb2.CloseFrame(handles=handles.tobytes(), detach=detach)
