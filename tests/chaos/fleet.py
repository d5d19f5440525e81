"""Servers, Redis and clients as real processes, with a proxy on every wire between them. What breaks them is in faults.py.

client -> proxy -> server -> proxy -> Redis (-> proxy -> replica)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redises import SLOTS, redis_program

from chaos.histories import MODEL
from chaos.proxy import Proxy, Wires
from engram_models import shipped_models_dir
from engram_service.ports import free_port
from engram_service.protocols.http.get import get
from engram_service.store.keys import META_PREFIX
from engram_service.store.nodes import slot

TESTS = pathlib.Path(__file__).parents[1]
START_S = 120.0


@dataclass(frozen=True, slots=True)
class World:
    """What one part of a campaign runs on."""

    name: str
    servers: int = 2
    appendonly: bool = True
    appendfsync: str = "everysec"
    replicated: bool = False
    cluster: bool = False
    clocks: bool = False  # wall clocks are moved
    restored: bool = False  # Redis comes back with older data
    redis: str = ""  # which program it is, see redises.py; none: the campaign's
    wire: str = "auto"  # of its servers

    @property
    def held(self) -> bool:
        """Whether the servers' memory is all that is promised to remain: what nobody has open may be lost."""
        return self.restored or not self.appendonly


class Nursery:
    """The process that all servers and clients are forked from; see nursery.py."""

    def __init__(self, clock: pathlib.Path | None = None) -> None:
        """`clock`: libfaketime; its children then read their clock's offset from a file."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
        if clock is not None:
            environment |= clock_environment(clock)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._pids: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ends: dict[int, int] = {}  # exit codes by pid
        self._ended = threading.Condition()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        threading.Thread(target=self._read, name="nursery", daemon=True).start()

    def wait_ready(self) -> None:
        assert self._ready.wait(START_S), "the nursery does not start"

    def spawn(self, task: dict[str, Any]) -> int:
        with self._lock:
            self._send(task)
            return self._pids.get(timeout=30)

    def signal(self, pid: int, number: signal.Signals) -> None:
        self._send({"pid": pid, "signal": int(number)})

    def ended(self, pid: int) -> int | None:
        """The exit code of a child, if it has ended."""
        with self._ended:
            return self._ends.get(pid)

    def wait(self, pid: int, timeout_s: float) -> int | None:
        with self._ended:
            self._ended.wait_for(lambda: pid in self._ends, timeout_s)
            return self._ends.get(pid)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _send(self, task: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self._ready.set()
            elif "pid" in said:
                self._pids.put(said["pid"])
            else:
                with self._ended:
                    self._ends[said["ended"]] = said["code"]
                    self._ended.notify_all()


def clock_library() -> pathlib.Path | None:
    """libfaketime, if the package of that name is installed; without it, no clocks are moved."""
    spec = importlib.util.find_spec("libfaketime")
    found = (
        []
        if spec is None or spec.origin is None
        else sorted(pathlib.Path(spec.origin).parent.rglob("libfaketime.so.1"))
    )
    return found[0] if found else None


def clock_environment(library: pathlib.Path) -> dict[str, str]:
    """The wall clock comes from a file, the monotonic one is left alone."""
    return {"LD_PRELOAD": str(library), "FAKETIME": "+0", "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}


class Forked:
    """A child of the nursery, and its lives."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self._fleet, self.name = fleet, name
        self.pid = 0

    @property
    def running(self) -> bool:
        return self.pid > 0 and self._fleet.nursery.ended(self.pid) is None

    def signal(self, number: signal.Signals) -> None:
        self._fleet.nursery.signal(self.pid, number)

    def wait_ended(self, timeout_s: float) -> int | None:
        return self._fleet.nursery.wait(self.pid, timeout_s)


