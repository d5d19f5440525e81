"""Counters and histograms of the step loop: its thread notes plain numbers, and they become samples when somebody scrapes.

prometheus_client's own take a lock and look for a label's child each time; ten of them cost as much as a batch of one row computes.
One thread observes; any may scrape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

T = TypeVar("T")

_NOTED_MAX = 1024  # observations until they are folded on the path; that takes some tens of microseconds


class Buckets:
    """How many values are below each edge of a histogram, and their sum."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = np.array(edges, np.float64)  # upper ones, ascending
        self._names = [*map(floatToGoString, edges), "+Inf"]
        self._below = np.zeros(len(edges) + 1)  # or at it; the last: all
        self._sum = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Each counts once. Sorting them and looking for the edges takes a third of looking for each of them."""
        self._below[:-1] += np.searchsorted(np.sort(values), self._edges, "right")
        self._below[-1] += len(values)
        self._sum += float(values.sum())

    def add_weighted(self, values: NDArray[np.float64], weights: NDArray[np.int64]) -> None:
        """A value counts as many times as its weight says."""
        at = np.searchsorted(self._edges, values)
        self._below += np.bincount(at, weights, len(self._below)).cumsum()
        self._sum += float(values @ weights)

    def set(self, counts: Sequence[int], total: float) -> None:
        """What others have counted: values by bucket, and their sum."""
        self._below, self._sum = np.cumsum(counts, dtype=np.float64), total

    def sample(self, family: HistogramMetricFamily, labels: Sequence[str], created: float) -> None:
        """Adds them to a metric."""
        family.add_metric(labels, list(zip(self._names, self._below.tolist(), strict=True)), self._sum)
        named = dict(zip(family._labelnames, labels, strict=True))
        family.add_sample(f"{family.name}_created", named, created)


class _Count:
    """One series of a counter."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.created = time.time()

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class DeferredCounter(Collector):
    """A counter that one thread increases."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._series: dict[tuple[str, ...], _Count] = {}
        if not labels:
            self.inc = self.labels().inc  # there from the beginning, as prometheus_client has it

    def labels(self, *values: str) -> _Count:
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = _Count()
        return found

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in list(self._series.items()):
            family.add_metric(values, count.value, created=count.created)
        yield family


class _Observed:
    """One series of a histogram."""

    __slots__ = ("_folding", "_noted", "buckets", "created")

    def __init__(self, edges: Sequence[float]) -> None:
        self.buckets = Buckets(edges)
        self.created = time.time()
        self._noted: list[float] = []
        self._folding = threading.Lock()

    def observe(self, value: float) -> None:
        self._noted.append(value)
        if len(self._noted) >= _NOTED_MAX:
            self.fold(wait=False)

    def fold(self, wait: bool) -> None:
        """Not `wait`: unless somebody else does so just now."""
        if self._folding.acquire(blocking=wait):
            try:
                if noted := drained(self._noted):
                    self.buckets.add(np.array(noted))
            finally:
                self._folding.release()


class DeferredHistogram(Collector):
    """A histogram that one thread observes."""

    def __init__(self, name: str, text: str, edges: Sequence[float], labels: Sequence[str]) -> None:
        self._name, self._text, self._edges, self._labels = name, text, edges, labels
        self._series: dict[tuple[str, ...], _Observed] = {}

    def labels(self, *values: str) -> _Observed:
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = _Observed(self._edges)
        return found

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, observed in list(self._series.items()):
            observed.fold(wait=True)
            observed.buckets.sample(family, values, observed.created)
        yield family


def drained(noted: list[T]) -> list[T]:
    """Takes out what is in a list that another thread appends to: nothing is lost and nothing is taken twice."""
    taken = noted[:]
    del noted[: len(taken)]
    return taken
