"""Bundles are read and examined outside of the data process. What examines one may be killed, or hang, and disturbs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from looping import write_looping

import engram

ServerProcess = Any

ENDLESS = 1e15
HASTY = """
from engram_models.importing import sandbox

real = sandbox.run

def run(call, folder, arguments, memory_bytes, seconds, **more):
    return real(call, folder, arguments, memory_bytes, 3.0 if "hanging" in arguments["path"] else seconds, **more)

sandbox.run = run
"""


class Serving:
    """A server with one model, and a session of it that steps."""

    def __init__(self, server_type: type, directory: Path, faults: str = "") -> None:
        self.models = directory / "models"
        write_looping(self.models, "good")
        flags = ("--models", str(self.models), "--cache-dir", str(directory / "cache"), "--models-poll-s", "0.1")
        self.server: ServerProcess = server_type(directory, *flags)
        self.server.faults = faults
        self.steps = 0.0

    def run(self) -> Iterator[Serving]:
        self.server.start()
        try:
            with engram.Client(self.server.address) as client:
                self.session = client.open("good", "one")
                self.step()
                yield self
        finally:
            self.server.stop()

    def step(self) -> None:
        """Whatever goes on beside it, none is lost."""
        self.steps += 1
        assert self.session.step(np.float32(1)) == self.steps

    def until(self, there: Callable[[], Any]) -> Any:
        """Steps meanwhile."""
        deadline = time.monotonic() + 30
        while not (found := there()):
            assert time.monotonic() < deadline, self.server.tail()
            self.step()
            time.sleep(0.01)
        return found

    def examiners(self, parent: int) -> list[psutil.Process]:
        """The processes that examine a bundle, among the children of this one."""
        found = []
        for one in psutil.Process(parent).children():
            with contextlib.suppress(psutil.Error):
                if "engram_models.importing.sandbox" in one.cmdline():
                    found.append(one)
        return found

    def examiner(self) -> psutil.Process:
        """Waits for the one that the manager has."""
        return self.until(lambda: self.examiners(self.server.pid))[0]

    def said(self, what: str) -> list[str]:
        lines = [json.loads(line)["message"] for line in self.server.log.read_text().splitlines()]
        return [line for line in lines if what in line]


@pytest.fixture
def serving(server_type: type, tmp_path: Path) -> Iterator[Serving]:
    yield from Serving(server_type, tmp_path).run()


@pytest.fixture
def hasty(server_type: type, tmp_path: Path) -> Iterator[Serving]:
    yield from Serving(server_type, tmp_path, HASTY).run()


def test_a_model_is_examined_by_a_process_of_the_managers_that_gives_way_to_steps(serving: Serving) -> None:
    write_looping(serving.models, "endless", ENDLESS)
    examiner = serving.examiner()
    serving.until(lambda: examiner.nice() > psutil.Process(serving.server.pid).nice())
    before = examiner.cpu_times().user
    serving.until(lambda: examiner.cpu_times().user > before + 1)
    assert serving.examiners(serving.server.data_pid) == []
    assert serving.server.ready() == "ready\n"


def test_what_examines_a_model_may_be_killed_once(serving: Serving) -> None:
    with _stopped(serving, "late") as examiner:
        examiner.kill()
    serving.until(lambda: serving.said("model late/1 loaded"))
    (once_more,) = serving.said("late/1 is examined once more")
    assert "killed" in once_more
    assert serving.said("not served") == []


def test_a_model_whose_examination_is_killed_again_is_not_served_until_its_files_change(serving: Serving) -> None:
    write_looping(serving.models, "endless", ENDLESS)
    killed = serving.examiner()
    killed.kill()
    serving.until(lambda: serving.examiners(serving.server.pid) not in ([], [killed]))
    serving.examiner().kill()
    (why,) = serving.until(lambda: serving.said("not served"))
    assert "endless/1" in why and "killed" in why
    os.utime(serving.models / "endless" / "1" / "model.toml")
    serving.examiner()


def test_an_examination_that_hangs_is_ended_and_holds_up_no_other_for_ever(hasty: Serving) -> None:
    with _stopped(hasty, "hanging"):
        write_looping(hasty.models, "later")
        (why,) = hasty.until(lambda: hasty.said("not served"))
        assert "hanging/1" in why and "more than 3 s" in why
    hasty.until(lambda: hasty.said("model later/1 loaded"))


def test_a_data_process_that_dies_meanwhile_is_told_by_the_same_manager(serving: Serving) -> None:
    with _stopped(serving, "late") as examiner:
        old = serving.server.data_pid
        os.kill(old, signal.SIGKILL)
        while not [one for one in psutil.Process(serving.server.pid).children() if _serves(one) and one.pid != old]:
            time.sleep(0.05)
        time.sleep(1)
        examiner.resume()
        serving.until(lambda: serving.said("model late/1 loaded"))
    assert len(serving.said("late/1 is examined")) == 1


def _serves(process: psutil.Process) -> bool:
    try:
        return "engram_service.data_process" in process.cmdline()
    except psutil.Error:
        return False


@contextlib.contextmanager
def _stopped(serving: Serving, name: str) -> Iterator[psutil.Process]:
    """A model comes, and what examines it is stopped as soon as it is there."""
    write_looping(serving.models, name)
    deadline = time.monotonic() + 30
    while not (found := serving.examiners(serving.server.pid)):
        assert time.monotonic() < deadline
    os.kill(found[0].pid, signal.SIGSTOP)
    yield found[0]
