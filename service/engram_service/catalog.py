"""The models that are served: bundles from the repository, each with its arena, its runner and its record layout.

Models keep their index for the life of the process, so that columns may hold it; a version whose directory goes away stays
served for the sessions on it. Files are looked at, loaded and probed in a thread of their own; what is wrong with one keeps that
one from being served and disturbs no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from engram.v1 import model_pb2
from engram_models import Bundle, BundleError, BundleRef, Repository, TensorSpec, batch_floor, load_bundle
from engram_models.bundle import MANIFEST, WEIGHTS
from engram_service.engine.arena import Arena
from engram_service.engine.cuda import CudaRunner
from engram_service.engine.runner import TILE_ROWS, Runner, Shapes
from engram_service.engine.step import step_of
from engram_service.engine.traced import traced
from engram_service.errors import NotFound
from engram_service.metrics import Metrics
from engram_service.queries import Queries
from engram_service.settings import Settings
from engram_service.store import OUTPUTS_MAX, RecordLayout

_T = TypeVar("_T")
Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]

log = logging.getLogger(__name__)

_CUDA_TILE = 256  # rows: fewer take a GPU as long, and more of them are little faster as one tile than as several
_WINDOW_BYTES = 2048  # of outputs kept for each resident session, within the limits below
_WINDOW_MIN, _WINDOW_MAX = 8, OUTPUTS_MAX


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a bundle is not served."""

    stamp: Stamp  # of its files then
    why: str
    passing: bool  # worth another try as it is


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One model version and everything that the path of a step needs of it."""

    index: int
    bundle: Bundle
    arena: Arena
    runner: Runner
    layout: RecordLayout
    queries: Queries

    @property
    def reference(self) -> str:
        return f"{self.bundle.name}/{self.bundle.version}"


class Catalog:
    """Models by name and version. Read by the event loop; the engine reads `models` by index."""

    def __init__(self, settings: Settings, device: torch.device, metrics: Metrics) -> None:
        self.models: list[Served] = []
        self._settings = settings
        self._device = device
        self._metrics = metrics
        self._repository = Repository(settings.model_directories())
        self._versions: dict[str, list[str]] = {}  # name -> versions on disk, ascending
        self._by_key: dict[tuple[str, str], Served] = {}
        self._failed: dict[Path, _Failure] = {}
        self._told: list[str] = []  # what was wrong with the directories at the last look
        self._lock = asyncio.Lock()
        self._pool = ThreadPoolExecutor(1, "load", lambda: torch.set_num_threads(1))

    def resolve(self, name: str, version: str = "") -> Served:
        """The named version, or the latest. Raises NotFound."""
        versions = self._versions.get(name, [])
        if not version and versions:
            version = versions[-1]
        served = self._by_key.get((name, version))
        if served is not None:
            return served
        if not any(known == name for known, _ in self._by_key):
            names = ", ".join(sorted({known for known, _ in self._by_key})) or "none"
            raise NotFound("MODEL_NOT_FOUND", f"no model {name!r} is served; there are: {names}", model=name)
        raise NotFound(
            "VERSION_NOT_FOUND", f"model {name!r} has no version {version!r}; it has: {', '.join(versions)}", model=name
        )

    def describe_all(self) -> list[model_pb2.Model]:
        ordered = sorted(self._by_key.values(), key=lambda served: (served.bundle.name, served.index))
        return [self.describe(served) for served in ordered]

    def describe(self, served: Served) -> model_pb2.Model:
        bundle = served.bundle
        return model_pb2.Model(
            name=bundle.name,
            version=bundle.version,
            kind=bundle.kind,
            fingerprint=bundle.fingerprint,
            input=_spec(bundle.input),
            output=_spec(bundle.output),
            state=[_spec(spec) for spec in bundle.state],
            generates=bundle.generates,
            allows_non_finite=bundle.allows_non_finite,
            latest=self._versions.get(bundle.name, [""])[-1] == bundle.version,
            description=bundle.description,
        )

    async def reload(self) -> list[str]:
        """Loads what is new in the repository; returns what could not be loaded and why, which is in the log too."""
        async with self._lock:
            found, errors = await self._in_thread(self._repository.scan)
            for error in errors:
                if error not in self._told:
                    log.error("models: %s", error)
            self._told = errors
            for ref in found:
                if (ref.name, ref.version) not in self._by_key:
                    await self._load(ref)
            paths = {ref.path for ref in found}
            self._failed = {path: failure for path, failure in self._failed.items() if path in paths}
            self._versions = _versions([ref for ref in found if (ref.name, ref.version) in self._by_key])
            failed = [ref for ref in found if ref.path in self._failed]
            return [*errors, *(f"{ref.name}/{ref.version}: {self._failed[ref.path].why}" for ref in failed)]

    async def watch(self) -> None:
        """Reloads when something in the directories changes; runs until cancelled."""
        while True:
            await asyncio.sleep(self._settings.models_poll_s)
            await self.reload()

    async def _load(self, ref: BundleRef) -> None:
        """Serves a bundle, unless it failed before and is still the same."""
        before, stamp = self._failed.get(ref.path), await self._in_thread(_stamp, ref)
        if before is not None and before.stamp == stamp and not before.passing:
            return
        try:
            served = await self._in_thread(self._build, ref, len(self.models))
        except Exception as error:  # whatever it is, it is this bundle's
            why = str(error) if isinstance(error, BundleError) else f"{type(error).__name__}: {error}"
            passing = isinstance(error, BundleError) and error.passing
            self._failed[ref.path] = _Failure(stamp, why, passing)
            if before is None or (before.stamp, before.why) != (stamp, why):
                self._metrics.model_loads.labels("failed").inc()
                log.error("model not served: %s/%s: %s", ref.name, ref.version, why)
            return
        self._failed.pop(ref.path, None)
        self.models.append(served)
        self._by_key[ref.name, ref.version] = served
        self._metrics.model_loads.labels("loaded").inc()
        log.info(
            "model %s loaded, floor %s, arena of %d slots",
            served.reference,
            served.runner.shapes.floor,
            served.arena.capacity,
        )

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _build(self, ref: BundleRef, index: int) -> Served:
        bundle = load_bundle(ref.path, self._device)
        window = max(_WINDOW_MIN, min(_WINDOW_MAX, _WINDOW_BYTES // bundle.output.nbytes))
        state_nbytes = sum(spec.nbytes for spec in bundle.state)
        slot_nbytes = state_nbytes + (window + 1) * bundle.output.nbytes
        # However large a slot is, a whole tick fits; the number that the operator sets holds in any case.
        fitting = max(self._settings.tick_rows_max, (self._settings.arena_mb << 20) // slot_nbytes)
        capacity = min(self._settings.arena_slots_max, fitting)
        try:
            arena = Arena(bundle, capacity, window, self._device)
            shapes, step = self._shapes(bundle), step_of(arena)
            cuda = self._device.type == "cuda"
            runner = CudaRunner(arena, shapes, step) if cuda else Runner(arena, shapes, traced(step, arena))
        except torch.OutOfMemoryError as error:
            raise BundleError(f"{self._device} has no room for its arena of {capacity} slots: {error}") from error
        return Served(
            index,
            bundle,
            arena,
            runner,
            RecordLayout(bundle.fingerprint, state_nbytes, bundle.output.nbytes),
            Queries(bundle),
        )

    def _shapes(self, bundle: Bundle) -> Shapes:
        rows_max = self._settings.tick_rows_max
        if self._device.type == "cuda":  # whose libraries have other kernels for nearly every batch
            if self._alike(bundle, _CUDA_TILE):
                return Shapes.of_tiles(_CUDA_TILE, rows_max)
        elif (floor := batch_floor(bundle.cell, self._device, rows_max)) is not None:
            return Shapes(floor)
        elif self._alike(bundle, TILE_ROWS):
            log.warning("model %s/%s: no batch floor found; batches are of %d", bundle.name, bundle.version, TILE_ROWS)
            return Shapes.of_tiles(TILE_ROWS)
        log.warning("model %s/%s: a row's bits depend on its place; each is a batch", bundle.name, bundle.version)
        return Shapes.of_tiles(1)

    def _alike(self, bundle: Bundle, rows: int) -> bool:
        """Whether it matters nothing where among so many a row stands."""
        return batch_floor(bundle.cell, self._device, rows, [rows]) is not None


def _stamp(ref: BundleRef) -> Stamp:
    """Changes when the bundle's files do, so that a bundle that failed is tried again once it was mended."""
    found: list[tuple[int, int, int] | None] = []
    for name in (MANIFEST, WEIGHTS):
        try:
            file = (ref.path / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((file.st_mtime_ns, file.st_size, file.st_ino))
    return tuple(found)


def _versions(found: Sequence[BundleRef]) -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for ref in found:
        versions.setdefault(ref.name, []).append(ref.version)
    return versions


def _spec(spec: TensorSpec) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape, role=spec.role)
