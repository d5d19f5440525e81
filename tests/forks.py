"""Servers of tests are forked from a process that has imported the libraries of `engram serve`: that is most of what a start takes.

From the fork on, all is as in a process of its own: arguments, environment, files, signals, the end. Each process of the suite has one such
process, made with its first server, which ends with it. What looks at the start itself starts `python -m engram` (test_start.py).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any

_START_S = 60.0
# What a server imports of others. Not onnxruntime: it starts a thread, which a fork does not have, and is ended with.
_IMPORTED = (
    "asyncio", "logging.config", "numpy", "google.protobuf", "grpc", "grpc.aio", "grpc_health", "grpc_reflection", "grpc_status",
    "google.rpc", "redis", "redis.asyncio", "redis.cluster", "prometheus_client", "psutil", "safetensors.numpy", "starlette.applications",
    "uvicorn", "engram_native", "engram.v1.service_pb2_grpc",
)  # fmt: skip
# Read when a process begins, or by what is imported: with others than ours, a server is not forked.
_EARLY = ("PYTHON", "OMP_", "OPENBLAS_", "MKL_", "GRPC_", "LD_", "MALLOC_")


class Forked:
    """A forked server, as subprocess.Popen has one."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._await(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._await(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"forked server {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            self._forks.tell(signal=int(number), pid=self.pid)

    def kill(self) -> None:
        self.send_signal(9)

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ended(self.pid, timeout)
        return self.returncode


class Forks:
    """The process that servers are forked from."""

    def __init__(self) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        before_numpy = {"OPENBLAS_NUM_THREADS": "1", **self._environment}  # as commands/serve.py has it
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=before_numpy
        )
        self._begun: list[int] = []
        self._ends: dict[int, int] = {}  # exit codes by process
        self._news = threading.Condition()
        threading.Thread(target=self._read, name="forks", daemon=True).start()

    def like(self, environment: dict[str, str]) -> bool:
        """Whether a process with this environment would have begun as ours did."""
        return _early(environment) == _early(self._environment)

    def serve(self, arguments: list[str], log: pathlib.Path, environment: dict[str, str], before: str = "") -> Forked:
        """`before` is Python that it runs before all else."""
        self.tell(serve=arguments, log=str(log), environment=environment, directory=os.getcwd(), before=before)
        with self._news:
            assert self._news.wait_for(lambda: self._begun, _START_S), "no server is forked"
            return Forked(self, self._begun.pop())

    def tell(self, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")
        self._process.stdin.flush()

    def ended(self, pid: int, timeout: float | None) -> int | None:
        with self._news:
            self._news.wait_for(lambda: pid in self._ends, timeout)
            return self._ends.get(pid)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._news:
                if "code" in said:
                    self._ends[said["pid"]] = said["code"]
                else:
                    self._ends.pop(said["pid"], None)  # an earlier one's, whose number it has
                    self._begun.append(said["pid"])
                self._news.notify_all()


def _early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_EARLY)}


def _child(task: dict[str, Any]) -> dict[str, Any]:
    """In the fork: makes it what was asked for."""
    import ctypes
    import random
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no server outlives the suite
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["directory"])
    random.seed()
    return task


def _main() -> dict[str, Any]:
    """Forks and reaps until its input ends; in a fork, returns what it was asked for."""
    import importlib
    import importlib.util
    import select
    import signal

    for name in _IMPORTED:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pending, children = b"", set[int]()
    while True:
        if woken in select.select([0, woken], [], [])[0]:
            os.read(woken, 1 << 16)
        for pid in list(children):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                children.discard(pid)
                _say(pid=pid, code=code)
        if not select.select([0], [], [], 0)[0]:
            continue
        if not (data := os.read(0, 1 << 16)):
            os._exit(0)  # with its children
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            task = json.loads(line)
            if "signal" in task:
                if task["pid"] in children:  # not reaped yet, so the number is still its own
                    os.kill(task["pid"], task["signal"])
            elif pid := os.fork():
                children.add(pid)
                _say(pid=pid)
            else:
                return _child(task)


def _say(**fields: int) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    del sys.path[0]  # this directory, which `python -m engram` does not have
    asked = _main()
    sys.argv = ["engram", *asked["serve"]]
    exec(asked["before"], {"__name__": "__main__"})
    from engram._cli import main

    sys.exit(main())
