"""The server's runtime with no server around it: gather, run, scatter on an arena, beside the plain library on the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engram_models.bundle import load_bundle
from engram_models.inspection import checked_step
from engram_service.bench.ceiling import Ceiling
from engram_service.bench.types import Plain
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.base import Runtime
from engram_service.runtimes.findings import Findings
from engram_service.runtimes.onnx_graphs import OnnxGraphs
from engram_service.runtimes.watchdog import Watchdog
from engram_service.settings import Settings

ROWS_MAX = 1024  # of a batch, as a server's
_PAIRS, _WINDOW = 5, 8


class Alone:
    """A runtime as bench.types.Plain: its state is the slots of the rows, the first `rows` of its arena."""

    name = "the runtime"

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @contextmanager
    def running(self, threads: int) -> Iterator[None]:
        yield

    def inputs(self, pool: NDArray[np.float32]) -> Sequence[NDArray[np.uint8]]:
        return [np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8) for x in pool]

    def initial(self, rows: int) -> NDArray[np.int32]:
        slots = np.arange(rows, dtype=np.int32)
        self._runtime.arena.reset(slots)
        return slots

    def step(self, x: NDArray[np.uint8], state: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        return self._runtime.step(state, x, None).outputs, state

    def values(self, y: NDArray[np.uint8]) -> NDArray[np.float32]:
        return y.view(np.float32)


def share(path: Path, plain: Plain, input_shape: tuple[int, ...], rows: int, window_s: float) -> tuple[float, float]:
    """(steps/s of the bundle's runtime in batches of `rows`, its share of the plain library's, both with one thread).

    Windows of either alternate; the median of the pairs counts. Raises BundleError.
    """
    rows = min(rows, ROWS_MAX)
    bundle, settings = load_bundle(path), Settings()
    findings = Findings(settings.cache_directory() / "examinations")
    step = checked_step(bundle, findings.of(bundle, settings.batch_rows_max, onnxruntime.__version__).batching)
    runtime = OnnxGraphs(Arena(bundle, ROWS_MAX, _WINDOW), step, Watchdog())
    pair = [Ceiling(one, input_shape, rows, window_s, 1) for one in (Alone(runtime), plain)]
    shares, rates = [], []
    for _ in range(_PAIRS):
        own, other = (one.window() for one in pair)
        shares.append(own / other)
        rates.append(own)
    return statistics.median(rates), statistics.median(shares)
