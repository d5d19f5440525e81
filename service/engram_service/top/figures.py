"""What two looks at servers say: where sessions are, and how much of what was done between the looks. Plain dicts, for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engram_service.observability.stages import STAGES
from engram_service.top.scrape import Scrape


def figures(before: Sequence[Scrape], after: Sequence[Scrape]) -> dict[str, Any]:
    """Servers one by one, and all of them together.

    Rates are per second between the looks; a server that was not there at the first, or has started anew since, has none yet.
    Latencies are milliseconds, interpolated in the buckets of the server's histograms; None where nothing was done.
    """
    pairs = list(zip(before, after, strict=True))
    servers = [{"address": new.address, **_server(old, new)} for old, new in pairs]
    up = [(old, new) for old, new in pairs if not new.error]
    return {
        "servers": servers,
        "total": {
            "servers_up": len(up),
            "sessions": sum(server["sessions"]["known"] for server in servers if server["up"]),
            "streams": sum(server["streams"] for server in servers if server["up"]),
            "steps_per_s": sum(server["steps_per_s"] or 0.0 for server in servers if server["up"]),
            "models": _models(up),
            "latency_ms": {stage: _latency(up, stage) for stage in STAGES},
        },
    }


def _server(old: Scrape, new: Scrape) -> dict[str, Any]:
    if new.error:
        return {"up": False, "error": new.error}
    sessions = {key: int(value) for key, value in new.by("engram_sessions", "residency").items()}
    rows = _more(old, new, "engram_batch_rows_sum")
    batches = _more(old, new, "engram_batch_rows_count")
    return {
        "up": True,
        "sessions": {"known": sum(sessions.values()), **sessions},
        "streams": int(new.sum("engram_streams")),
        "rows_in_flight": int(new.sum("engram_rows_in_flight")),
        "steps_per_s": _rate(old, new, "engram_steps_total", outcome="ok"),
        "refused_per_s": _rates(old, new, "engram_rows_refused_total", "reason"),
        "rows_per_batch": rows / batches if rows is not None and batches else None,
        "busy": _rate(old, new, "engram_loop_busy_seconds_total"),
        "commit_bytes_per_s": _rate(old, new, "engram_commit_bytes_total"),
        "latency_ms": {stage: _latency([(old, new)], stage) for stage in STAGES},
        "redis_up": bool(new.sum("engram_redis_up")),
        "redis_memory_bytes": int(new.sum("engram_redis_memory_bytes")),
        "memory_bytes": int(new.sum("process_resident_memory_bytes")),
    }


def _models(up: Sequence[tuple[Scrape, Scrape]]) -> dict[str, dict[str, float]]:
    """Steps a second of each model, by what became of them, where there were any."""
    models: dict[str, dict[str, float]] = {}
    for old, new in up:
        for model in sorted(new.by("engram_steps_total", "model")):
            for outcome, rate in _rates(old, new, "engram_steps_total", "outcome", model=model).items():
                found = models.setdefault(model, {})
                found[outcome] = found.get(outcome, 0.0) + rate
    return models


def _more(old: Scrape, new: Scrape, name: str, **labels: str) -> float | None:
    """How much a counter has grown."""
    grown = new.sum(name, **labels) - old.sum(name, **labels)
    return None if old.error or grown < 0 or new.at <= old.at else grown


def _rate(old: Scrape, new: Scrape, name: str, **labels: str) -> float | None:
    grown = _more(old, new, name, **labels)
    return None if grown is None else grown / (new.at - old.at)


def _rates(old: Scrape, new: Scrape, name: str, label: str, **labels: str) -> dict[str, float]:
    """The rates that are not 0, by the value of a label."""
    pairs = {
        label_value: _rate(old, new, name, **labels, **{label: label_value})
        for label_value in new.by(name, label, **labels)
    }
    return {value: rate for value, rate in pairs.items() if rate}


def _latency(pairs: Sequence[tuple[Scrape, Scrape]], stage: str) -> dict[str, float] | None:
    """p50 and p99 of a stage. Its histogram has one observation a step."""
    counts: dict[float, float] = {}
    for old, new in pairs:
        edges = new.by("engram_stage_seconds_bucket", "le", stage=stage)
        for edge in edges:
            if (grown := _more(old, new, "engram_stage_seconds_bucket", stage=stage, le=edge)) is not None:
                counts[float(edge)] = counts.get(float(edge), 0.0) + grown
    if not counts or not counts[max(counts)]:
        return None
    return {"p50": 1000 * quantile(counts, 0.5), "p99": 1000 * quantile(counts, 0.99)}


def quantile(counts: dict[float, float], part: float) -> float:
    """Of a histogram's cumulative counts by upper edge, as Prometheus's histogram_quantile has it."""
    wanted = part * counts[max(counts)]
    low, below = 0.0, 0.0
    for edge, count in sorted(counts.items()):
        if count >= wanted:
            return low if math.isinf(edge) else low + (edge - low) * (wanted - below) / max(count - below, 1e-9)
        low, below = edge, count
    return low
