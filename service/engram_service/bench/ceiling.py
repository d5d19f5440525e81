"""The ceiling: the same cell in plain torch in this process, batched, with no serving at all."""

from __future__ import annotations

import os
import statistics
import time

import torch

from engram_service.bench.load import input_pool
from engram_service.bench.workload import Workload

_WARM_UP = 3


def ceiling(work: Workload, batch: int, windows: int, window_s: float) -> float:
    """Steps per second at this batch size: the median of `windows`, with the number of threads that is fastest here."""
    if work.device.type == "cuda":
        return statistics.median(_window(work, batch, window_s, 1) for _ in range(windows))
    threads_before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    try:
        trial_s = window_s / 2
        rates = {count: _window(work, batch, trial_s, count) for count in sorted({1, max(1, cores // 2), cores})}
        fastest = max(rates, key=lambda count: rates[count])
        return statistics.median(_window(work, batch, window_s, fastest) for _ in range(windows))
    finally:
        torch.set_num_threads(threads_before)


def _window(work: Workload, batch: int, seconds: float, threads: int) -> float:
    torch.set_num_threads(threads)
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
