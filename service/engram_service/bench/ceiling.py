"""The ceiling: the same cell in plain torch in this process, batched, with no serving at all."""

from __future__ import annotations

import os
import statistics
import time

import torch

from engram_service.bench.load import input_pool
from engram_service.bench.workload import Workload

_WARM_UP = 3


class Ceiling:
    """Measured in windows, some before the load and some after it, so that a machine that changes its pace shows in both."""

    def __init__(self, work: Workload, batch: int, window_s: float) -> None:
        self._work, self._batch, self._window_s = work, batch, window_s
        self._rates: list[float] = []
        self._threads = self._fastest()

    @property
    def steps_per_s(self) -> float:
        """The median of all windows, with the number of threads that is fastest here."""
        return statistics.median(self._rates)

    def measure(self, windows: int) -> None:
        self._rates += [self._window(self._window_s, self._threads) for _ in range(windows)]

    def _fastest(self) -> int:
        if self._work.device.type == "cuda":
            return 1
        cores = len(os.sched_getaffinity(0))
        rates = {count: self._window(self._window_s / 2, count) for count in sorted({1, max(1, cores // 2), cores})}
        return max(rates, key=lambda count: rates[count])

    def _window(self, seconds: float, threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return _rate(self._work, self._batch, seconds)
        finally:
            torch.set_num_threads(before)


def _rate(work: Workload, batch: int, seconds: float) -> float:
    pool = torch.from_numpy(input_pool(0, batch, work.input_shape)).to(work.device)
    state = work.initial(batch)
    with torch.inference_mode():
        for number in range(_WARM_UP):
            _, state = work.step(pool[number % len(pool)], state)
        steps, begun = 0, time.perf_counter()
        while (took := time.perf_counter() - begun) < seconds:
            _, state = work.step(pool[steps % len(pool)], state)
            steps += 1
            if work.device.type == "cuda":
                torch.cuda.synchronize(work.device)  # what is only queued has not been computed
    return steps * batch / took
