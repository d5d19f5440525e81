"""The models that are served: bundles from the repository, each with its runtime and its record layout.

Models keep their index for the life of the process, so that columns may hold it; a version whose directory goes away stays
served for the sessions on it. The manager reads and examines them (examiner.py); here they are loaded, in a thread. What is wrong
with one keeps that one from being served and disturbs no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime

from engram.v1 import model_pb2
from engram_models.bundle import (
    GRAPH,
    MANIFEST,
    WEIGHTS,
    Bundle,
    BundleError,
    BundleRef,
    Repository,
    version_key,
)
from engram_models.examination import Examination
from engram_models.files import Stamp, stamp_of
from engram_models.spec import TensorSpec
from engram_service.errors import ServiceError
from engram_service.examiner import Examiner
from engram_service.observability.metrics import Metrics
from engram_service.offers import no_model
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.base import Runtime
from engram_service.runtimes.loader import Loader
from engram_service.settings import Settings
from engram_service.store import RecordLayout

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_PATIENCE_S = (30.0, 120.0)  # of a start with one model, and with all
_LOOK_S = 0.25


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
    runtime: Runtime
    layout: RecordLayout
    rows_max: int  # in one batch

    @property
    def arena(self) -> Arena:
        return self.runtime.arena

    @property
    def reference(self) -> str:
        return f"{self.bundle.name}/{self.bundle.version}"


class Catalog:
    """Models by name and version. Read by the event loop; the step loop reads `models` by index."""

    def __init__(self, settings: Settings, loader: Loader, metrics: Metrics) -> None:
        self.models: list[Served] = []
        self._settings = settings
        self._loader = loader
        self._metrics = metrics
        self._repository = Repository(settings.model_directories())
        self._versions: dict[str, list[str]] = {}  # name -> versions on disk, ascending
        self._by_key: dict[tuple[str, str], Served] = {}
        self._failed: dict[Path, _Failure] = {}
        self._stamps: dict[int, Stamp] = {}  # by index: of the files, when they were last compared with what is served
        self._replaced: dict[int, str] = {}  # by index: what is to be said where they are not
        self._told: list[str] = []  # what was wrong with the directories at the last look
        self._examiner = Examiner(settings)
        self._lock = asyncio.Lock()
        self._since: float | None = None  # when the bundle that is being loaded was begun
        self._pool = ThreadPoolExecutor(1, "load")
        self.ask: Callable[..., Awaitable[Any]] | None = None
        """Has the manager examine bundles, so that this process's steps do not feel it. Where nobody does, it is done here."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when another model is served."""

    def resolve(self, name: str, version: str = "") -> Served:
        """The named version, or the latest. Raises NotFoundError."""
        versions = self._versions.get(name, [])
        if not version and versions:
            version = versions[-1]
        served = self._by_key.get((name, version))
        if served is not None:
            return served
        raise no_model(name, version, list(self._by_key))

    def describe(self, served: Served) -> model_pb2.Model:
        bundle = served.bundle
        return model_pb2.Model(
            name=bundle.name,
            version=bundle.version,
            kind=bundle.kind,
            fingerprint=bundle.fingerprint,
            inputs=[_spec(spec) for spec in bundle.schema.inputs],
            outputs=[_spec(spec) for spec in bundle.schema.outputs],
            state=[_spec(spec) for spec in bundle.schema.state],
            generates=bundle.schema.generates,
            allows_non_finite=bundle.allows_non_finite,
            latest=self._versions.get(bundle.name, [""])[-1] == bundle.version,
            description=bundle.description,
            batching=served.runtime.batching,
        )

    async def reload(self) -> list[str]:
        """Loads what is new in the repository; returns what is not served and why, which is in the log too."""
        async with self._lock:
            found, errors = await self._in_thread(self._repository.scan)
            for error in errors:
                if error not in self._told:
                    log.error("models: %s", error)
            self._told = errors
            new = [ref for ref in found if (ref.name, ref.version) not in self._by_key]
            for ref in found:
                if there := self._by_key.get((ref.name, ref.version)):
                    await self._compare(ref, there)
                else:
                    await self._load(ref, len(new) - new.index(ref) - 1)
                if (ref.name, ref.version) in self._by_key:  # served from now on, however long the next ones take
                    versions = self._versions.setdefault(ref.name, [])
                    self._versions[ref.name] = sorted({*versions, ref.version}, key=version_key)
                    if there is None:
                        self.on_change()
            paths = {ref.path for ref in found}
            self._failed = {path: failure for path, failure in self._failed.items() if path in paths}
            self._versions = _versions([ref for ref in found if (ref.name, ref.version) in self._by_key])
            failed = [ref for ref in found if ref.path in self._failed]
            failures = [f"{ref.name}/{ref.version}: {self._failed[ref.path].why}" for ref in failed]
            served = [one for ref in found if (one := self._by_key.get((ref.name, ref.version)))]
            return [*errors, *failures, *(self._replaced[one.index] for one in served if one.index in self._replaced)]

    async def begun(self, loading: asyncio.Task[list[str]], stop: asyncio.Event) -> None:
        """Waits for the first `reload` as long as it goes on: one model may take its time without holding up the others."""
        (patience, in_all), began = _PATIENCE_S, time.monotonic()
        while not loading.done() and not stop.is_set():
            now = time.monotonic()
            if (self._since is not None and now - self._since > patience) or now - began > in_all:
                log.warning("serving begins without the models that are still being looked at")
                return
            await asyncio.wait({loading}, timeout=_LOOK_S)

    @property
    def passing(self) -> bool:
        """Whether something is not served for a reason that may pass by itself."""
        return any(failure.passing for failure in self._failed.values())

    def close(self) -> None:
        """Whatever is being loaded is given up."""
        self._loader.stop()
        self._examiner.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _compare(self, ref: BundleRef, served: Served) -> None:
        """Looks whether a served version's files are still those that are served; what is served stays."""
        stamp = await self._in_thread(_stamp, ref)
        if stamp == self._stamps.get(served.index):
            return
        try:
            there = await self._examined(ref.path)
            same = (there["fingerprint"], there["graph"]) == (served.bundle.fingerprint, served.bundle.graph)
        except BundleError as error:
            if error.passing:
                return
            same = False
        self._stamps[served.index] = stamp
        if same:
            self._replaced.pop(served.index, None)
        elif served.index not in self._replaced:
            why = (
                f"{served.reference}: the files in {ref.path} are not those that are served, which stay until a restart"
            )
            self._replaced[served.index] = f"{why}; give another model a version of its own"
            log.warning("model %s", self._replaced[served.index])

    async def _load(self, ref: BundleRef, behind: int) -> None:
        """Serves a bundle, unless it failed before and is still the same. `behind`: how many wait for it."""
        before, stamp = self._failed.get(ref.path), await self._in_thread(_stamp, ref)
        if before is not None and before.stamp == stamp and not before.passing:
            return
        self._since = time.monotonic()
        try:
            bundle = await self._in_thread(self._loader.look, ref.path)
            rows_max = self._loader.rows_max(bundle) if self._loader.runs_graph(bundle) else 0
            found = await self._examined(ref.path, rows_max, behind)
            served = await self._in_thread(self._build, bundle, found, len(self.models))
            if await self._in_thread(_stamp, ref) != stamp or found["fingerprint"] != bundle.fingerprint:
                raise BundleError(f"{ref.path}: its files were changed while it was loaded", passing=True)
        except Exception as error:  # whatever it is, it is this bundle's
            why = str(error) if isinstance(error, BundleError) else f"{type(error).__name__}: {error}"
            passing = isinstance(error, BundleError) and error.passing
            self._failed[ref.path] = _Failure(stamp, why, passing)
            if before is None or (before.stamp, before.why) != (stamp, why):
                self._metrics.model_loads.labels("failed").inc()
                log.error("model not served: %s/%s: %s", ref.name, ref.version, why)
            return
        finally:
            self._since = None
        self._failed.pop(ref.path, None)
        self.models.append(served)
        self._stamps[served.index] = stamp
        self._by_key[ref.name, ref.version] = served
        self._metrics.model_loads.labels("loaded").inc()
        runtime = served.runtime
        log.info(
            "model %s loaded: %s, arena of %d slots, %s",
            served.reference,
            runtime.name,
            runtime.arena.capacity,
            runtime.batching,
        )

    async def _examined(self, path: Path, rows_max: int = 0, behind: int = 0) -> dict[str, Any]:
        """See Examiner. Raises BundleError."""
        asked = {"path": str(path), "rows_max": rows_max, "onnx_runtime": onnxruntime.__version__, "behind": behind}
        try:
            found: dict[str, Any] = await (self.ask or self._examiner.examine)(**asked)
        except ServiceError:  # a manager that does not know how
            found = await self._examiner.examine(**asked)
        if "refused" in found:
            raise BundleError(found["refused"], found["passing"])
        return found

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _build(self, bundle: Bundle, found: dict[str, Any], index: int) -> Served:
        probed = Examination(found["floor"], found["tile"], found["row_s"]) if "floor" in found else None
        runtime = self._loader.load(bundle, probed)
        layout = RecordLayout(bundle.fingerprint, bundle.schema.state_nbytes, bundle.schema.output_nbytes, runtime.code)
        return Served(index, bundle, runtime, layout, self._loader.rows_max(bundle, runtime.row_s))


def _stamp(ref: BundleRef) -> Stamp:
    """So that a bundle that failed is tried again once it was mended."""
    return stamp_of(*(ref.path / name for name in (MANIFEST, WEIGHTS, GRAPH)))


def _versions(found: Sequence[BundleRef]) -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for ref in found:
        versions.setdefault(ref.name, []).append(ref.version)
    return versions


def _spec(spec: TensorSpec) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape, role=spec.role)
