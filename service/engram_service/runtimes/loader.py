"""Makes the runtime of a bundle: which one, how its batches may be, how many slots its arena has. For catalog.py, in its thread."""

from __future__ import annotations

import logging
from pathlib import Path

from engram_models.batching import Batching
from engram_models.bundle import Bundle, BundleError, load_bundle
from engram_models.examination import Examination
from engram_models.fingerprints import IMPORTED
from engram_models.graph_step import GraphStep
from engram_models.inspection import checked_step
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.base import Runtime
from engram_service.runtimes.devices import Device
from engram_service.runtimes.watchdog import CRASHES_MAX, Crashes, Watchdog
from engram_service.settings import Settings
from engram_service.store import OUTPUTS_MAX

log = logging.getLogger(__name__)

_WINDOW_BYTES = 2048  # of outputs kept for each resident session, within the limits below
_BATCH_BYTES = 32 << 20
_BATCH_S = 0.25  # other models wait meanwhile, and what runs for long is stopped (watchdog.py)
_WINDOW_MIN, _WINDOW_MAX = 8, OUTPUTS_MAX
_CHECK_S = 60.0  # for the recorded check, which an examination has done before, with time to spare


class Loader:
    """Bundles to runtimes on one device. Nothing here imports torch for a bundle with a graph on a CPU."""

    def __init__(self, settings: Settings, device: Device) -> None:
        self._settings = settings
        self._device = device
        self._crashes = Crashes(settings.cache_directory() / "crashes")
        self.watchdog = Watchdog(self._crashes)

    def look(self, path: Path) -> Bundle:
        """What is said of a bundle, which is still to be examined. Raises BundleError, also where it may not be loaded here."""
        bundle = load_bundle(path, whole=False)
        crashes = self._crashes.of(bundle)
        if crashes >= CRASHES_MAX:
            raise BundleError(
                f"{path}: it has ended this server's process {crashes} times and is not served any more; remove it, or mend it, "
                f"or have the count begin anew: delete {self._crashes.file}"
            )
        return bundle

    def runs_graph(self, bundle: Bundle) -> bool:
        """Whether its step is to run on ONNX Runtime."""
        return bool(bundle.graph) and (self._device.is_cpu or bundle.kind == IMPORTED)

    def load(self, bundle: Bundle, found: Examination | None) -> Runtime:
        """`found`: of a bundle whose graph is to be run. Raises BundleError."""
        if found is not None:
            step = self._checked(bundle, found.batching)
            from engram_service.runtimes.onnx_graphs import OnnxGraphs

            runtime = OnnxGraphs(self._arena(bundle), step, self.watchdog)
            runtime.row_s = found.row_s
            return runtime
        return self._plug_in(bundle) if self._device.is_cpu else self._on_gpu(bundle)

    def stop(self) -> None:
        """Whatever is being loaded ends soon, with an error."""
        self.watchdog.stop()

    def _checked(self, bundle: Bundle, batching: Batching) -> GraphStep:
        """Its step, proved here too: a graph may do something else in this process than where it was examined."""
        run = self.watchdog.begin(bundle, _CHECK_S)
        try:
            return checked_step(bundle, batching, run.options)
        except BundleError as error:
            if not run.stopped:
                raise
            raise BundleError(f"{bundle.path}: {run.stopped}") from error
        finally:
            self.watchdog.end(run)

    def rows_max(self, bundle: Bundle, row_s: float = 0.0) -> int:
        """Rows in one batch: so many that its states, which are there several times on their way to the store, are not much, and
        that it does not take long, where it is known how long a row takes."""
        schema = bundle.schema
        row_nbytes = max(1, schema.state_nbytes + schema.input_nbytes + schema.output_nbytes)
        fitting = min(self._settings.batch_rows_max, _BATCH_BYTES // row_nbytes)
        return max(1, min(fitting, int(_BATCH_S / row_s)) if row_s else fitting)

    def _plug_in(self, bundle: Bundle) -> Runtime:
        """A cell without a graph, which the operator has turned on."""
        try:
            from engram_models.registry import cell_type
        except ImportError as error:
            raise BundleError(
                f"{bundle.path}: its kind {bundle.kind!r} needs torch, which is not installed ({error})"
            ) from error
        if cell_type(bundle.kind) is None:
            raise BundleError(
                f"{bundle.path}: kind {bundle.kind!r} is a plug-in that is not turned on; name it in the setting cells"
            )
        from engram_models.cell_bundles import load_cell
        from engram_service.runtimes.torch_cells import TorchCells, shapes_of

        cell = load_cell(bundle)
        return TorchCells(self._arena(bundle), cell, shapes_of(bundle, cell, self.rows_max(bundle)))

    def _on_gpu(self, bundle: Bundle) -> Runtime:
        import torch

        from engram_models.cell_bundles import load_cell
        from engram_service.runtimes.torch_cuda import CudaArena, CudaGraphs, shapes_on

        capacity, window = self._slots(bundle)
        try:
            cell = load_cell(bundle, self._device.place)
            arena = CudaArena(bundle, capacity, window, self._device.place)
            return CudaGraphs(arena, cell, shapes_on(bundle, cell, self.rows_max(bundle)))
        except torch.OutOfMemoryError as error:
            raise BundleError(f"{self._device.name} has no room for its arena of {capacity} slots: {error}") from error

    def _arena(self, bundle: Bundle) -> Arena:
        return Arena(bundle, *self._slots(bundle))

    def _slots(self, bundle: Bundle) -> tuple[int, int]:
        """How many slots the arena has, and how many outputs each keeps."""
        output_nbytes = max(1, bundle.schema.output_nbytes)
        window = max(_WINDOW_MIN, min(_WINDOW_MAX, _WINDOW_BYTES // output_nbytes))
        slot_nbytes = bundle.schema.state_nbytes + (window + 1) * output_nbytes
        # However large a slot is, a whole batch fits; the number that the operator sets holds in any case.
        fitting = max(self.rows_max(bundle), (self._settings.arena_mb << 20) // slot_nbytes)
        return min(self._settings.arena_slots_max, fitting), window
