"""Starts the interop server of server.py for a test, and asks it what it has."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

WAIT_S = 20.0


class InteropServer:
    """A process with the bare wire; `limits` are the wire's."""

    def __init__(self, *flags: str, **limits: float) -> None:
        command = [sys.executable, str(Path(__file__).with_name("server.py")), "--limits", json.dumps(limits), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the server did not start"
        self.port = int(self.address.rpartition(":")[2])

    def tell(self, command: str) -> None:
        """A command of server.py."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def counters(self) -> dict[str, int]:
        """The counters of all its wires, added up."""
        self.tell("counters")
        assert self._process.stdout is not None
        wires = json.loads(self._process.stdout.readline())
        return {name: sum(counters[name] for counters in wires) for name in wires[0]}

    def until(self, what: Callable[[dict[str, int]], Any]) -> None:
        """Waits until its counters are so."""
        deadline = time.monotonic() + WAIT_S
        while not what(counters := self.counters()):
            assert time.monotonic() < deadline, counters
            time.sleep(0.02)

    def memory(self) -> int:
        """Resident bytes that are its own."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel does not say")

    def __enter__(self) -> InteropServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process.stdout.close()
        assert kind or code == 0, code