class Server(Forked):
    """One `engram serve` behind its proxies, on the same ports in every life."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        super().__init__(fleet, f"server-{number}")
        self.directory = fleet.directory / self.name
        self.directory.mkdir()
        self._port, self.address_port, wire_port, self._http = (free_port() for _ in range(4))
        self.front: Proxy = fleet.wires.proxy(self.address_port, self._port)
        # Nodes of a cluster tell their own addresses, which lead past a proxy.
        self.back: Proxy = fleet.wires.proxy(wire_port, fleet.primary.port)
        self._redis_url = (
            f"redis+cluster://127.0.0.1:{fleet.primary.port}"
            if fleet.world.cluster
            else f"redis://127.0.0.1:{wire_port}/0"
        )
        self.control = self.directory / "control"
        self.clock = self.directory / "clock"

    def start(self) -> None:
        """Does not wait until it serves."""
        world = self._fleet.world
        flags = [
            "--listen", f"127.0.0.1:{self._port}", "--http", f"127.0.0.1:{self._http}", "--redis-url", self._redis_url,
            "--models", str(self._fleet.models), "--shipped-models", "false", "--batch-rows-max", "256",
            "--drain-timeout-s", "15", "--log-format", "human", "--wire", world.wire,
        ]  # fmt: skip
        if world.held:
            flags += ["--resident-idle-s", "3600"]  # what left the arena would be in Redis alone
        if world.replicated:
            flags += ["--redis-ack", "replicated", "--redis-ack-timeout-ms", "500"]
        flags += self._fleet.server_flags
        for control in self.controls:
            control.unlink(missing_ok=True)
        log = str(self.directory / "log")
        environment = {"FAKETIME_TIMESTAMP_FILE": str(self.clock)}
        self.pid = self._fleet.nursery.spawn(
            {"run": "server", "name": self.name, "control": str(self.control), "flags": flags, "log": log, "environment": environment}
        )  # fmt: skip

    @property
    def data_pid(self) -> int:
        """Of its data process; 0: there is none just now."""
        try:
            children = psutil.Process(self.pid).children()
            return next((one.pid for one in children if "engram_service.data_process" in one.cmdline()), 0)
        except psutil.Error:
            return 0

    def signal(self, number: signal.Signals) -> None:
        """A server is stopped (SIGSTOP) and goes on as a whole."""
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.signal_data(number)
        super().signal(number)

    def signal_data(self, number: signal.Signals) -> None:
        if pid := self.data_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def arm(self, text: str) -> None:
        """Has each of its processes look at this."""
        for control in self.controls:
            part = control.with_suffix(".new")
            part.write_text(text)
            part.rename(control)

    @property
    def controls(self) -> list[pathlib.Path]:
        return [self.control, self.control.with_suffix(".data")]

    def looks(self) -> bool:
        """Whether its processes have seen what they were armed with."""
        return not any(control.exists() for control in self.controls)

    def wait_serving(self, timeout_s: float = START_S) -> None:
        wait_for(lambda: accepts(self._port), timeout_s, f"{self.name} does not serve")

    def rows_in_flight(self) -> int:
        """What it accepted and has not answered, by its own count."""
        lines = get(f"127.0.0.1:{self._http}", "/metrics").splitlines()
        return int(sum(float(line.split()[1]) for line in lines if line.startswith("engram_rows_in_flight ")))


class Redis:
    """One Redis on a port, in every life with the same directory."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self._fleet, self.name = fleet, f"redis-{number}"
        self.directory = fleet.directory / self.name
        self.directory.mkdir()
        self._copy = fleet.directory / f"{self.name}.copy"
        self.port = free_port()
        self.clock = self.directory / "clock"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def start(self, *flags: str) -> None:
        world = self._fleet.world
        kept = (
            ("--appendonly", "yes", "--appendfsync", world.appendfsync) if world.appendonly else ("--appendonly", "no")
        )
        in_slots = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1500",
            "--cluster-require-full-coverage",
            "no",
        )
        command = [
            redis_program(world.redis), "--port", str(self.port), "--dir", str(self.directory), "--save", "", *kept, "--logfile",
            str(self.directory / "log"), "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0",
            "--repl-ping-replica-period", "1", *(in_slots if world.cluster else ()), *flags,
        ]  # fmt: skip
        environment = dict(os.environ)
        if self._fleet.clock_library is not None:
            environment |= clock_environment(self._fleet.clock_library) | {"FAKETIME_TIMESTAMP_FILE": str(self.clock)}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        wait_for(self._loaded, START_S, f"{self.name} does not start")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def copy_data(self) -> None:
        """Keeps a copy of its data as they are now, for `put_back`."""
        if not self._fleet.world.appendonly:
            self.client.save()
        self.signal(signal.SIGSTOP)  # so that the files belong together
        try:
            shutil.rmtree(self._copy, ignore_errors=True)
            self._copy.mkdir()
            for path in self._data():
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, self._copy / path.name)
        finally:
            self.signal(signal.SIGCONT)

    def put_back(self) -> None:
        """While it is dead: it will come back with the data of the last copy."""
        self.lose_data()
        for path in self._copy.iterdir():
            shutil.move(path, self.directory / path.name)

    def lose_data(self) -> None:
        """While it is dead: it will come back with nothing."""
        for path in self._data():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _data(self) -> list[pathlib.Path]:
        """Its append-only file (6.2), the directory of those (7 and Valkey), or its snapshot."""
        return [*self.directory.glob("appendonly*"), *self.directory.glob("dump.rdb")]

    def knows_all(self, count: int) -> bool:
        """Whether, as a node of a cluster, it sees so many and every slot served."""
        info = self.client.execute_command("CLUSTER INFO")
        return (info["cluster_known_nodes"], info["cluster_state"]) == (str(count), "ok")

    @property
    def node_id(self) -> str:
        return str(self.client.execute_command("CLUSTER MYID").decode())

    def slots_in_use(self) -> list[int]:
        """Of a node of a cluster: its slots that have sessions."""
        return sorted({slot(key) for key in self.client.scan_iter(match=META_PREFIX + b"*}", count=1000)})

    def _loaded(self) -> bool:
        try:
            return not self.client.info("persistence")["loading"]
        except redis.exceptions.RedisError:
            return False


