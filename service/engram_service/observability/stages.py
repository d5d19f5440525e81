"""Where the time of a step goes, as a histogram by stage. Each step that was answered is observed, though a batch is noted at once.

wire_in   from when the first bytes of its frame were read until all of it was in the inbox
take      until the step loop took it
admit     until it waited for its batch
wait      until its batch began
compute   until the model had computed the batch
commit    until Redis had said OK; none under interval durability
answer    until the wire was given the answer
total     all of these, which follow one another without a gap
wire_out  then, until the answer was given to the kernel; counted by the wire
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from engram_service.observability.deferred import Buckets, drained

STAGES = ("wire_in", "take", "admit", "wait", "compute", "commit", "answer", "wire_out", "total")
EDGES = (
    *(0.000001, 0.0000025, 0.000005, 0.00001, 0.000025, 0.00005),
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

_BATCHES_MAX, _ROWS_MAX = 256, 8192  # noted, until they are folded on the path; that takes some tenths of a millisecond
_BY_ROW = STAGES[:3]  # between the times of a row
_Noted: TypeAlias = tuple[NDArray[np.float64], float, float, float, float]


class StageSeconds(Collector):
    """The step loop notes; any thread may scrape."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self.written: Callable[[], tuple[Sequence[int], float]] | None = None  # of the wire: wire/base.py
        self._stages = {stage: Buckets(EDGES) for stage in STAGES}
        self._noted: list[_Noted] = []
        self._rows = 0  # noted since the path folded last
        self._folding = threading.Lock()
        self._created = time.time()

    def answered(
        self, times: NDArray[np.float64], started: float, computed: float, committed: float, answered: float
    ) -> None:
        """Steps of a batch are answered. times [rows, 4]: as the wire and admission have noted them."""
        self._noted.append((times, started, computed, committed, answered))
        self._rows += len(times)
        if self._rows >= _ROWS_MAX or len(self._noted) >= _BATCHES_MAX:
            self._rows = 0
            if self._folding.acquire(blocking=False):  # or somebody scrapes, and does it
                try:
                    self._fold()
                finally:
                    self._folding.release()

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=("stage",))
        with self._folding:
            self._fold()
            if self.written is not None:
                self._stages["wire_out"].set(*self.written())
            for stage, buckets in self._stages.items():
                buckets.sample(family, (stage,), self._created)
        yield family

    def _fold(self) -> None:
        noted = drained(self._noted)
        if not noted:
            return
        times = np.ascontiguousarray(np.concatenate([batch[0] for batch in noted]).T)  # [4, rows]
        rows = np.array([len(batch[0]) for batch in noted])
        ends = np.fromiter(chain.from_iterable([batch[1:] for batch in noted]), np.float64, 4 * len(noted))
        started, computed, committed, answered = np.ascontiguousarray(ends.reshape(-1, 4).T)  # of each batch
        for number, stage in enumerate(_BY_ROW):
            self._stages[stage].add(times[number + 1] - times[number])
        self._stages["wait"].add(started.repeat(rows) - times[-1])
        self._stages["total"].add(answered.repeat(rows) - times[0])
        self._stages["compute"].add_weighted(computed - started, rows)
        self._stages["answer"].add_weighted(answered - committed, rows)
        waited = committed > computed
        self._stages["commit"].add_weighted((committed - computed)[waited], rows[waited])
