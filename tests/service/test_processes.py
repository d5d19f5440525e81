"""The two processes of a server: each may die at any moment, and is missed by nobody for long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

import engram
from engram_service.control.channel import Channel
from engram_service.control.metrics import together
from engram_service.errors import NotFoundError, ServiceError
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.supervision import Supervisor

ServerProcess = Any

INPUTS = np.random.default_rng(19).random((40, 8), np.float32)


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


def data_pid(server: ServerProcess) -> int:
    try:
        return server.data_pid
    except (StopIteration, psutil.Error):
        return 0


def another(server: ServerProcess, than: int) -> int:
    """The data process that the manager has started instead of this one."""
    return int(until(lambda: (pid := data_pid(server)) != than and server.ready() == "ready\n" and pid))


def expected(server: ServerProcess, count: int) -> list[bytes]:
    with engram.Client(server.address) as client:
        session = client.open("digits-reader", "undisturbed")
        return [session.step(row).tobytes() for row in INPUTS[:count]]


@pytest.mark.parametrize("durability", ["step", "interval"])
def test_a_data_process_that_is_killed_is_started_again_and_no_step_is_lost(
    server: ServerProcess, durability: str
) -> None:
    wanted = expected(server, 40)
    manager, first = server.pids
    with engram.Client(server.address) as client:
        session = client.open("digits-reader", "s", durability=durability)
        got = [session.step(row).tobytes() for row in INPUTS[:20]]
        os.kill(first, signal.SIGKILL)
        got += [session.step(row).tobytes() for row in INPUTS[20:]]
    assert got == wanted
    assert another(server, first) and server.pid == manager
    assert "ended (signal SIGKILL)" in server.tail()


def test_a_data_process_that_hangs_is_killed_and_started_again(server: ServerProcess) -> None:
    wanted = expected(server, 20)
    first = server.data_pid
    with engram.Client(server.address) as client:
        session = client.open("digits-reader", "s")
        got = [session.step(row).tobytes() for row in INPUTS[:10]]
        os.kill(first, signal.SIGSTOP)
        got += [session.step(row).tobytes() for row in INPUTS[10:20]]
    assert got == wanted
    assert "has not answered for 5 s and is killed" in server.tail()


def test_a_manager_that_was_stopped_kills_nobody(server: ServerProcess) -> None:
    first = server.data_pid
    server.signal(signal.SIGSTOP)
    time.sleep(7.0)
    server.signal(signal.SIGCONT)
    time.sleep(2.0)
    assert server.data_pid == first


def test_a_manager_that_is_killed_takes_its_data_process_with_it_and_leaves_port_and_directory_free(
    server: ServerProcess,
) -> None:
    wanted = expected(server, 20)
    with engram.Client(server.address) as client:
        session = client.open("digits-reader", "s")
        got = [session.step(row).tobytes() for row in INPUTS[:10]]
        data = server.data_pid
        server.restart()  # which waits for nothing in between
        assert not psutil.pid_exists(data) or psutil.Process(data).status() == psutil.STATUS_ZOMBIE
        got += [session.step(row).tobytes() for row in INPUTS[10:20]]
    assert got == wanted


def test_a_data_process_that_cannot_hear_ends_with_its_manager(server: ServerProcess) -> None:
    data = server.data_pid
    os.kill(data, signal.SIGSTOP)
    server.kill()
    until(lambda: not psutil.pid_exists(data) or psutil.Process(data).status() == psutil.STATUS_ZOMBIE, 5)
    server.start()  # which finds the Redis that the other has left


@pytest.mark.parametrize("spawned", [True, False], ids=["while the next one starts", "before the next one is started"])
def test_a_server_that_is_ended_without_a_data_process_has_nothing_to_finish(
    server: ServerProcess, spawned: bool
) -> None:
    first = server.data_pid
    os.kill(first, signal.SIGKILL)
    if spawned:
        until(lambda: data_pid(server) not in (0, first))
    else:
        until(lambda: "is being started again" in server.tail())
    assert server.stop() == 0
    assert "draining" in server.tail() and "before all was done" not in server.tail()


def test_a_data_process_that_dies_as_it_drains_is_told(server: ServerProcess) -> None:
    with engram.Client(server.address) as client:
        client.open("digits-reader", "s").step(INPUTS[0])
        os.kill(server.data_pid, signal.SIGSTOP)  # it cannot begin to drain
        server.terminate()
        time.sleep(0.5)
        os.kill(server.data_pid, signal.SIGKILL)
        assert server.stop() == 1
    assert "ended (signal SIGKILL) before all was done" in server.tail()


def test_management_goes_on_without_a_data_process(server: ServerProcess) -> None:
    """What needs none of its knowledge is answered from Redis; over the wire nothing can be asked while it is gone."""
    with engram.Client(server.address) as client:
        client.open("digits-reader", "s").step(INPUTS[0])
        first = server.data_pid
        os.kill(first, signal.SIGKILL)
        another(server, first)
        assert [session.id for session in client.sessions.list()] == ["s"]
        client.sessions.close("s")


def test_metrics_are_of_both(server: ServerProcess) -> None:
    with engram.Client(server.address) as client:
        client.open("digits-reader", "s").step(INPUTS[0])
        client.sessions.close("s")
    series = server.series()
    assert series['engram_steps_total{model="digits-reader",outcome="ok"}'] == 1  # of the data process
    assert series["engram_sessions_closed_total"] == 1  # of the manager
    assert series["engram_redis_up"] == 1
    assert {name for name in series if name.startswith("process_resident_memory_bytes")} == {
        'process_resident_memory_bytes{process="manager"}',
        'process_resident_memory_bytes{process="0"}',
    }


def test_numbers_of_several_processes_are_put_together() -> None:
    def counted(steps: float, up: float) -> list[dict[str, Any]]:
        return [
            {"name": "engram_steps", "text": "t", "kind": "counter", "samples": [["engram_steps_total", {}, steps]]},
            {"name": "engram_redis_up", "text": "t", "kind": "gauge", "samples": [["engram_redis_up", {}, up]]},
            {"name": "process_x", "text": "t", "kind": "gauge", "samples": [["process_x", {}, steps]]},
        ]

    families = {
        family.name: family.samples for family in together({"manager": counted(0, 0), "0": counted(3, 1)}).collect()
    }
    assert [one.value for one in families["engram_steps"]] == [3]
    assert [one.value for one in families["engram_redis_up"]] == [1]
    assert {one.labels["process"]: one.value for one in families["process_x"]} == {"manager": 0, "0": 3}


async def pair(verbs: dict[str, Any]) -> tuple[Channel, Channel, list[asyncio.Task[None]]]:
    supervisor = Supervisor(Metrics(), Health())
    one, other = socket.socketpair()
    channels = Channel(supervisor, {}), Channel(supervisor, verbs)
    for end in (one, other):
        end.setblocking(False)
    tasks = [asyncio.create_task(channel.run(end)) for channel, end in zip(channels, (one, other), strict=True)]
    await asyncio.sleep(0.05)
    return *channels, tasks


def test_a_channel_carries_answers_and_refusals_and_says_when_the_other_end_is_gone() -> None:
    async def twice(value: int) -> int:
        await asyncio.sleep(0.01 * (5 - value))  # the last one is answered first
        return 2 * value

    async def refuse() -> None:
        raise NotFoundError("SESSION_NOT_FOUND", "there is no such session", session="x")

    async def fail() -> None:
        raise ZeroDivisionError

    async def never() -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        caller, _, tasks = await pair({"twice": twice, "refuse": refuse, "fail": fail, "never": never})
        assert await asyncio.gather(*(caller.call("twice", value=n) for n in range(5))) == [0, 2, 4, 6, 8]
        with pytest.raises(NotFoundError, match="no such session") as refused:
            await caller.call("refuse")
        assert (refused.value.reason, refused.value.metadata) == ("SESSION_NOT_FOUND", {"session": "x"})
        with pytest.raises(ServiceError, match="ZeroDivisionError"):
            await caller.call("fail")
        with pytest.raises(TimeoutError):
            await caller.call("never", 0.05)
        waiting = asyncio.create_task(caller.call("never"))
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        with pytest.raises(ServiceError, match="started again"):
            await waiting
        with pytest.raises(ServiceError, match="started again"):
            await caller.call("twice", value=1)
        caller.tell("twice", value=1)  # to nobody
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_the_folder_of_the_private_socket_is_gone_after_a_stop(server: ServerProcess) -> None:
    command = psutil.Process(server.data_pid).cmdline()
    assert command[-3:] and str(server.pid) in command
    folders = {
        pathlib.Path(one.laddr).parent
        for one in psutil.Process(server.pid).net_connections("unix")
        if "/engram-" in one.laddr
    }
    assert folders and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)
    server.stop()
    assert not any(folder.exists() for folder in folders)
