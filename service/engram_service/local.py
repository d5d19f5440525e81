"""A server of one's own in a child process, in a directory of one's own. `engram bench` and `engram demo` use it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import grpc
import psutil

from engram_service.ports import free_port
from engram_service.protocols.http.get import get

_START_S = 90.0
_STOP_S = 40.0
_POLL_S = 0.02


class LocalServerError(Exception):
    """The server did not start, or died; the message ends with its last log lines."""


class LocalServer:
    """`engram serve` in a child process; a context manager that stops it, and the private Redis with it.

    address and http stay the same when it is killed and started again, so that clients find it. `variables`: of its environment.
    """

    def __init__(
        self,
        directory: Path,
        models: Path | None = None,
        flags: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._variables = dict(variables or {})
        self.address, self.http = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self._flags = ["--listen", self.address, "--http", self.http, "--data-dir", str(directory / "data"), *flags]
        if models is not None:
            self._flags += ["--models", str(models)]
        self._log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalServer:
        try:
            self.start()
        except BaseException:  # a signal, say, while it is waited for
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise LocalServerError("the server has not been started")
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it answers. Raises LocalServerError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # The caller's ENGRAM_* settings are for the caller's servers.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engram", "serve", *self._flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment | self._variables,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise LocalServerError(f"the server did not start: {self.log_tail()}")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """SIGKILL: no drain, no goodbye. The private Redis lives on, as after any crash."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM and wait; SIGKILL if it does not end. The private Redis ends too."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._end_redis()
        self._process = None

    def processes(self) -> list[psutil.Process]:
        """The server's own, without its Redis."""
        main = psutil.Process(self.pid)
        return [one for one in (main, *main.children(recursive=True)) if "redis" not in one.name()]

    def memory_mb(self) -> float:
        """Resident memory of the server's processes."""
        return float(sum(one.memory_info().rss for one in self.processes())) / 2**20

    def log_tail(self, lines: int = 6) -> str:
        try:
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def _answers(self) -> bool:
        try:
            with self._channel() as channel:
                grpc.channel_ready_future(channel).result(timeout=0.5)
            get(self.http, "/healthz", 1.0)
            return True
        except (grpc.FutureTimeoutError, OSError):
            return False

    def _channel(self) -> grpc.Channel:
        options = [("grpc.enable_http_proxy", 0)]
        if "--tls-cert" not in self._flags:
            return grpc.insecure_channel(self.address, options)
        trusted = Path(self._flags[self._flags.index("--tls-cert") + 1]).read_bytes()  # it signs itself
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(trusted), options)

    def _end_redis(self) -> None:
        """Ends the Redis that a killed server left behind, if one is there. Only processes that run in our directory."""
        ours = str((self.directory / "data").resolve())
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if ours in (process.info["cmdline"] or []) and process.pid != os.getpid():
                    process.terminate()
                    process.wait(5)
