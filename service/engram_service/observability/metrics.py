"""Every metric of the server, in one place. Observed once a batch or a frame, never once a row; no label grows with users. What is
observed with each batch is of deferred.py, and costs next to nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from engram_service.observability.deferred import DeferredCounter, DeferredHistogram
from engram_service.observability.stages import StageSeconds
from engram_service.observability.wire_metrics import WireMetrics

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Counters and histograms that the path updates, and gauges that are read when somebody looks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.wire = WireMetrics()
        self.registry.register(self.wire)

        self.build_info = Gauge(
            "engram_build_info", "What this server is; always 1", ("version", "wire"), registry=self.registry
        )
        counter, gauge, deferred = self._counter, self._gauge, self._deferred
        self.sessions = gauge("sessions", "Sessions known to this server, by where their state is", "residency")
        self.sessions_opened = counter("sessions_opened", "Sessions created or carried on", "how")
        self.sessions_closed = counter("sessions_closed", "Sessions closed and deleted")
        self.sessions_expired = counter("sessions_expired", "Sessions found expired or deleted while attached")
        self.sessions_taken_over = counter(
            "sessions_taken_over", "Sessions that a newer open took from a stream of this server"
        )
        self.sessions_fenced = counter(
            "sessions_fenced", "Commits refused by the store because another server holds the session"
        )
        self.steps = deferred("steps", "Steps by what became of them", "model", "outcome")
        self.batches = deferred("batches", "Calls of a model over ready rows", "model")
        self.batches_stopped = counter("batches_stopped", "Batches that ran too long and were stopped", "model")
        self.batch_rows = DeferredHistogram("engram_batch_rows", "Rows in a batch", _ROWS, ("model",))
        self.registry.register(self.batch_rows)
        self.loop_busy_seconds = deferred(
            "loop_busy_seconds", "Seconds that the step loop had something to do: its rate is the utilisation"
        )
        self.stage_seconds = StageSeconds(
            "engram_stage_seconds", "Seconds of a step by stage, of those that were answered"
        )
        self.registry.register(self.stage_seconds)
        self.commit_bytes = deferred("commit_bytes", "Bytes of records sent to Redis")
        self.commit_rows = deferred("commit_rows", "Records sent to Redis")
        self.records_loaded = counter(
            "records_loaded", "Records read from Redis into an arena, of sessions that had left it", "model"
        )
        went_on = "Sessions that go on in another runtime than the one that wrote their record"
        self.runtime_changes = counter("runtime_changes", went_on, "model", "from", "to")
        self.rows_in_flight = gauge("rows_in_flight", "Rows accepted whose answer has not left")
        self.rows_refused = counter("rows_refused", "Rows refused, by reason", "reason")
        self.streams = gauge("streams", "Open client streams")
        self.calls_denied = counter(
            "calls_denied", "Calls and streams refused for want of a token or a right", "reason"
        )
        self.wire.denied = self.calls_denied
        self.redis_up = gauge("redis_up", "1 while Redis takes commits")
        self.redis_memory_bytes = gauge("redis_memory_bytes", "used_memory of Redis")
        self.redis_unsafe = gauge(
            "redis_unsafe", "1 where Redis may lose what it is given: persistence, eviction, replica or disk", "reason"
        )
        self.redis_losses = gauge(
            "redis_losses", "How often Redis was found to have lost data since this server started"
        )
        self.redis_expired_keys = gauge(
            "redis_expired_keys", "Keys that Redis has expired since it started; a session has two or three"
        )
        self.device_memory_bytes = gauge("device_memory_bytes", "Memory of the arenas", "device")
        self._make_others()

    def _make_others(self) -> None:
        """Of what is beside the path of a step."""
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.recalls = counter(
            "recalls", "Cues by what they recalled: stored, spurious or unsettled", "model", "outcome"
        )
        self.recall_seconds = histogram("recall_seconds", "Seconds of a recall, one observation a call", _SECONDS)
        self.recall_cues = histogram("recall_cues", "Cues in a recall", _ROWS)
        self.patterns = counter("patterns", "Patterns stored and forgotten", "what")
        self.memory_cache_bytes = gauge("memory_cache_bytes", "Pattern memories at hand")
        self.connections_refused = counter(
            "connections_refused", "Connections without a stream that were ended, for too few files were free"
        )
        self.task_failures = counter(
            "task_failures", "Failures of background tasks; what runs all the time was started again", "task"
        )
        self.http_connections_dropped = counter(
            "http_connections_dropped", "Connections of the HTTP port ended for the sake of others, by why", "why"
        )
        self.model_loads = counter("model_loads", "Bundles loaded or refused", "outcome")
        self.model_loads.labels("failed")  # there from the beginning: an increase from nothing is none to Prometheus

    def read_with(self, gauge: Gauge, read: Callable[[], float], *labels: str) -> None:
        """Lets a gauge call `read` when it is scraped."""
        (gauge.labels(*labels) if labels else gauge).set_function(read)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"engram_{name}", text, labels, registry=self.registry)

    def _deferred(self, name: str, text: str, *labels: str) -> DeferredCounter:
        made = DeferredCounter(f"engram_{name}", text, labels)
        self.registry.register(made)
        return made

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"engram_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"engram_{name}", text, labels, buckets=buckets, registry=self.registry)
