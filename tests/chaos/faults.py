"""The faults, and the injector that draws them from a seed.

Kind, target, length and pause are drawn in a fixed order from one generator; a few kinds come first, so that no world is without. Several faults are under way at once, but one
target has one at a time: a fault whose target is taken is dropped. So a seed repeats the sequence of draws, though not to the
millisecond what meets what.
"""

from __future__ import annotations

import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from chaos import points
from chaos.fleet import Client, Fleet, Redis, Server, wait_for
from chaos.nursery import CANCEL, HALF_CLOSE

CLOCK_S = 6 * 3600  # clocks move by up to so much; a session's time to live is a week
_POINT_WAIT_S = 6.0
_AT_ONCE_MAX = 5
_BREAK_NBYTES_MAX = 20_000
_FIRST = ("client-cancel", "half-close", "stream-break", "pause-cancel", "redis-restore")  # once in every world
_HELD = ("redis-kill", "redis-pause", "redis-cut", "redis-delay", "redis-restore", "client-cancel", "pause-cancel")


@dataclass(frozen=True, slots=True)
class Draw:
    """One fault as the seed has it: which of the targets (0..1), how long (0..1), and a detail (0..1)."""

    kind: str
    target: float
    length: float
    detail: float


class Injector:
    """Injects until told to stop; counts what happened."""

    def __init__(
        self, fleet: Fleet, seed: int, weights: dict[str, float], pause_s: float, say: Callable[[str], None]
    ) -> None:
        self._fleet = fleet
        self._random = random.Random(seed)
        self._kinds = [kind for kind in weights if self._possible(kind)]
        self._weights = [weights[kind] for kind in self._kinds]
        self._pause_s = pause_s
        self._say = say
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._workers: list[threading.Thread] = []
        self._owed = [kind for kind in _FIRST if kind in self._kinds]
        self._random.shuffle(self._owed)
        self._thread = threading.Thread(target=self._run, name="injector", daemon=True)

    @property
    def total(self) -> int:
        with self._lock:
            return self.counts.total()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No new faults; returns when the last is over."""
        self._stopping.set()
        self._thread.join()
        for worker in self._workers:
            worker.join(60)

    def _possible(self, kind: str) -> bool:
        world = self._fleet.world
        if world.held:
            # The arenas are the only copy, or the only new one, and a session without a client leaves them within a second.
            return kind in _HELD
        if kind == "redis-restore":
            return False
        if kind.startswith("clock"):
            return world.clocks
        if kind == "slot-migration":
            return world.cluster
        if world.replicated:
            return kind != "redis-kill"  # a dead primary is replaced there
        if world.cluster:
            # No proxy between servers and nodes.
            return kind not in ("promotion", "redis-cut", "redis-delay", "redis-hold")
        return kind != "promotion"

    def _run(self) -> None:
        while not self._stopping.wait(self._random.uniform(0.2, 1.8) * self._pause_s):
            kind = self._owed[-1] if self._owed else self._random.choices(self._kinds, self._weights)[0]
            draw = Draw(kind, self._random.random(), self._random.random(), self._random.random())
            target = self._target(draw)
            # There may be another primary by the time that one has come back.
            name = "redis" if isinstance(target, Redis) else target.name
            with self._lock:
                if name in self._busy or len(self._busy) >= _AT_ONCE_MAX:
                    continue
                self._busy.add(name)
            if self._owed:
                self._owed.pop()
            worker = threading.Thread(target=self._inject, args=(draw, target, name), daemon=True)
            self._workers = [one for one in self._workers if one.is_alive()] + [worker]
            worker.start()

    def _target(self, draw: Draw) -> Any:
        fleet = self._fleet
        if draw.kind in _OF_REDIS:
            return fleet.redises[int(draw.target * len(fleet.redises))] if fleet.world.cluster else fleet.primary
        some: list[Any] = fleet.clients if draw.kind in _OF_CLIENTS else fleet.servers
        return some[int(draw.target * len(some))]

    def _inject(self, draw: Draw, target: Any, name: str) -> None:
        try:
            what = FAULTS[draw.kind](self._fleet, target, draw)
            if what:
                with self._lock:
                    self.counts[what] += 1
        except Exception:
            self.failures.append(f"{draw} on {target.name}\n{traceback.format_exc()}")
            self._say(f"fault {draw.kind} on {target.name} failed:\n{traceback.format_exc()}")
        finally:
            with self._lock:
                self._busy.discard(name)


# What each does. They return the name to count, or nothing where the fault did not come about.


def server_kill(fleet: Fleet, server: Server, draw: Draw) -> str:
    server.signal(signal.SIGKILL)
    _again(server, draw.length)
    return "server-kill"


def _again(server: Server, pause_s: float) -> None:
    assert server.wait_ended(10) is not None
    time.sleep(pause_s)
    server.start()
    server.wait_serving()


def server_drain(fleet: Fleet, server: Server, draw: Draw) -> str:
    server.signal(signal.SIGTERM)
    code = server.wait_ended(60)
    assert code == 0, f"a drained server ended with {code}"
    _again(server, draw.length * 0.5)
    return "server-drain"


def server_freeze(fleet: Fleet, server: Server, draw: Draw) -> str:
    """Stopped and continued; its clients wait."""
    server.signal(signal.SIGSTOP)
    time.sleep(0.1 + 1.4 * draw.length)
    server.signal(signal.SIGCONT)
    return "server-freeze"


def data_kill(fleet: Fleet, server: Server, draw: Draw) -> str:
    """The manager is to start another one."""
    before = server.data_pid
    server.signal_data(signal.SIGKILL)
    wait_for(lambda: server.data_pid not in (0, before), 15, f"{server.name} starts no other data process")
    time.sleep(draw.length)
    return "data-kill"


def data_freeze(fleet: Fleet, server: Server, draw: Draw) -> str:
    """For less long than the manager has patience, or for longer."""
    before = server.data_pid
    server.signal_data(signal.SIGSTOP)
    time.sleep(0.1 + (7.0 if draw.detail < 0.2 else 1.4) * draw.length)
    if server.data_pid == before:
        server.signal_data(signal.SIGCONT)
    return "data-freeze"


def server_zombie(fleet: Fleet, server: Server, draw: Draw) -> str:
    """Stopped in the middle of its work; its sessions go on elsewhere; then it wakes up and writes."""
    server.signal(signal.SIGSTOP)
    server.front.refuse(True)
    server.front.cut()
    time.sleep(1.0 + 2.0 * draw.length)
    server.signal(signal.SIGCONT)
    time.sleep(0.2 + draw.detail)
    server.front.refuse(False)
    return "server-zombie"


def server_point(fleet: Fleet, server: Server, draw: Draw) -> str:
    """Dies at a place that was chosen."""
    name = points.NAMES[int(draw.detail * len(points.NAMES))]
    count = 1 + int(draw.length * 20) if name.endswith("commit") else 1
    wait_for(server.looks, 15, "a server does not look at its control files")
    data = server.data_pid
    server.arm(f"{name} {count}\n")
    if name.endswith("claim"):
        other = fleet.servers[(fleet.servers.index(server) + 1) % len(fleet.servers)]
        if other is not server:
            other.front.cut()  # somebody has to come and claim
    elif name == "drain":
        wait_for(server.looks, 15, "a server does not look at its control files")
        server.signal(signal.SIGTERM)
    until = time.monotonic() + _POINT_WAIT_S
    while (code := server.wait_ended(0.05)) is None and server.data_pid == data and time.monotonic() < until:
        pass
    if code is None:
        died = server.data_pid != data
        server.arm("")  # for the other process, or for both: nothing came by
        if (code := server.wait_ended(0.2)) is None:
            return f"point-{name}" if died else ""
    _again(server, 0.2)
    return "" if code == 0 else f"point-{name}"


def redis_kill(fleet: Fleet, target: Redis, draw: Draw) -> str:
    target.kill()
    if not fleet.world.appendonly:
        target.lose_data()
    time.sleep(draw.length * 0.8)
    target.start()
    return "redis-kill" if fleet.world.appendonly else "redis-emptied"


def redis_restore(fleet: Fleet, target: Redis, draw: Draw) -> str:
    """Under living servers it comes back with data that are a while old: as after a restore of a snapshot, or a failover to a
    replica that was behind."""
    target.copy_data()
    time.sleep(0.2 + 1.8 * draw.length)
    target.kill()
    target.put_back()
    time.sleep(0.5 * draw.detail)
    target.start()
    return "redis-restore"


def redis_pause(fleet: Fleet, target: Redis, draw: Draw) -> str:
    target.signal(signal.SIGSTOP)
    time.sleep(0.1 + 1.9 * draw.length)
    target.signal(signal.SIGCONT)
    return "redis-pause"


def pause_cancel(fleet: Fleet, target: Redis, draw: Draw) -> str:
    """Redis is silent, and clients call off what they have asked for meanwhile."""
    target.signal(signal.SIGSTOP)
    try:
        for _ in range(1 + int(draw.detail * 3)):
            time.sleep(0.05 + 0.6 * draw.length)
            for client in fleet.clients:
                client.signal(CANCEL)
    finally:
        target.signal(signal.SIGCONT)
    return "pause-cancel"


def slot_migration(fleet: Fleet, source: Redis, draw: Draw) -> str:
    """Slots with sessions in them move from one primary to another, key by key; for a while some keys are here, some there."""
    others = [node for node in fleet.redises if node is not source]
    target = others[int(draw.detail * len(others))]
    mine = source.slots_in_use()[: 1 + int(draw.length * 12)]
    for at in mine:
        _insist(target, "CLUSTER", "SETSLOT", at, "IMPORTING", source.node_id)
        _insist(source, "CLUSTER", "SETSLOT", at, "MIGRATING", target.node_id)
    for at in mine:
        while keys := _insist(source, "CLUSTER", "GETKEYSINSLOT", at, 1):
            # A try that fails may have copied the key already; here it still is the right one.
            _insist(source, "MIGRATE", "127.0.0.1", target.port, keys[0], 0, 5000, "REPLACE")
            time.sleep(0.02 * draw.length)
    for at in mine:
        for node in (target, source, *others):
            _insist(node, "CLUSTER", "SETSLOT", at, "NODE", target.node_id)
    return "slot-migration" if mine else ""


def _insist(node: Redis, *command: Any) -> Any:
    """Repeats a command of a move until it is done, as whoever moves slots has to: a node may just have come back."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return node.client.execute_command(*command)
        except redis.exceptions.RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def promotion(fleet: Fleet, old: Redis, draw: Draw) -> str:
    """The primary dies, its replica is promoted, the servers are sent there; the dead one comes back as a replica."""
    new = next(one for one in fleet.redises if one is not old)
    if new.client.info("replication").get("master_link_status") != "up":
        return ""
    old.kill()
    fleet.promote(new, draw.length)
    return "promotion"


