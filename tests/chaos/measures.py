"""Measured scenarios: how long clients wait when one thing dies under a thousand busy sessions, and what failovers lose.

Client, servers and Redis share one machine; times are seconds or milliseconds as the names say, from the moment of the signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import engram
from chaos.fleet import Fleet, World
from chaos.histories import MODEL, inputs, name_of

if TYPE_CHECKING:
    from chaos.campaign import Campaign

SESSIONS = 1000
GROUPS = 4
ROUNDS = 3
_WARM_STEPS = 3
_ONE_BY_ONE = 200
_OPTIONS = engram.ClientOptions(timeout_s=60.0, backoff_max_s=0.2)


class Busy:
    """Sessions that are stepped all the time, in groups; knows when each group was last answered."""

    def __init__(self, client: engram.AsyncClient, sessions: list[engram.Session], timeout_s: float = 60.0) -> None:
        self._client, self._sessions, self._timeout_s = client, sessions, timeout_s
        self.gap_max_s = 0.0
        self.errors: list[str] = []
        self.steps = 0
        self._stopping = False

    async def run(self) -> None:
        numbers = np.arange(len(self._sessions))
        await asyncio.gather(*(self._group(part) for part in np.array_split(numbers, GROUPS)))

    def stop(self) -> None:
        self._stopping = True

    async def _group(self, numbers: NDArray[Any]) -> None:
        sessions = [self._sessions[n] for n in numbers]
        last = time.monotonic()
        while not self._stopping:
            seqs = np.array([session.seq for session in sessions])
            try:
                await self._client.step_many(sessions, inputs(numbers, seqs + 1), timeout=self._timeout_s)
            except engram.EngramError as error:
                self.errors.append(str(error))
            now = time.monotonic()
            self.gap_max_s, last = max(self.gap_max_s, now - last), now
            self.steps += len(sessions)


def takeover(campaign: Campaign, seed: int) -> dict[str, Any]:
    """A server dies; each of its sessions is asked for a step at once: how long until its first answer from the other."""

    async def body(fleet: Fleet, client: engram.AsyncClient) -> dict[str, Any]:
        sessions = await _open(client)
        waits: list[float] = []
        reconnects: list[float] = []
        for number in range(ROUNDS):
            await _step_all(client, sessions, _WARM_STEPS)
            server = fleet.servers[number % 2]
            server.signal(signal.SIGKILL)
            server.wait_ended(10)
            started = time.monotonic()

            async def first(session: engram.Session, n: int, started: float = started) -> float:
                await session.step(inputs(n, session.seq + 1))
                return time.monotonic() - started

            attached = asyncio.create_task(_attached(client))
            waits += await asyncio.gather(*(first(session, n) for n, session in enumerate(sessions)))
            reconnects.append(await attached - started)
            server.start()
            await asyncio.to_thread(server.wait_serving)
        p50, p99 = np.percentile(np.array(waits) * 1000, [50, 99]).round(1).tolist()
        return {
            "sessions": len(sessions),
            "rounds": ROUNDS,
            "attached_again_ms": [round(one * 1000, 1) for one in reconnects],
            "first_answer_p50_ms": p50,
            "first_answer_p99_ms": p99,
        }

    return _scenario(campaign, World("takeover", appendfsync="everysec"), seed, body)


def takeover_alive(campaign: Campaign, seed: int) -> dict[str, Any]:
    """Sessions are opened on another server while the one that has them lives: one after the other, then all the rest at once."""

    async def body(fleet: Fleet, client: engram.AsyncClient) -> dict[str, Any]:
        await _step_all(client, await _open(client), _WARM_STEPS)
        waits: list[float] = []
        async with engram.AsyncClient(client.addresses[1], _OPTIONS) as other:
            for number in range(_ONE_BY_ONE):
                started = time.monotonic()
                session = await other.open(MODEL, name_of(number))
                assert session.seq == _WARM_STEPS
                await session.step(inputs(number, _WARM_STEPS + 1))
                waits.append(time.monotonic() - started)
            started = time.monotonic()
            rest = await other.open_many(MODEL, [name_of(number) for number in range(_ONE_BY_ONE, SESSIONS)])
            numbers = np.arange(_ONE_BY_ONE, SESSIONS)
            await other.step_many(rest, inputs(numbers, np.full(len(rest), _WARM_STEPS + 1)))
            together = time.monotonic() - started
        p50, p99 = np.percentile(np.array(waits) * 1000, [50, 99]).round(1).tolist()
        return {
            "one_by_one": _ONE_BY_ONE,
            "open_and_answer_p50_ms": p50,
            "open_and_answer_p99_ms": p99,
            "at_once": len(rest),
            "open_and_answer_all_ms": round(together * 1000, 1),
        }

    return _scenario(campaign, World("takeover-alive", appendfsync="everysec"), seed, body)


def drain(campaign: Campaign, seed: int) -> dict[str, Any]:
    """The server that carries all sessions is told to go (SIGTERM)."""

    async def body(fleet: Fleet, client: engram.AsyncClient) -> dict[str, Any]:
        async def disturb() -> None:
            fleet.servers[0].signal(signal.SIGTERM)
            assert await asyncio.to_thread(fleet.servers[0].wait_ended, 60) == 0

        return await _busy(client, disturb, 60.0)

    return _scenario(campaign, World("drain", appendfsync="everysec"), seed, body)


def redis_restart(campaign: Campaign, seed: int) -> dict[str, Any]:
    """Redis is killed and started again; every step has a deadline of ten seconds."""

    async def body(fleet: Fleet, client: engram.AsyncClient) -> dict[str, Any]:
        async def disturb() -> None:
            fleet.primary.kill()
            await asyncio.to_thread(fleet.primary.start)

        return await _busy(client, disturb, 10.0)

    return _scenario(campaign, World("redis-restart", servers=1, appendfsync="everysec"), seed, body)


def failover(campaign: Campaign, seed: int) -> dict[str, Any]:
    """Primary and server die together, the replica is promoted: acknowledged steps that it does not have, by what commits
    waited for, with a replica that keeps up and with one that has hung for half a second."""
    result: dict[str, Any] = {}
    for ack in ("memory", "replicated"):
        for hung in (False, True):
            lost = _lost_by_failover(campaign, seed, ack, hung)
            result[f"{ack}, replica {'hung for 0.5 s' if hung else 'keeps up'}"] = lost
    return result


def _lost_by_failover(campaign: Campaign, seed: int, ack: str, hung: bool) -> dict[str, int]:
    async def body(fleet: Fleet, client: engram.AsyncClient) -> dict[str, int]:
        sessions = await _open(client, 100)
        busy = Busy(client, sessions)
        task = asyncio.create_task(busy.run())
        await asyncio.sleep(1.0)
        replica = fleet.redises[1]
        if hung:
            replica.signal(signal.SIGSTOP)
            await asyncio.sleep(0.5)
        fleet.servers[0].signal(signal.SIGKILL)
        fleet.primary.kill()
        acknowledged = [session.seq for session in sessions]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        replica.signal(signal.SIGCONT)
        await asyncio.to_thread(fleet.promote, replica)
        fleet.servers[0].wait_ended(10)
        fleet.servers[0].start()
        await asyncio.to_thread(fleet.servers[0].wait_serving)
        lost = 0
        async with engram.AsyncClient(client.addresses, _OPTIONS) as other:
            for session, seq in zip(await _open(other, 100), acknowledged, strict=True):
                lost += max(0, seq - session.seq)
        with contextlib.suppress(engram.CloseIncompleteError):  # its last steps were called off with its server dead
            await client.aclose()
        return {"acknowledged": sum(acknowledged), "lost": lost}

    return _scenario(campaign, World(f"failover-{ack}", servers=1, replicated=True), seed, body, "--redis-ack", ack)


SCENARIOS: dict[str, Callable[[Campaign, int], dict[str, Any]]] = {
    "takeover": takeover,
    "takeover-alive": takeover_alive,
    "drain": drain,
    "redis-restart": redis_restart,
    "failover": failover,
}


async def _open(client: engram.AsyncClient, count: int = SESSIONS) -> list[engram.Session]:
    return await client.open_many(MODEL, [name_of(number) for number in range(count)])


async def _attached(client: engram.AsyncClient) -> float:
    """When the client has lost its stream and its sessions are attached on another one."""
    link = client._linked()
    while link._up.is_set():
        await asyncio.sleep(0.001)
    await link._up.wait()
    return time.monotonic()


async def _step_all(client: engram.AsyncClient, sessions: list[engram.Session], steps: int) -> None:
    numbers = np.arange(len(sessions))
    for _ in range(steps):
        await client.step_many(sessions, inputs(numbers, np.array([session.seq for session in sessions]) + 1))


async def _busy(client: engram.AsyncClient, disturb: Callable[[], Awaitable[None]], timeout_s: float) -> dict[str, Any]:
    sessions = await _open(client)
    await _step_all(client, sessions, _WARM_STEPS)
    busy = Busy(client, sessions, timeout_s)
    task = asyncio.create_task(busy.run())
    await asyncio.sleep(1.0)
    usual_s, busy.gap_max_s = busy.gap_max_s, 0.0
    await disturb()
    await asyncio.sleep(2.0)
    busy.stop()
    await task
    return {
        "sessions": len(sessions), "steps": busy.steps, "errors": len(busy.errors),
        "longest_gap_s": round(busy.gap_max_s, 3), "longest_gap_before_s": round(usual_s, 3),
    }  # fmt: skip


def _scenario(
    campaign: Campaign,
    world: World,
    seed: int,
    body: Callable[[Fleet, engram.AsyncClient], Awaitable[Any]],
    *flags: str,
) -> Any:
    fleet = campaign.fleet(world, seed, world.name, *flags)
    fleet.start()

    async def main() -> Any:
        addresses = [f"127.0.0.1:{server.address_port}" for server in fleet.servers]
        async with engram.AsyncClient(addresses, _OPTIONS) as client:
            return await body(fleet, client)

    try:
        return asyncio.run(main())
    finally:
        fleet.stop()
