"""Background work that fails: the server goes on, says what failed, counts it, and starts it again."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram_service import supervision
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.supervision import Supervisor

WAIT_S = 20.0

# Parts that fail a few times, in the process of a real server: nothing that a client does makes them fail.
FAULTS = """
from engram_service.protocols.engram.unary_stream import UnaryStream
from engram_service.sessions.residency import Residency
from engram_service.steps.deadlines import Deadlines
from engram_service.steps.loop import StepLoop
from engram_service.auth.tokens import TokensFile

def fails(of, name, times, when=lambda one: True):
    real, left = getattr(of, name), [times]
    def work(*arguments, **named):
        if left[0] and when(arguments[0]):
            left[0] -= 1
            raise RuntimeError(f"{name} fails on purpose")
        return real(*arguments, **named)
    setattr(of, name, work)

fails(Deadlines, "sweep", 3)
fails(Residency, "beat", 1)
fails(StepLoop, "_next_batch", 2, lambda loop: loop._scheduler.waiting_rows)
fails(UnaryStream, "tidy", 1)
fails(TokensFile, "watch", 2)
"""
FAILED = {"deadlines": 3, "residency": 1, "callback": 2, "unary tidy": 1, "tokens watch": 2}


def body_of(server: Any, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.promise(11)
def test_a_server_outlives_its_background_work(server_with: Callable[..., Any], connect: Callable[[Any], Any]) -> None:
    server = server_with("--shipped-models", "false")
    server.faults = FAULTS
    with server:
        raw = connect(server)
        handle = int(np.frombuffer(raw.open("kept").handles, np.uint32)[0])
        for seq in range(1, 4):
            raw.step(handle, seq)
        deadline = time.monotonic() + WAIT_S
        while True:
            series = server.series()
            found = {name: series.get(f'engram_task_failures_total{{task="{name}"}}', 0) for name in FAILED}
            if found == FAILED:
                break
            assert time.monotonic() < deadline, series
            time.sleep(0.05)
        assert body_of(server, "healthz")[0] == 200
        assert body_of(server, "readyz")[0] == 503, "what failed again and again may not be well yet"
        raw.step(handle, 4)
        log = server.log.read_text()
        assert "background task deadlines failed" in log and "fails on purpose" in log
        assert server.stop() == 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, Metrics, Health]:
    """A supervisor that waits for nothing."""
    monkeypatch.setattr(supervision, "_BACKOFF_S", (0.0,))
    metrics, health = Metrics(), Health()
    return Supervisor(metrics, health), metrics, health


def failures(metrics: Metrics, task: str) -> float:
    return metrics.registry.get_sample_value("engram_task_failures_total", {"task": task}) or 0.0


def test_work_is_started_again_until_it_returns(watched: tuple[Supervisor, Metrics, Health]) -> None:
    supervisor, metrics, health = watched
    told: list[list[str]] = []

    async def main() -> None:
        async def work() -> None:
            told.append(health.failures())
            if len(told) < 4:
                raise ValueError(f"time {len(told)}")

        await supervisor.run("worker", work)
        assert health.failures() == [], "what has done its work is not failing"

    asyncio.run(main())
    assert failures(metrics, "worker") == 3
    assert told[:2] == [[], []], "one failure is an accident"
    assert told[3] == ["task worker: fails again and again: ValueError: time 3"]


def test_work_whose_wait_was_cancelled_goes_on_and_work_that_is_cancelled_ends(
    watched: tuple[Supervisor, Metrics, Health],
) -> None:
    supervisor, metrics, _ = watched

    async def main() -> None:
        begun = 0
        going = asyncio.Event()

        async def work() -> None:
            nonlocal begun
            begun += 1
            if begun == 1:
                waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                waited.cancel()  # by whoever was to answer it
                await waited
            going.set()
            await asyncio.sleep(60)

        task = supervisor.run("waiter", work)
        await asyncio.wait_for(going.wait(), WAIT_S)
        assert begun == 2 and not task.done()
        await supervisor.cancel()
        assert task.cancelled() and begun == 2

    asyncio.run(main())
    assert failures(metrics, "waiter") == 1


def test_a_thread_is_started_again_until_it_is_stopped(watched: tuple[Supervisor, Metrics, Health]) -> None:
    supervisor, metrics, _ = watched
    stopped, begun = threading.Event(), 0

    def work() -> None:
        nonlocal begun
        begun += 1
        if begun == 3:
            stopped.set()
        raise OSError("no file can be opened")

    thread = supervisor.thread("watcher", work, stopped)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive() and begun == 3 and failures(metrics, "watcher") == 3


def test_what_nobody_awaits_is_counted(watched: tuple[Supervisor, Metrics, Health]) -> None:
    supervisor, metrics, _ = watched

    async def main() -> None:
        supervisor.watch_loop(asyncio.get_running_loop())

        async def load() -> None:
            raise ValueError("a record that nobody expects")

        def answer() -> None:
            raise ValueError("an answer that nobody expects")

        supervisor.once("load", load())
        asyncio.get_running_loop().call_soon_threadsafe(answer)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert failures(metrics, "load") == failures(metrics, "callback") == 1
