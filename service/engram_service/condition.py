"""What state this server is in: whether it goes away, and whether the store takes writes. Event loop only."""

from __future__ import annotations

import logging

from engram_service.errors import DeadlineExceededError, ServiceError, UnavailableError
from engram_service.observability.metrics import Metrics

log = logging.getLogger(__name__)

_RETRY_MS = 50


class Condition:
    """Set by app.py; asked wherever steps and sessions are let in."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.draining = False
        self.store_trouble = ""  # why the store takes no commits just now; empty: it does
        self.ends = 0  # closes and detaches under way, which a drain waits for

    def check_open(self) -> None:
        """Raises UnavailableError while this server goes away."""
        if self.draining:
            raise UnavailableError("DRAINING", "this server is going away; reconnect", retry_after_ms=_RETRY_MS)

    def set_trouble(self, why: str) -> None:
        if why and not self.store_trouble:
            log.error("the store takes no writes: %s", why)
        elif not why:
            log.info("the store takes writes again")
        self.store_trouble = why
        self._metrics.redis_up.set(0 if why else 1)

    def late(self) -> ServiceError:
        """What a row is told whose time is up."""
        if self.store_trouble:
            reason = "STORE_OUT_OF_MEMORY" if "OOM" in self.store_trouble else "STORE_UNAVAILABLE"
            message = f"the store takes no writes ({self.store_trouble}); repeat the step with the same seq"
            return UnavailableError(reason, message, retry_after_ms=500)
        return DeadlineExceededError("DEADLINE_EXCEEDED", "the step's time was up; repeat it with the same seq")
