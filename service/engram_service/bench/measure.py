"""One measurement: starts what is to be measured, drives it from client processes, reads its metrics, checks its outputs."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from engram_service.bench.alone import share
from engram_service.bench.ceiling import Ceiling
from engram_service.bench.load import LoadSpec
from engram_service.bench.plain import PlainResult, measure_plain
from engram_service.bench.types import Progress
from engram_service.bench.workload import W, Workload, device_of, has_torch, reference, workload_of, workload_w, write_w
from engram_service.local import LocalServer
from engram_service.protocols.http.get import get

TOLERANCE = 1e-5
_CEILING_WINDOWS = 3  # before the load, and as many after it
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
class Result:
    """One line of the table. A figure that was not measured is None.

    ceilings: steps/s of each plain library; ceiling_steps_per_s: of the one that the server uses too, which ratio is to.
    runtime_steps_per_s, runtime_ratio: the server's runtime without the server, beside that library, one thread each (CPUs only).
    """

    model: str
    sessions: int
    connections: int
    durability: str
    steps_per_s: float
    p50_ms: float
    p99_ms: float
    ceilings: dict[str, float]
    ceiling_steps_per_s: float
    ratio: float
    runtime_steps_per_s: float | None
    runtime_ratio: float | None
    plain_steps_per_s: float | None
    plain_p50_ms: float | None
    plain_ratio: float | None
    batches_per_s: float | None
    rows_per_batch: float | None
    server_rss_mb: float | None
    redis_mb: float | None
    stage_ms: dict[str, float]
    steps: int
    seconds: float
    checked_steps: int
    compared_with: tuple[str, ...]
    difference_max: float

    @property
    def outputs_equal(self) -> bool:
        return self.difference_max <= TOLERANCE

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "outputs_equal": self.outputs_equal, "tolerance": TOLERANCE}


@dataclass(frozen=True)
class _Load:
    """What the client processes saw in the window."""

    steps: int
    seconds: float
    p50_ms: float
    p99_ms: float
    before: dict[str, float]
    after: dict[str, float]


def measure(options: Options, progress: Progress, plain: PlainResult | None = None) -> Result:
    """Measures once. `plain`: what the plain server did at this many sessions, if it is known. Raises BenchError."""
    _check(options)
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
            return _measured(options, work, options.address, options.http, directory, progress, plain)
        flags = (*_BASE_FLAGS, "--device", options.device, *options.server_flags)
        progress("starting a private server")
        with LocalServer(directory / "server", models, flags) as server:
            return _measured(options, work, server.address, server.http, directory, progress, plain)


def _check(options: Options) -> None:
    if min(options.sessions, options.processes, options.groups) < 1 or not 0 < options.seconds <= _SECONDS_MAX:
        raise BenchError(f"sessions, processes, groups and seconds must be above 0, seconds at most {_SECONDS_MAX}")
    if not 0 <= options.warm_up_s <= _SECONDS_MAX or options.connections < 0:
        raise BenchError(f"warm-up must be from 0 to {_SECONDS_MAX} seconds, connections at least 0")
    if options.connections > options.sessions:
        raise BenchError("more connections than sessions: some would have nothing to send")


def _measured(
    options: Options,
    work: Workload,
    address: str,
    http: str,
    directory: Path,
    progress: Progress,
    plain: PlainResult | None,
) -> Result:
    specs = _specs(options, work, address, directory)
    runtime = _runtime_alone(options, work, progress)
    ceilings = _ceilings(options, work, progress)
    load = asyncio.run(_drive(options, specs, http, progress))
    for one in ceilings:
        one.measure(_CEILING_WINDOWS)
    top = ceilings[0].steps_per_s
    progress(f"checking outputs against {_names(work)}")
    checked, difference = _compare(work, specs, directory)
    if plain is None and options.plain and options.model == W:
        plain = measure_plain(options.sessions, options.seconds, options.processes, directory, progress)
    rate = load.steps / load.seconds
    return Result(
        model=options.model, sessions=options.sessions, connections=sum(spec.connections for spec in specs),
        durability=options.durability, steps_per_s=rate, p50_ms=load.p50_ms, p99_ms=load.p99_ms,
        ceilings={one.name: one.steps_per_s for one in ceilings}, ceiling_steps_per_s=top, ratio=rate / top,
        runtime_steps_per_s=runtime[0], runtime_ratio=runtime[1],
        plain_steps_per_s=plain.steps_per_s if plain else None, plain_p50_ms=plain.p50_ms if plain else None,
        plain_ratio=rate / plain.steps_per_s if plain else None,
        steps=load.steps, seconds=load.seconds, checked_steps=checked,
        compared_with=tuple(plain.name for plain in work.plains), difference_max=difference,
        **_server_figures(load),
    )  # fmt: skip


def _ceilings(options: Options, work: Workload, progress: Progress) -> list[Ceiling]:
    """Begun before the load; of every plain library that is here."""
    if not has_torch():
        progress("torch is not installed: plain torch is left out (pip install 'engram[torch]' brings it)")
    ceilings = []
    for plain in work.plains:
        progress(f"ceiling: plain {plain.name}, batches of {options.sessions}")
        window_s, threads = min(1.0, options.seconds / 4), 0 if work.on_cpu else 1
        ceilings.append(Ceiling(plain, work.input_shape, options.sessions, window_s, threads))
        ceilings[-1].measure(_CEILING_WINDOWS)
    return ceilings


def _runtime_alone(options: Options, work: Workload, progress: Progress) -> tuple[float | None, float | None]:
    if not work.on_cpu or work.bundle is None:
        return None, None
    progress("the server's runtime alone, beside the plain library on the same rows")
    window_s = min(0.5, options.seconds / 8)
    return share(work.bundle, work.plains[0], work.input_shape, options.sessions, window_s)


def _names(work: Workload) -> str:
    return " and ".join(f"plain {plain.name}" for plain in work.plains)


def _specs(options: Options, work: Workload, address: str, directory: Path) -> list[LoadSpec]:
    """One for each client process, sessions and connections dealt out evenly."""
    processes = min(options.processes, options.sessions)
    connections = max(options.connections, processes)
    return [
        LoadSpec(
            address=address, model=work.model, input_shape=work.input_shape,
            sessions=options.sessions // processes + (number < options.sessions % processes), groups=options.groups,
            connections=connections // processes + (number < connections % processes),
            durability=options.durability, seed=_SEED + number, directory=str(directory),
        )
        for number in range(processes)
    ]  # fmt: skip


async def _drive(options: Options, specs: list[LoadSpec], http: str, progress: Progress) -> _Load:
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
    return _window(figures, begun, ended, before, after)


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


def _window(
    figures: NDArray[np.float64], begun: float, ended: float, before: dict[str, float], after: dict[str, float]
) -> _Load:
    inside = figures[(figures[:, 0] >= begun) & (figures[:, 0] < ended)]
    if not len(inside):
        raise BenchError("no step was finished in the window; give it more --seconds")
    # Of each step, not of each call: a call of 512 rows is 512 steps that took so long.
    order = np.argsort(inside[:, 1])
    took, rows = inside[order, 1] * 1000, inside[order, 2]
    share = np.cumsum(rows) / rows.sum()
    p50, p99 = (float(took[np.searchsorted(share, part)]) for part in (0.5, 0.99))
    return _Load(int(rows.sum()), ended - begun, p50, p99, before, after)


def _scrape(http: str) -> dict[str, float]:
    """Metrics by name, summed over labels; stages as engram_stage_seconds_sum:stage. Empty without an address."""
    if not http:
        return {}
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(get(http, "/metrics")):
        for sample in family.samples:
            name = sample.name + (":" + sample.labels["stage"] if "stage" in sample.labels else "")
            values[name] = values.get(name, 0.0) + sample.value
    return values


def _server_figures(load: _Load) -> dict[str, Any]:
    after = load.after
    delta = {name: value - load.before.get(name, 0.0) for name, value in after.items()}
    batches = delta.get("engram_batches_total", 0.0)
    prefix = "engram_stage_seconds_sum:"
    stages = {
        name.removeprefix(prefix): 1000 * delta[name] / max(1.0, delta.get(name.replace("_sum:", "_count:"), 0.0))
        for name in delta
        if name.startswith(prefix)
    }
    return {
        "batches_per_s": batches / load.seconds if batches else None,
        "rows_per_batch": delta.get("engram_batch_rows_sum", 0.0) / batches if batches else None,
        "server_rss_mb": after["process_resident_memory_bytes"] / 2**20
        if "process_resident_memory_bytes" in after
        else None,
        "redis_mb": after["engram_redis_memory_bytes"] / 2**20 if "engram_redis_memory_bytes" in after else None,
        "stage_ms": stages,
    }


def _compare(work: Workload, specs: list[LoadSpec], directory: Path) -> tuple[int, float]:
    """How many steps were compared with every plain library, and the largest difference."""
    steps, difference = 0, 0.0
    for spec in specs:
        outputs = np.load(directory / f"outputs-{spec.seed}.npy")
        steps += outputs.shape[0] * outputs.shape[1]
        for plain in work.plains:
            expected = reference(plain, work.input_shape, spec.seed, spec.sessions, len(outputs))
            difference = max(difference, float(np.abs(outputs - expected).max()))
    return steps, difference
