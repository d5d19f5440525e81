"""What a wire counts, as metrics: read when somebody scrapes, so that steps pay nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_GAUGES = {
    "connections": ("connections", "Connections of clients", 1.0),
    "streams": ("streams", "Streams that the wire has", 1.0),
    "calls": ("calls", "Streams and unary steps under way", 1.0),
    "relayed": ("relayed_calls", "Calls that the wire relays just now", 1.0),
    "inbox_rows": ("inbox_rows", "Rows that have come and that the step loop has not taken", 1.0),
    "inbox_events": ("inbox_events", "Other events that have come and that the step loop has not taken", 1.0),
    "inbox_nbytes": ("inbox_bytes", "Bytes that have come and that the step loop has not taken", 1.0),
    "inbox_age_ms": ("inbox_age_seconds", "How long the oldest of what is not taken has waited", 0.001),
}
# A metric, its label, and the counter of the wire behind each of the label's values.
_COUNTERS = (
    ("accepted", "Connections that were taken", "", {"": "accepted"}),
    ("connections_ended", "Connections that ended badly or were not taken, by why", "why",
     {"turned_away": "turned_away", "failed": "failed", "tls": "tls_failed"}),
    ("bytes", "Bytes received and sent", "direction", {"in": "bytes_in", "out": "bytes_out"}),
    ("unary_steps", "Unary steps, by what the wire made of them; some are rows first, and calls in the end", "as",
     {"row": "step_rows", "call": "step_events"}),
    ("tls_handshakes", "Handshakes done, by version of TLS", "version", {"1.2": "tls_1_2", "1.3": "tls_1_3"}),
    ("refused", "Calls and connections that the wire itself refused, by reason", "reason", {
        "token_missing": "refused_no_token", "token_unknown": "refused_unknown_token",
        "token_revoked": "refused_token_revoked", "too_many_calls": "refused_too_many_calls",
        "no_relay": "refused_no_relay", "headers": "refused_head", "message": "refused_message",
        "resets": "refused_resets"}),
)  # fmt: skip
_DENIED = {"TOKEN_MISSING": "refused_no_token", "TOKEN_UNKNOWN": "refused_unknown_token"}


class WireMetrics(Collector):
    """Registered before `denied`, to which it adds what the wire refused for want of a token since the last look."""

    def __init__(self) -> None:
        self.read: Callable[[], Mapping[str, int]] = dict
        self.denied: Counter | None = None
        self._told: dict[str, int] = {}

    def collect(self) -> Iterator[Metric]:
        counted = self.read()
        self._deny(counted)
        for key, (name, text, scale) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"engram_wire_{name}", text)
            if key in counted:
                gauge.add_metric((), counted[key] * scale)
            yield gauge
        for name, text, label, keys in _COUNTERS:
            counter = CounterMetricFamily(f"engram_wire_{name}", text, labels=(label,) if label else ())
            for value, key in keys.items():
                if key in counted:
                    counter.add_metric((value,) if label else (), counted[key])
            yield counter

    def _deny(self, counted: Mapping[str, int]) -> None:
        if self.denied is None:
            return
        for reason, key in _DENIED.items():
            if more := counted.get(key, 0) - self._told.get(key, 0):
                self.denied.labels(reason).inc(more)
                self._told[key] = counted[key]
