"""Background work that outlives its failures: tasks of the event loop and threads, each under a name.

Work that raises is logged with its name, counted (`engram_task_failures_total{task}`) and started again, later each time; it
never takes the server down with it. While work that the server cannot be without is down, `/readyz` says so
(observability/health.py).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from engram_service.errors import ServiceError
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics

log = logging.getLogger(__name__)

_BACKOFF_S = (0.1, 0.5, 2.0, 10.0)
_SOUND_S = 30.0  # work that ran for so long before it failed begins again with the shortest wait
_FAILING_FROM = 2  # failures in a row before /readyz is told: one is an accident


class Supervisor:
    """Runs background work. `health` is told of work that fails again and again."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._failures = metrics.task_failures
        self._health = health
        self._tasks: set[asyncio.Task[Any]] = set()

    def run(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Starts `work()` as a task, and again whenever it raises, until it returns or the task is cancelled."""

        async def supervised() -> None:
            failed = 0
            while True:
                began = time.monotonic()
                sound = asyncio.get_running_loop().call_later(_SOUND_S, self._health.clear, _named(name))
                try:
                    await work()
                    self._health.clear(_named(name))
                    return
                except asyncio.CancelledError as error:
                    if _is_cancelled():
                        raise
                    # What it waited for was cancelled, and not the work.
                    failed = self._failed(name, error, failed, began)
                except Exception as error:
                    failed = self._failed(name, error, failed, began)
                finally:
                    sound.cancel()
                await asyncio.sleep(_wait_s(failed))

        return self._keep(asyncio.create_task(supervised(), name=name))

    def once(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts work that is done once. A failure is logged and counted, and is in the task for whoever awaits it; a refusal is an
        answer and no failure."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)

        def ended(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ServiceError):
                self._count(name, error)

        task.add_done_callback(ended)
        return task

    def thread(self, name: str, work: Callable[[], None], stopped: threading.Event) -> threading.Thread:
        """A thread, not started yet, that calls `work()`, and again whenever it raises, until it returns or `stopped` is set."""

        def supervised() -> None:
            failed = 0
            while not stopped.is_set():
                began = time.monotonic()
                sound = threading.Timer(_SOUND_S, self._health.clear, (_named(name),)) if failed else None
                if sound is not None:
                    sound.daemon = True
                    sound.start()
                try:
                    work()
                    self._health.clear(_named(name))
                    return
                except Exception as error:
                    failed = self._failed(name, error, failed, began)
                finally:
                    if sound is not None:
                        sound.cancel()
                stopped.wait(_wait_s(failed))

        return threading.Thread(target=supervised, name=name, daemon=True)

    def failed(self, name: str, error: BaseException) -> None:
        """Logs and counts a failure that its place has dealt with otherwise."""
        self._count(name, error)

    def watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Logs and counts what callbacks of the loop raise, and tasks that nobody awaits: asyncio itself would only log it."""

        def caught(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            self._failures.labels("callback").inc()
            log.error("%s (%s)", context["message"], _of_what(context), exc_info=context.get("exception"))

        loop.set_exception_handler(caught)

    async def cancel(self) -> None:
        """Cancels all tasks and waits for them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _failed(self, name: str, error: BaseException, failed: int, began: float) -> int:
        """Failures in a row, this one too."""
        failed = 1 if time.monotonic() - began > _SOUND_S else failed + 1
        self._count(name, error)
        if failed >= _FAILING_FROM:
            self._health.fail(_named(name), f"fails again and again: {type(error).__name__}: {error}")
        return failed

    def _count(self, name: str, error: BaseException) -> None:
        self._failures.labels(name).inc()
        log.error("background task %s failed", name, exc_info=error)


def _is_cancelled() -> bool:
    """Whether somebody has asked the task that runs now to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _of_what(context: dict[str, Any]) -> str:
    """What asyncio says the error came from."""
    return ", ".join(f"{key} {value!r}"[:200] for key, value in context.items() if key not in ("message", "exception"))


def _named(task: str) -> str:
    return f"task {task}"


def _wait_s(failed: int) -> float:
    return _BACKOFF_S[min(failed, len(_BACKOFF_S)) - 1]
