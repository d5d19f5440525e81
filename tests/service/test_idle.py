"""Promise 7: idle sessions cost nothing to speak of. Sessions of W are opened, stepped once and left alone."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

import numpy as np
import pytest

import engram
from engram_service.bench.workload import W, write_w

STATE_NBYTES = 2 * 256 * 4
CHUNK = 1000
MB = 1 << 20


def resident_nbytes(pid: int) -> int:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


@pytest.mark.promise(7)
@pytest.mark.single_redis("it measures the memory of one Redis")
@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_idle_sessions_are_small_in_the_server_and_in_redis(
    server_with: Callable, tmp_path: pathlib.Path, count: int
) -> None:
    write_w(tmp_path / "models")
    with server_with("--models", str(tmp_path / "models"), "--resident-idle-s", "1") as server:
        store = server.redis()
        with engram.Client(server.address) as client:
            client.open(W, "first").step(
                np.zeros(64, np.float32)
            )  # what the first step of all allocates is no session's
            before = server.resident_nbytes(), store.info("memory")["used_memory"]
            sessions = client.open_many(W, [f"sensor-{number:06d}" for number in range(count)])
            for start in range(0, count, CHUNK):
                client.step_many(sessions[start : start + CHUNK], np.zeros((CHUNK, 64), np.float32))
            grown = store.info("memory")["used_memory"] - before[1]
            print(f"Redis: {grown / count / STATE_NBYTES:.2f} x the raw state")
            assert grown < 1.5 * count * STATE_NBYTES
            # The fixed part is what a burst leaves in torch's and the C library's pools; the rest is per session.
            most = 64 * MB if count == 100_000 else 24 * MB + 400 * count
            small = until(lambda: server.resident_nbytes() - before[0] < most, 30)
            print(
                f"server: {(server.resident_nbytes() - before[0]) / MB:.0f} MB beyond its start for {count:,} sessions"
            )
            assert small
            assert client.open(W, "sensor-000007").seq == 1, "and they are all still there"