class Client(Forked):
    """One client, and the histories of its lives."""

    def __init__(self, fleet: Fleet, number: int, first: int, count: int, interval: bool, branches: bool) -> None:
        super().__init__(fleet, f"client-{number}")
        self._plan = {"first": first, "count": count, "interval": interval, "branches": branches}
        self._number = number
        self.lives: list[pathlib.Path] = []
        self.log = fleet.directory / f"{self.name}.log"
        self.clock = fleet.directory / f"{self.name}.clock"

    def start(self) -> None:
        life = len(self.lives) + 1
        self.lives.append(self._fleet.directory / f"{self.name}.{life}.history")
        turn = self._number % len(self._fleet.servers)
        servers = self._fleet.servers[turn:] + self._fleet.servers[:turn]
        task = {
            "run": "client", "name": self.name, "log": str(self.log), "history": str(self.lives[-1]), "life": life,
            "seed": self._fleet.seed * 1_000_003 + self._number * 1009 + life,
            "addresses": [f"127.0.0.1:{server.address_port}" for server in servers],
            "environment": {"FAKETIME_TIMESTAMP_FILE": str(self.clock)}, **self._plan,
        }  # fmt: skip
        self.pid = self._fleet.nursery.spawn(task)

    @property
    def failed(self) -> bool:
        """Whether it ended because of an error that the SDK raised to it."""
        return self.pid > 0 and self._fleet.nursery.ended(self.pid) == 1

    @property
    def begun(self) -> bool:
        """Whether its present life has opened its sessions."""
        return self.lives[-1].exists() and self.lives[-1].stat().st_size > 0

    def written_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.lives if path.exists())


class Fleet:
    """All processes of one world."""

    def __init__(
        self, world: World, directory: pathlib.Path, nursery: Nursery, seed: int,
        clock_library: pathlib.Path | None = None, server_flags: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.world, self.directory, self.nursery, self.seed = world, directory, nursery, seed
        self.clock_library = clock_library
        self.server_flags = server_flags
        directory.mkdir(parents=True)
        self.models = directory / "models"
        self.models.mkdir()
        (self.models / MODEL).symlink_to(shipped_models_dir() / MODEL)
        self.wires = Wires()
        count = 3 if world.cluster else 2 if world.replicated else 1
        self.redises = [Redis(self, number) for number in range(count)]
        self.primary = self.redises[0]
        self.servers: list[Server] = []
        self.clients: list[Client] = []

    def start(self) -> None:
        self.primary.start()
        if self.world.cluster:
            self._form_cluster()
        else:
            for replica in self.redises[1:]:
                self.follow(replica)
        self.servers = [Server(self, number) for number in range(self.world.servers)]
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_serving()

    def _form_cluster(self) -> None:
        for node in self.redises[1:]:
            node.start()
        for number, node in enumerate(self.redises):
            share = range(number * SLOTS // 3, (number + 1) * SLOTS // 3)
            node.client.execute_command("CLUSTER", "ADDSLOTS", *share)
            node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.primary.port)
        wait_for(lambda: all(node.knows_all(len(self.redises)) for node in self.redises), START_S, "no cluster")

    def follow(self, replica: Redis) -> None:
        """Starts a replica of the primary, and waits until it has caught up."""
        replica.start("--replicaof", "127.0.0.1", str(self.primary.port))
        wait_for(
            lambda: replica.client.info("replication").get("master_link_status") == "up", START_S, "no replication"
        )

    def promote(self, new: Redis, pause_s: float = 0.0) -> None:
        """The primary is dead: its replica takes its place, the servers are sent there, and the dead one comes back empty, as a
        replica."""
        old = self.primary
        new.client.execute_command("REPLICAOF", "NO", "ONE")
        self.primary = new
        for server in self.servers:
            server.back.retarget(new.port)
        time.sleep(pause_s)
        old.lose_data()
        self.follow(old)

    def add_clients(self, count: int, sessions: int, intervals: int, branches: bool = True) -> None:
        for number in range(count):
            made = Client(self, number, number * sessions, sessions, number < intervals, branches)
            self.clients.append(made)
            made.start()

    def heal(self) -> None:
        """Everything runs and every wire is whole; what was dead is started."""
        for server in self.servers:
            server.front.heal()
            server.back.heal()
            if server.running:
                server.signal(signal.SIGCONT)
            else:
                server.start()
        for server in self.servers:
            server.wait_serving()

    def stop(self) -> None:
        for process in (*self.clients, *self.servers):
            if process.running:
                process.signal(signal.SIGKILL)
        for server in self.servers:
            server.front.close()
            server.back.close()
        for one in self.redises:
            if one.process is not None:
                one.signal(signal.SIGCONT)
                one.kill()
        self.wires.stop()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(what)
        time.sleep(0.02)
