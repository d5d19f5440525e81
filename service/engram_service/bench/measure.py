"""One measurement: drives a server, measures plain libraries beside it, and checks its outputs."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_service.bench.alone import share
from engram_service.bench.ceiling import Ceiling
from engram_service.bench.drive import Load, Options, Target, drive, specs_of, target
from engram_service.bench.load import LoadSpec
from engram_service.bench.plain import PlainResult, measure_plain
from engram_service.bench.types import Progress
from engram_service.bench.workload import W, Workload, has_torch, reference

TOLERANCE = 1e-5
_CEILING_WINDOWS = 3  # before the load, and as many after it


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


def measure(options: Options, progress: Progress, plain: PlainResult | None = None) -> Result:
    """Measures once. `plain`: what the plain server did at this many sessions, if it is known. Raises BenchError."""
    with target(options, progress) as server:
        return _measured(options, server, progress, plain)


def _measured(options: Options, server: Target, progress: Progress, plain: PlainResult | None) -> Result:
    work, directory = server.work, server.directory
    specs = specs_of(options, server)
    runtime = _runtime_alone(options, work, progress)
    ceilings = _ceilings(options, work, progress)
    load = asyncio.run(drive(options, specs, server.http, progress))
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


def _server_figures(load: Load) -> dict[str, Any]:
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