def client_cut(fleet: Fleet, server: Server, draw: Draw) -> str:
    if draw.detail < 0.5:
        server.front.refuse(True)
        server.front.cut()
        time.sleep(draw.length)
        server.front.refuse(False)
    else:
        server.front.cut()
    return "client-cut"


def client_delay(fleet: Fleet, server: Server, draw: Draw) -> str:
    server.front.delay(0.005 + 0.1 * draw.detail)
    time.sleep(0.2 + draw.length)
    server.front.delay(0.0)
    return "client-delay"


def client_hold(fleet: Fleet, server: Server, draw: Draw) -> str:
    """Nothing passes for a while; then it arrives late, or is lost with the connection."""
    server.front.hold(True)
    time.sleep(0.1 + 1.4 * draw.length)
    if draw.detail < 0.5:
        server.front.cut()
    server.front.hold(False)
    return "client-hold"


def stream_break(fleet: Fleet, server: Server, draw: Draw) -> str:
    """Its clients' connections are reset at some byte, in the middle of whatever that is part of."""
    server.front.break_after(int(draw.detail**3 * _BREAK_NBYTES_MAX))
    time.sleep(0.1 + 0.4 * draw.length)
    return "" if server.front.mend() else "stream-break"


def client_cancel(fleet: Fleet, client: Client, draw: Draw) -> str:
    """A client calls off what it has under way: opens, steps, closes, detaches; by cancels of the SDK, and of a whole stream."""
    if not client.begun:
        return ""
    for _ in range(1 + int(draw.detail * 4)):
        client.signal(CANCEL)
        time.sleep(0.1 * draw.length)
    return "client-cancel"


