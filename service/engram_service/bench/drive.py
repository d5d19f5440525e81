"""Drives a server from client processes, in a closed loop over warm-up and window, and reads its metrics around the window."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from engram_service.bench.load import LoadSpec
from engram_service.bench.types import Progress
from engram_service.bench.workload import W, Workload, device_of, workload_of, workload_w, write_w
from engram_service.local import LocalServer
from engram_service.protocols.http.get import get

_SEED = 1000
_SECONDS_MAX = 86_400
_PROCESS_START_S = 120.0
_PROCESS_END_S = 60.0
_BASE_FLAGS = ("--log-level", "warning", "--log-format", "human", "--arena-slots-max", "16384")


class BenchError(Exception):
    """The measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to measure; the flags of `engram bench`."""

    model: str = W
    models: Path | None = None
    address: str = ""
    http: str = ""
    sessions: int = 1024
    connections: int = 0  # 0: one for each process
    processes: int = 2
    groups: int = 2
    seconds: float = 8.0
    warm_up_s: float = 3.0
    durability: str = "step"
    device: str = "auto"
    plain: bool = True
    server_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Load:
    """What the client processes saw in the window."""

    steps: int
    seconds: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class Target:
    """A server that serves a model."""

    address: str
    http: str  # empty: its metrics are not read
    work: Workload
    directory: Path  # for what is written meanwhile


@contextmanager
def target(options: Options, progress: Progress) -> Iterator[Target]:
    """The server that runs already, or a private one. Raises BenchError."""
    check(options)
    try:
        device = device_of(options.device)
        work = workload_w(device) if options.model == W else workload_of(options.model, options.models, device)
    except ValueError as error:
        raise BenchError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory, models = Path(scratch), options.models
        if options.model == W:
            models = directory / "models"
            work = replace(work, bundle=write_w(models))
        if options.address:
            yield Target(options.address, options.http, work, directory)
            return
        flags = (*_BASE_FLAGS, "--device", options.device, *options.server_flags)
        progress("starting a private server")
        with LocalServer(directory / "server", models, flags) as server:
            yield Target(server.address, server.http, work, directory)


def check(options: Options) -> None:
    if min(options.sessions, options.processes, options.groups) < 1 or not 0 < options.seconds <= _SECONDS_MAX:
        raise BenchError(f"sessions, processes, groups and seconds must be above 0, seconds at most {_SECONDS_MAX}")
    if not 0 <= options.warm_up_s <= _SECONDS_MAX or options.connections < 0:
        raise BenchError(f"warm-up must be from 0 to {_SECONDS_MAX} seconds, connections at least 0")
    if options.connections > options.sessions:
        raise BenchError("more connections than sessions: some would have nothing to send")


def specs_of(options: Options, server: Target) -> list[LoadSpec]:
    """One for each client process, sessions and connections dealt out evenly."""
    processes = min(options.processes, options.sessions)
    connections = max(options.connections, processes)
    return [
        LoadSpec(
            address=server.address, model=server.work.model, input_shape=server.work.input_shape,
            sessions=options.sessions // processes + (number < options.sessions % processes), groups=options.groups,
            connections=connections // processes + (number < connections % processes),
            durability=options.durability, seed=_SEED + number, directory=str(server.directory),
        )
        for number in range(processes)
    ]  # fmt: skip


async def drive(options: Options, specs: list[LoadSpec], http: str, progress: Progress) -> Load:
    """Runs the client processes over warm-up and window. The clock is the system's monotonic one, the same for all."""
    progress(f"opening {options.sessions} sessions from {len(specs)} processes")
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "engram_service.bench.load",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in specs
    ]
    try:
        for process, spec in zip(processes, specs, strict=True):
            _say(process, spec.dumps())
        await asyncio.wait_for(asyncio.gather(*(_ready(process) for process in processes)), _PROCESS_START_S)
        progress(f"warm-up {options.warm_up_s:g} s, then {options.seconds:g} s of {options.durability} durability")
        for process in processes:
            _say(process, "go")
        await _sleep(options.warm_up_s, processes)
        before, begun = await asyncio.to_thread(_scrape, http), time.monotonic()
        await _sleep(options.seconds, processes)
        ended, after = time.monotonic(), await asyncio.to_thread(_scrape, http)
        for process in processes:
            _say(process, "stop")
        codes = await asyncio.wait_for(asyncio.gather(*(process.wait() for process in processes)), _PROCESS_END_S)
    except TimeoutError as error:
        raise BenchError("a client process did not answer in time") from error
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if any(codes):
        raise BenchError("a client process failed; its error is above")
    figures = np.concatenate([np.load(Path(spec.directory) / f"figures-{spec.seed}.npy") for spec in specs])
    return window(figures, begun, ended, before, after)


def _say(process: asyncio.subprocess.Process, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")


async def _ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    if (await process.stdout.readline()).strip() != b"ready":
        raise BenchError("a client process could not open its sessions; its error is above")


async def _sleep(seconds: float, processes: list[asyncio.subprocess.Process]) -> None:
    """Sleeps; wakes up early if a client process dies."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if any(process.returncode is not None for process in processes):
            raise BenchError("a client process ended early; its error is above")
        await asyncio.sleep(min(left, 0.5))


def window(
    figures: NDArray[np.float64], begun: float, ended: float, before: dict[str, float], after: dict[str, float]
) -> Load:
    inside = figures[(figures[:, 0] >= begun) & (figures[:, 0] < ended)]
    if not len(inside):
        raise BenchError("no step was finished in the window; give it more --seconds")
    # Of each step, not of each call: a call of 512 rows is 512 steps that took so long.
    order = np.argsort(inside[:, 1])
    took, rows = inside[order, 1] * 1000, inside[order, 2]
    share = np.cumsum(rows) / rows.sum()
    p50, p99 = (float(took[np.searchsorted(share, part)]) for part in (0.5, 0.99))
    mean = float(np.average(took, weights=rows))
    return Load(int(rows.sum()), ended - begun, p50, p99, mean, before, after)


def _scrape(http: str) -> dict[str, float]:
    """Metrics by name, summed over labels; stages as engram_stage_seconds_sum:stage, and their buckets with :edge behind it. Empty
    without an address."""
    if not http:
        return {}
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(get(http, "/metrics")):
        for sample in family.samples:
            labels = sample.labels
            name = ":".join(
                [sample.name, *((labels["stage"], *labels.get("le", "").split()) if "stage" in labels else ())]
            )
            values[name] = values.get(name, 0.0) + sample.value
    return values
