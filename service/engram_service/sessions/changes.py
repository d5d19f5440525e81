"""Changes of runtime: sessions whose record another runtime wrote than the one that goes on with it. Used by residency.py.

That is allowed: a runtime has the model's weights and equations, but its bits may differ, as between types of machines.
"""

from __future__ import annotations

import logging

import numpy as np

from engram_service.catalog import Served
from engram_service.observability.metrics import Metrics
from engram_service.runtimes.base import NAMES
from engram_service.store import Records

log = logging.getLogger(__name__)


class RuntimeChanges:
    """Counts them, and logs the first of each kind."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[tuple[str, str, str]] = set()

    def note(self, served: Served, records: Records) -> None:
        """These records go into the model's arena."""
        own = served.layout.runtime
        other = (records.runtime != own) & (records.runtime != 0) & (records.seq > 0)
        if not own or not other.any():
            return
        codes, counts = np.unique(records.runtime[other], return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            change = (served.reference, NAMES.get(code, "unknown"), NAMES.get(own, "unknown"))
            self._metrics.runtime_changes.labels(served.bundle.name, *change[1:]).inc(count)
            if change not in self._told:
                self._told.add(change)
                log.warning("sessions of %s, stepped by %s, go on in %s: their next bits may differ", *change)