def half_close(fleet: Fleet, client: Client, draw: Draw) -> str:
    """A stream ends on the client's side while its steps are under way; they are answered before it ends on the server's."""
    if not client.begun:
        return ""
    client.signal(HALF_CLOSE)
    time.sleep(0.2 * draw.length)
    return "half-close"


def redis_cut(fleet: Fleet, server: Server, draw: Draw) -> str:
    server.back.cut()
    return "redis-cut"


def redis_delay(fleet: Fleet, server: Server, draw: Draw) -> str:
    server.back.delay(0.002 + 0.05 * draw.detail)
    time.sleep(0.2 + draw.length)
    server.back.delay(0.0)
    return "redis-delay"


def redis_hold(fleet: Fleet, server: Server, draw: Draw) -> str:
    """What the server sends to Redis is held back; half of the time its clients leave it meanwhile, and it arrives late."""
    server.back.hold(True)
    time.sleep(0.2 + 0.8 * draw.length)
    if draw.detail < 0.5:
        server.front.refuse(True)
        server.front.cut()
        time.sleep(0.3 + draw.length)
    server.back.hold(False)
    time.sleep(0.2)
    server.front.refuse(False)
    return "redis-hold"


def client_kill(fleet: Fleet, client: Client, draw: Draw) -> str:
    client.signal(signal.SIGKILL)
    assert client.wait_ended(10) is not None
    time.sleep(draw.length * 0.3)
    client.start()
    return "client-kill"


