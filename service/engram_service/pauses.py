"""Pauses for models whose batches are stopped again and again: whoever shares their threads would wait for each of these batches.

From the second stopped batch on, the model's steps are refused for a while, which doubles with every further one. Then it goes
on, one batch at a time whatever threads are free. All is forgotten once none of its batches has been stopped for ten minutes.
That it has computed others meanwhile does not shorten this: it may be a single caller's inputs that it comes to no end with.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from engram_models.bundle import Bundle
from engram_service.errors import UnavailableError
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics

log = logging.getLogger(__name__)

PAUSE_S = 10.0
PAUSE_S_MAX = 300.0
FORGOTTEN_S = 600.0
_FREE = 1  # stopped batches that have no pause


class Model(Protocol):
    """What is asked of a served model."""

    @property
    def index(self) -> int: ...

    @property
    def bundle(self) -> Bundle: ...


@dataclass(frozen=True, slots=True)
class _Stops:
    """Of one model."""

    name: str
    count: int  # batches that were stopped, each begun after the one before had been
    last: float
    until: float  # the end of the pause


class Pauses:
    """Of all models, by index. Safe to call from any thread."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._stopped = metrics.batches_stopped
        self._health = health
        self._lock = threading.Lock()
        self._stops: dict[int, _Stops] = {}

    def stopped(self, model: Model, began: float) -> None:
        """A batch that was begun then has been stopped."""
        self._stopped.labels(model.bundle.name).inc()
        with self._lock:
            now, before = time.monotonic(), self._stops.get(model.index)
            if before is not None and began <= before.last:
                return  # it ran beside that one
            count, name = 1 if before is None else before.count + 1, model.bundle.reference
            pause = min(PAUSE_S_MAX, PAUSE_S * 2 ** min(count - 1 - _FREE, 16)) if count > _FREE else 0.0
            self._stops[model.index] = _Stops(name, count, now, now + pause)
        if pause:
            why = f"{count} of its batches ran too long and were stopped; after the last one its steps are refused for {pause:g} s"
            log.warning("model %s: %s", name, why)
            self._health.warn(f"model {name}", why)

    def refusal(self, model: int) -> UnavailableError | None:
        """What a step of this model is told just now; None: it may be computed."""
        stops = self._stops.get(model)
        if stops is None or (left := stops.until - time.monotonic()) <= 0:
            return None
        message = (
            f"{stops.count} batches of model {stops.name} ran too long and were stopped, so its steps are refused for another "
            f"{left:.0f} s; send the step again then. If that goes on, an input or the model itself has to be mended"
        )
        return UnavailableError("MODEL_PAUSED", message, retry_after_ms=int(left * 1000) + 1, model=stops.name)

    def bars(self, model: int, running: bool) -> bool:
        """Whether no batch of this model may be begun. `running`: one of it runs in another thread."""
        stops = self._stops.get(model)
        return stops is not None and stops.count > _FREE and (running or time.monotonic() < stops.until)

    def forget(self, now: float) -> None:
        """What is long past."""
        with self._lock:
            past = [model for model, stops in self._stops.items() if now - stops.last > FORGOTTEN_S]
            for stops in (self._stops.pop(model) for model in past):
                self._health.warn(f"model {stops.name}", "")
                if stops.count > _FREE:
                    log.info("model %s: none of its batches had to be stopped for %g s", stops.name, FORGOTTEN_S)
