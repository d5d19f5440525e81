"""The control socket: what a data process answers to its manager, which is this test."""

from __future__ import annotations

import asyncio
import os
import pathlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from engram.v1 import stream_pb2
from engram_service.control.channel import Channel
from engram_service.manager.spawning import spawn
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.sessions import counts
from engram_service.settings import Settings
from engram_service.store import Store, StoreSettings
from engram_service.supervision import Supervisor

pytest.importorskip("engram_native", reason="a data process is handed sockets with the native wire alone")

WAIT_S = 20.0


class Manager:
    """A manager that starts a data process and asks it."""

    def __init__(self, models: pathlib.Path, redis_url: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self._settings = Settings(
            listen=self.address, redis_url=redis_url, models=str(models), shipped_models=False, interval_ms=60_000,
            interval_steps=1_000_000,
        )  # fmt: skip
        self.said: dict[str, Any] = {}
        self._spawned = spawn()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    async def _run(self) -> None:
        def heard(what: str) -> Callable[..., Any]:
            async def hear(**told: Any) -> None:
                self.said[what] = told
                if what == "ready":
                    self._ready.set()

            return hear

        verbs = {name: heard(name) for name in ("ready", "models", "health", "failed", "writing_back")}
        self._channel = Channel(Supervisor(Metrics(), Health()), verbs)
        begin = {
            "process": 0,
            "settings": asdict(self._settings),
            "relay": "/nowhere",
            "tokens": None,
            "certificate": None,
        }
        page = counts.made(1)
        self._spawned.hand_over(page, [self.listener])
        os.close(page)
        self._spawned.end.setblocking(False)
        await self._channel.run(self._spawned.end, begin)

    def begun(self, verb: str, **arguments: Any) -> Any:
        """A call, as a future."""
        return asyncio.run_coroutine_threadsafe(self._channel.call(verb, WAIT_S, **arguments), self._loop)

    def call(self, verb: str, **arguments: Any) -> Any:
        return self.begun(verb, **arguments).result(WAIT_S)

    def stop(self) -> None:
        self._spawned.process.terminate()
        assert self._spawned.process.wait(WAIT_S) == 0
        self._thread.join(WAIT_S)
        self.listener.close()


@pytest.fixture
def manager(digits_alone: Sequence[str], redis_process: Any) -> Iterator[Manager]:
    made = Manager(pathlib.Path(digits_alone[1]), redis_process.url)
    yield made
    made.stop()


def handle_of(raw: Any, name: str, **fields: Any) -> int:
    return int(np.frombuffer(raw.open(name, **fields).handles, np.uint32)[0])


def test_what_is_asked_of_a_data_process(manager: Manager, connect: Callable[[Any], Any], redis_process: Any) -> None:
    assert manager.said["ready"]["device"] == "cpu" and manager.said["ready"]["wire"] == "native"
    assert len(manager.said["models"]["models"]) == 1
    assert manager.call("ping") is None
    store = Store(StoreSettings(redis_process.url))
    raw = connect(manager)
    handle = handle_of(raw, "a", durability=stream_pb2.DURABILITY_INTERVAL)
    for seq in (1, 2, 3):
        raw.step(handle, seq)

    assert manager.call("holds", keys=["a", "nobody"]) == ["device", ""]
    assert _seq(store, "a") == 0, "nothing of it is in Redis"
    assert manager.call("flush", keys=["a", "nobody"], seqs=[0, 0], left_s=5.0) == [3, -1]
    assert _seq(store, "a") == 3

    waiting = manager.begun("flush", keys=["a"], seqs=[4], left_s=WAIT_S)
    with pytest.raises(TimeoutError):
        waiting.result(0.3)
    raw.step(handle, 4)
    assert waiting.result(WAIT_S) == [4] and _seq(store, "a") == 4
    assert manager.call("flush", keys=["a"], seqs=[9], left_s=0.1) == [4], "the time is up"

    raw.step(handle, 5)
    manager.call("release", keys=["a"], left_s=5.0)
    assert raw.next("event").type == stream_pb2.EventFrame.TYPE_TAKEN_OVER
    assert manager.call("holds", keys=["a"]) == [""] and _seq(store, "a") == 5, "what was volatile is committed"

    kept, lost = handle_of(raw, "kept"), handle_of(raw, "lost")
    (token,) = store.holders(["kept"])
    manager.call("dismiss", keys=["kept", "lost"], kept=[token, ""])
    assert raw.next("event").type == stream_pb2.EventFrame.TYPE_CLOSED
    assert manager.call("holds", keys=["kept", "lost"]) == ["stored", ""]
    raw.step(kept, 1)
    raw.steps([lost], [1])
    assert raw.refusal()[0] == "SESSION_CLOSED"
    store.close()


def _seq(store: Store, key: str) -> int:
    info = store.describe(key)
    assert info is not None
    return info.seq


def test_a_data_process_whose_manager_is_gone_ends(digits_alone: Sequence[str], redis_process: Any) -> None:
    made = Manager(pathlib.Path(digits_alone[1]), redis_process.url)
    made._spawned.end.shutdown(socket.SHUT_RDWR)
    assert made._spawned.process.wait(WAIT_S) == 1
    made._thread.join(WAIT_S)
    made.listener.close()


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"cells": "nobody_has:This"}, "setting", "nobody_has"),
        (
            {"wire": "python", "listen": "192.0.2.1:1"},
            "system",
            "cannot be bound",
        ),  # which is nobody's; once all else is there
    ],
)
def test_a_data_process_says_what_it_cannot_be_started_for(
    digits_alone: Sequence[str], redis_process: Any, wrong: dict[str, str], kind: str, says: str
) -> None:
    spawned = spawn()
    page = counts.made(1)
    spawned.hand_over(page, [])
    os.close(page)
    settings = Settings(redis_url=redis_process.url, models=str(digits_alone[1]), **wrong)  # type: ignore[arg-type]
    heard: list[dict[str, Any]] = []

    async def run() -> None:
        async def failed(**told: Any) -> None:
            heard.append(told)

        async def ignored(**told: Any) -> None:
            pass

        channel = Channel(Supervisor(Metrics(), Health()), {"failed": failed, "health": ignored, "models": ignored})
        begin = {"process": 0, "settings": asdict(settings), "relay": "/nowhere", "tokens": None, "certificate": None}
        spawned.end.setblocking(False)
        await channel.run(spawned.end, begin)

    asyncio.run(run())
    assert spawned.process.wait(WAIT_S) == 1
    assert [one["kind"] for one in heard] == [kind] and says in heard[0]["message"]