def client_pause(fleet: Fleet, client: Client, draw: Draw) -> str:
    client.signal(signal.SIGSTOP)
    time.sleep(0.1 + draw.length)
    client.signal(signal.SIGCONT)
    return "client-pause"


def clock(fleet: Fleet, target: Server | Redis | Client, draw: Draw) -> str:
    """Its wall clock jumps, forwards or back."""
    part = target.clock.with_suffix(".new")
    part.write_text(f"{int((2 * draw.detail - 1) * CLOCK_S):+d}\n")
    part.rename(target.clock)
    time.sleep(0.1)
    return f"clock-{target.name.split('-')[0]}"


FAULTS: dict[str, Callable[[Fleet, Any, Draw], str]] = {
    "server-kill": server_kill,
    "server-drain": server_drain,
    "server-freeze": server_freeze,
    "data-kill": data_kill,
    "data-freeze": data_freeze,
    "server-zombie": server_zombie,
    "server-point": server_point,
    "redis-kill": redis_kill,
    "redis-pause": redis_pause,
    "redis-restore": redis_restore,
    "pause-cancel": pause_cancel,
    "slot-migration": slot_migration,
    "promotion": promotion,
    "client-cut": client_cut,
    "client-delay": client_delay,
    "client-hold": client_hold,
    "stream-break": stream_break,
    "client-cancel": client_cancel,
    "half-close": half_close,
    "redis-cut": redis_cut,
    "redis-delay": redis_delay,
    "redis-hold": redis_hold,
    "client-kill": client_kill,
    "client-pause": client_pause,
    "clock-server": clock,
    "clock-redis": clock,
    "clock-client": clock,
}

_OF_REDIS = ("redis-kill", "redis-pause", "redis-restore", "pause-cancel", "promotion", "clock-redis", "slot-migration")
_OF_CLIENTS = ("client-kill", "client-pause", "client-cancel", "half-close", "clock-client")

# How often each is drawn. What takes seconds to recover from is drawn less, so that there is something to disturb.
WEIGHTS = {
    "server-kill": 3, "server-drain": 2, "server-freeze": 3, "server-zombie": 3, "server-point": 4, "data-kill": 3,
    "data-freeze": 2, "redis-kill": 3,
    "redis-pause": 2, "redis-restore": 5, "pause-cancel": 3, "slot-migration": 4, "promotion": 2, "client-cut": 4, "client-delay": 3,
    "client-hold": 4, "stream-break": 5, "client-cancel": 5, "half-close": 4, "redis-cut": 5, "redis-delay": 3, "redis-hold": 4,
    "client-kill": 4, "client-pause": 3, "clock-server": 2, "clock-redis": 1, "clock-client": 1,
}  # fmt: skip
