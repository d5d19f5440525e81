"""The ceiling: the same model in a plain library in this process, batched, with no serving at all."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

from engram_service.bench.load import input_pool
from engram_service.bench.types import Plain

_WARM_UP = 3


class Ceiling:
    """Measured in windows, some before the load and some after it, so that a machine that changes its pace shows in both."""

    def __init__(
        self, plain: Plain, input_shape: tuple[int, ...], batch: int, window_s: float, most_threads: int = 0
    ) -> None:
        """The number of threads is the one that is fastest here, at most `most_threads` (0: as many as there are cores)."""
        self._plain, self._batch, self._window_s = plain, batch, window_s
        self._inputs = plain.inputs(input_pool(0, batch, input_shape))
        self._rates: list[float] = []
        cores = most_threads or len(os.sched_getaffinity(0))
        self._threads = self._fastest(sorted({1, max(1, cores // 2), cores}))

    @property
    def name(self) -> str:
        return self._plain.name

    @property
    def steps_per_s(self) -> float:
        """The median of all windows."""
        return statistics.median(self._rates)

    def measure(self, windows: int) -> None:
        self._rates += [self.window() for _ in range(windows)]

    def window(self) -> float:
        """Steps/s of one, for those who compare windows themselves."""
        return self._window(self._window_s, self._threads)

    def _fastest(self, counts: Sequence[int]) -> int:
        if len(counts) == 1:
            return counts[0]
        rates = {count: self._window(self._window_s / 2, count) for count in counts}
        return max(rates, key=lambda count: rates[count])

    def _window(self, seconds: float, threads: int) -> float:
        plain, inputs = self._plain, self._inputs
        with plain.running(threads):
            state = plain.initial(self._batch)
            for number in range(_WARM_UP):
                _, state = plain.step(inputs[number % len(inputs)], state)
            steps, begun = 0, time.perf_counter()
            while (took := time.perf_counter() - begun) < seconds:
                _, state = plain.step(inputs[steps % len(inputs)], state)
                steps += 1
        return steps * self._batch / took
