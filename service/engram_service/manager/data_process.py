"""The data process as the manager has it: started, watched, ended, started again, and asked for what only it knows."""

from __future__ import annotations

import asyncio
import glob
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_service.control.channel import Channel
from engram_service.errors import ServiceError
from engram_service.examiner import Examiner
from engram_service.manager.spawning import Spawned, spawn
from engram_service.observability.health import Health
from engram_service.offers import Offers
from engram_service.sessions.counts import Page
from engram_service.settings import SettingError
from engram_service.store import StoreError
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_SILENT_LOOKS = 5  # then the process is killed and started again
_COMPUTING_LOOKS = 15  # the same for one that is in a batch, which the watchdog stops after ten seconds
_BACKOFF_S = (0.1, 0.5, 2.0, 10.0)
_SOUND_S = 30.0  # a process that lived so long is started again at once
_GRACE_S = 3.0  # beyond the drain's time and what the process itself allows for an operator that does not end
_ASK_S = 30.0

_NAME = "data process"


@dataclass(frozen=True, slots=True)
class Ready:
    """What a process says when it takes connections."""

    port: int
    device: str
    wire: str


class DataProcess:
    """One, of `engram_service.data_process`. Event loop only."""

    def __init__(
        self, spawned: Spawned, begin: dict[str, Any], page: int, listeners: Sequence[socket.socket], crashes: Path,
        offers: Offers, examiner: Examiner, health: Health, supervisor: Supervisor,
    ) -> None:  # fmt: skip
        """`spawned`: the first one. `begin`: what each is told first. `page`: the file of counts (sessions/counts.py).
        `crashes`: where its watchdog says what it runs."""
        self.begin = begin
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        """Of the first one. Raises what it says that it cannot be started for."""
        self.writing_back = False  # Redis has lost data, and sessions are still to be written to it
        self._page, self._counts = page, Page(page)
        self._listeners = listeners
        self._crashes = crashes
        self._offers = offers
        self._health = health
        self._supervisor = supervisor
        verbs: dict[str, Callable[..., Awaitable[Any]]] = {
                 "ready": self._on_ready, "models": offers.hear, "health": self._on_health, "failed": self._on_failed,
                 "writing_back": self._on_writing_back, "examine": examiner.examine}  # fmt: skip
        self._channel = Channel(supervisor, verbs)
        self._spawned = spawned
        self._stopping = asyncio.Event()
        self._serving = False  # the one that is there may have accepted something
        self._failed: Exception | None = None
        health.fail(_NAME, "it is being started")

    @property
    def pid(self) -> int:
        return self._spawned.process.pid

    async def run(self) -> None:
        """Keeps one going until `stop`."""
        failed = 0
        spawned = self._spawned
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._told_and_watched(spawned)
            if self._stopping.is_set():  # `stop` tells of it
                return
            self._serving = False
            self._counts.clear(self.begin["process"])
            if not self.ready.done() and (self._failed or code >= 0):
                ended = OSError(f"the data process ended ({_told(code)}) before it was ready")
                self.ready.set_exception(self._failed or ended)
                return
            failed = 0 if time.monotonic() - began > _SOUND_S else min(failed + 1, len(_BACKOFF_S))
            wait_s = _BACKOFF_S[failed - 1] if failed else 0.0
            why = f"it ended ({_told(code)}) and is being started again"
            self._health.fail(_NAME, why)
            self._health.hear(_NAME, Health().told())
            log.error("the data process %s; what was accepted and is not answered may be sent again", why)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            if not self._stopping.is_set():
                spawned = self._spawned = spawn()

    async def stop(self, drain_s: float) -> None:
        """It finishes what it accepted, and ends; where it does not in its time, it is ended. Raises OSError where it died before,
        having accepted something."""
        self._stopping.set()
        process, serving = self._spawned.process, self._serving
        process.terminate()
        try:
            await asyncio.wait_for(asyncio.to_thread(process.wait), drain_s + _GRACE_S)
        except TimeoutError:
            log.warning("the data process does not end and is killed; its steps are not answered and may be sent again")
            process.kill()
        else:
            if process.returncode and serving:
                raise OSError(f"the data process ended ({_told(process.returncode)}) before all was done")

    def kill(self) -> None:
        """At once, as the manager ends."""
        self._stopping.set()
        self._spawned.process.kill()

    # What is asked of it. Raises ServiceError; UnavailableError while none is there.

    async def holds(self, keys: Sequence[str]) -> list[str]:
        """Where it has these sessions: "" nowhere, "stored", or "device"."""
        try:
            held: list[str] = await self._channel.call("holds", _ASK_S, keys=list(keys))
        except (ServiceError, TimeoutError):
            return [""] * len(keys)
        return held

    async def flush(self, keys: Sequence[str], seqs: Sequence[int], left_s: float) -> list[int]:
        """For each of these sessions that it holds the last step that is in Redis, once that has all that was applied when it was
        asked, and is at `seqs`, or the time is up; -1: it does not hold it."""
        try:
            durable: list[int] = await self._channel.call(
                "flush", left_s + _ASK_S, keys=list(keys), seqs=list(seqs), left_s=left_s
            )
        except (ServiceError, TimeoutError):
            return [-1] * len(keys)
        return durable

    async def dismiss(self, keys: Sequence[str], kept: Sequence[str]) -> None:
        """It forgets these sessions where it has them under other claims than those in `kept`."""
        await self._channel.call("dismiss", _ASK_S, keys=list(keys), kept=list(kept))

    async def reload(self) -> tuple[list[str], bool]:
        """It looks for models; what is not served and why, and whether it is worth to look again soon. Its models have been told
        when this returns."""
        found = await self._channel.call("reload")
        return found["errors"], found["again"]

    async def metrics(self, timeout_s: float) -> list[dict[str, Any]]:
        """Its metrics; none while it is not there."""
        try:
            found: list[dict[str, Any]] = await self._channel.call("metrics", timeout_s)
        except (ServiceError, TimeoutError):
            return []
        return found

    async def written_back(self, deadline: float) -> None:
        """Returns when no living session is still to be written to a Redis that has lost its data, or at the deadline (seconds,
        monotonic)."""
        if self.writing_back:
            left_s = max(0.0, min(deadline - time.monotonic(), 86_400.0))
            await self._channel.call("written_back", left_s + _ASK_S, left_s=left_s)
            self.writing_back = False

    def renew(self, name: str, value: Any) -> None:
        """Something of `begin` is another one from now on, for this process and those that come after it."""
        self.begin[name] = value
        self._channel.tell(name, **{name: value})

    def tell(self, verb: str, **arguments: Any) -> None:
        """What needs no answer."""
        self._channel.tell(verb, **arguments)

    # What it says

    async def _on_ready(self, port: int, device: str, wire: str) -> None:
        self._health.clear(_NAME)
        self._serving = True
        if not self.ready.done():
            self.ready.set_result(Ready(port, device, wire))
        else:
            log.info("the data process is there again")

    async def _on_health(self, **told: Any) -> None:
        self._health.hear(_NAME, told)

    async def _on_failed(self, kind: str, message: str) -> None:
        self._failed = {"setting": SettingError, "store": StoreError}.get(kind, OSError)(message)

    async def _on_writing_back(self, now: bool) -> None:
        self.writing_back = now

    async def _told_and_watched(self, spawned: Spawned) -> int:
        """Tells it what it shall do, and returns how it ended."""
        try:
            spawned.hand_over(self._page, self._listeners)
        except OSError:  # it has ended already
            return await asyncio.to_thread(spawned.process.wait)
        spawned.end.setblocking(False)
        watching = asyncio.create_task(self._watch(spawned.process))
        try:
            await self._channel.run(spawned.end, self.begin)
        finally:
            watching.cancel()
        return await asyncio.to_thread(spawned.process.wait)

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kills a process whose loop does not answer. One that is busy may take some turns for it."""
        while not self.ready.done():
            await asyncio.sleep(_LOOK_S)
        while not self._stopping.is_set():
            if silent := await self._silent(process):
                log.error("the data process has not answered for %d s and is killed", silent * _LOOK_S)
                process.kill()
                return
            await asyncio.sleep(_LOOK_S)

    async def _silent(self, process: subprocess.Popen[bytes]) -> int:
        """For how many looks it has not answered, where that is too long; 0: it answers. A manager that was itself stopped
        meanwhile begins to count anew."""
        ping, silent = asyncio.ensure_future(self._channel.call("ping")), 0
        try:
            while silent < _SILENT_LOOKS or (silent < _COMPUTING_LOOKS and self._computes(process.pid)):
                began = time.monotonic()
                if (await asyncio.wait((ping,), timeout=_LOOK_S))[0]:
                    return 0
                silent = silent + 1 if time.monotonic() - began < 2 * _LOOK_S else 0
        finally:
            ping.cancel()
            await asyncio.gather(ping, return_exceptions=True)  # it may be gone
        return silent

    def _computes(self, pid: int) -> bool:
        """Whether it says that a model runs in one of its threads."""
        for name in glob.glob(f"{glob.escape(str(self._crashes))}/{pid}-*.running"):
            try:
                data = Path(name).read_bytes()
            except OSError:
                continue
            if any(data[48::64]):
                return True
        return False


def _told(code: int) -> str:
    try:
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"
