"""The private Redis: never two on one directory, and a watch over it that goes on whatever fails."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import redis

from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.store import StoreError, private
from engram_service.store.private import PrivateRedis, PrivateSettings, redis_binary
from engram_service.supervision import Supervisor

Eventually = Callable[..., None]


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A data directory; whoever is left in it is ended."""
    place = tmp_path / "data"
    yield place
    for process in running(place):
        process.kill()
        process.wait(10)


def running(directory: pathlib.Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["cwd"] == str(directory) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def left_behind(directory: pathlib.Path) -> PrivateRedis:
    """The Redis of a server that was killed: its lock is let go, nobody watches."""
    one = PrivateRedis(PrivateSettings(directory))
    one.start()
    one._stopping.set()
    one._watcher.join(10)
    assert one._lock is not None
    one._lock.close()
    return one


def test_a_failed_sync_is_counted_and_tried_again_and_the_watch_goes_on(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, caplog: Any
) -> None:
    calls: list[bool] = []
    real = os.fdatasync

    def fdatasync(file: int) -> None:
        calls.append(len(calls) < 2)
        if calls[-1]:
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    metrics = Metrics()
    one = PrivateRedis(PrivateSettings(directory), Supervisor(metrics, Health()))
    one.start()
    try:
        eventually(lambda: False in calls)
        failures = metrics.registry.get_sample_value("engram_task_failures_total", {"task": "redis-sync"})
        assert failures == 1 and caplog.text.count("redis-sync failed") == 1, "said once, while it lasts"
        assert one._process is not None
        one._process.kill()
        eventually(one._ping)
    finally:
        one.stop()


def test_whatever_is_raised_in_the_watch_it_begins_again(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    metrics = Metrics()
    one = PrivateRedis(PrivateSettings(directory), Supervisor(metrics, Health()))
    failing = True

    def shorten() -> None:
        if failing:
            raise RuntimeError("not foreseen")

    monkeypatch.setattr(one, "_shorten", shorten)
    one.start()
    try:
        labels = {"task": "redis-watch"}
        eventually(lambda: metrics.registry.get_sample_value("engram_task_failures_total", labels))
        failing = False
        assert one._process is not None
        one._process.kill()
        eventually(one._ping)
    finally:
        one.stop()


def test_one_that_still_reads_its_file_is_waited_for(directory: pathlib.Path, eventually: Eventually) -> None:
    one = left_behind(directory)
    client = one._client()
    for at in range(0, 12_000, 1000):
        with client.pipeline(transaction=False) as pipe:
            for number in range(at, at + 1000):
                pipe.set(f"key-{number}", "x")
            pipe.execute()
    assert one._process is not None
    one._process.kill()
    one._process.wait()
    slow = subprocess.Popen(
        [redis_binary(), "--port", "0", "--unixsocket", str(directory / "redis.sock"), "--dir", str(directory), "--save", "",
         "--appendonly", "yes", "--key-load-delay", "200", "--logfile", str(directory / "redis.log")], stdout=subprocess.DEVNULL,
    )  # fmt: skip
    two = PrivateRedis(PrivateSettings(directory))
    eventually(two._loading)
    two.start()
    try:
        assert [process.pid for process in running(directory)] == [slow.pid]
        assert two._client().dbsize() == 12_000
    finally:
        two.stop()
        slow.wait(10)


def test_one_that_hangs_is_waited_for_and_then_named(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_START_TIMEOUT_S", 0.5)
    one = left_behind(directory)
    assert one._process is not None
    one._process.send_signal(signal.SIGSTOP)
    two = PrivateRedis(PrivateSettings(directory))
    with pytest.raises(StoreError, match=f"does not answer .process {one._process.pid}"):
        two.start()
    assert len(running(directory)) == 1
    assert two._lock is not None
    two._lock.close()
    one._process.send_signal(signal.SIGCONT)


def test_one_that_dies_while_it_is_waited_for_is_followed_by_a_new_one(directory: pathlib.Path) -> None:
    one = left_behind(directory)
    one._client().set("kept", 1)
    assert one._process is not None
    one._process.send_signal(signal.SIGSTOP)
    two = PrivateRedis(PrivateSettings(directory))
    starting = threading.Thread(target=two.start)
    starting.start()
    time.sleep(0.3)
    one._process.kill()
    one._process.wait()
    starting.join(20)
    try:
        assert two._client().get("kept") == b"1" and len(running(directory)) == 1
    finally:
        two.stop()


def test_one_whose_socket_was_removed_is_ended_before_another_is_started(directory: pathlib.Path) -> None:
    one = left_behind(directory)
    one._client().set("kept", 1)
    (directory / "redis.sock").unlink()
    assert one._process is not None
    threading.Thread(target=one._process.wait, daemon=True).start()  # as init would
    two = PrivateRedis(PrivateSettings(directory))
    two.start()
    try:
        assert two._client().get("kept") == b"1"
        assert [process.pid for process in running(directory)] == [two._process.pid]  # type: ignore[union-attr]
    finally:
        two.stop()


def test_a_process_that_has_the_number_by_chance_is_left_alone(directory: pathlib.Path) -> None:
    directory.mkdir()
    (directory / "redis.pid").write_text(f"{os.getpid()} 1\n")
    one = PrivateRedis(PrivateSettings(directory))
    one.start()
    one.stop()


def test_a_redis_that_is_too_old_for_the_directory_does_not_begin_with_nothing(
    directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "appendonlydir").mkdir(parents=True)
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=0:0 malloc=libc bits=64 build=1'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StoreError, match=r"was written by Redis 7 or newer.* is a Redis 6"):
        PrivateRedis(PrivateSettings(directory)).start()


def test_the_file_is_synced_whatever_it_is_called(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """One file, or from Redis 7 on a directory of them."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    one = PrivateRedis(PrivateSettings(directory))
    one.start()
    try:
        redis.Redis.from_url(one.url).set("a", 1)
        eventually(lambda: synced)
        assert all(name.endswith(".aof") and "appendonly" in name for name in synced)
        sizes = [pathlib.Path(name).stat().st_size for name in synced]
        assert max(sizes) > 0
    finally:
        one.stop()


FULL = """
import contextlib, os, pathlib, resource, sys, time
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.store.private import PrivateRedis, PrivateSettings
from engram_service.supervision import Supervisor

metrics, synced, real = Metrics(), [], os.fdatasync
os.fdatasync = lambda file: (real(file), synced.append(file))
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
one = PrivateRedis(PrivateSettings(pathlib.Path(sys.argv[1])), Supervisor(metrics, Health()))
one.start()

def wait(count, full):
    end = time.monotonic() + 30
    while len(synced) < count:
        assert time.monotonic() < end, "no more syncs"
        with contextlib.suppress(OSError):
            while full:
                taken.append(os.dup(0))
        time.sleep(0.02)

taken = []
wait(5, False)  # by then the directory has not changed for a while
wait(len(synced) + 4, True)
for file in taken:
    os.close(file)
print([sample for family in metrics.registry.collect() if family.name == "engram_task_failures" for sample in family.samples])
one.stop()
"""


def test_the_file_is_synced_also_while_no_file_can_be_opened(directory: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(directory)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
