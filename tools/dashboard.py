"""Writes the Grafana dashboard, deploy/observability/grafana/engram.json, from the panels below. `--check`: is it current?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from engram._json import json_text

PAGE = Path(__file__).resolve().parent.parent / "deploy" / "observability" / "grafana" / "engram.json"
COLUMNS, HEIGHT = 3, 7
WIDTH = 24 // COLUMNS

# Rows of the dashboard: their panels, each a title, a unit of Grafana's, and queries with their legends.
Panel = tuple[str, str, dict[str, str]]
ROWS: dict[str, list[Panel]] = {
    "At a glance": [
        ("Servers", "short", {"up": 'sum(up{job="engram"})', "Redis takes commits": "sum(engram_redis_up)"}),
        ("Steps a second", "ops", {"{{model}}": "sum by (model) (instance:engram_steps:rate1m)"}),
        ("How busy the step loop is", "percentunit", {"{{instance}}": "instance:engram_loop_busy:rate1m"}),
    ],
    "How long a step takes": [
        ("From arrival to answer", "s", {
            "p50 {{instance}}": 'instance_stage:engram_seconds:p50_1m{stage="total"}',
            "p99 {{instance}}": 'instance_stage:engram_seconds:p99_1m{stage="total"}'}),
        ("p99 by stage, the slowest server", "s", {"{{stage}}": "max by (stage) (instance_stage:engram_seconds:p99_1m)"}),
        ("Rows in a batch", "short", {
            "mean {{model}}":
                "sum by (model) (rate(engram_batch_rows_sum[1m])) / sum by (model) (rate(engram_batch_rows_count[1m]))",
            "p95 {{model}}": "histogram_quantile(0.95, sum by (model, le) (rate(engram_batch_rows_bucket[1m])))"}),
    ],
    "Sessions": [
        ("Sessions known", "short", {"{{residency}}": "sum by (residency) (engram_sessions)"}),
        ("Come and go, a second", "ops", {
            "opened: {{how}}": "sum by (how) (rate(engram_sessions_opened_total[1m]))",
            "closed": "sum(rate(engram_sessions_closed_total[1m]))",
            "expired": "sum(rate(engram_sessions_expired_total[1m]))"}),
        ("Taken over and fenced, a second", "ops", {
            "taken over": "sum(rate(engram_sessions_taken_over_total[1m]))",
            "fenced": "sum(rate(engram_sessions_fenced_total[1m]))",
            "records loaded": "sum(rate(engram_records_loaded_total[1m]))"}),
    ],
    "Load and refusals": [
        ("Rows in flight", "short", {"{{instance}}": "sum by (instance) (engram_rows_in_flight)"}),
        ("Rows refused, a second", "ops", {"{{reason}}": "sum by (reason) (instance_reason:engram_rows_refused:rate1m)"}),
        ("Streams, and calls denied a second", "short", {
            "streams {{instance}}": "engram_streams",
            "denied {{reason}}": "sum by (reason) (rate(engram_calls_denied_total[1m]))"}),
    ],
    "The wire": [
        ("Connections", "short", {
            "{{instance}}": "engram_wire_connections",
            "taken a second {{instance}}": "rate(engram_wire_accepted_total[1m])",
            "ended badly a second: {{why}}": "sum by (why) (rate(engram_wire_connections_ended_total[1m]))"}),
        ("Bytes a second", "Bps", {"{{direction}}": "sum by (direction) (rate(engram_wire_bytes_total[1m]))"}),
        ("Busy step loops", "percentunit", {"{{instance}}": "rate(engram_loop_busy_seconds_total[1m])"}),
    ],
    "The wire's inbox": [
        ("Not taken yet", "short", {
            "rows {{instance}}": "engram_wire_inbox_rows", "events {{instance}}": "engram_wire_inbox_events"}),
        ("Age of the oldest that is not taken", "s", {"{{instance}}": "engram_wire_inbox_age_seconds"}),
        ("Refused by the wire, a second", "ops", {"{{reason}}": "sum by (reason) (rate(engram_wire_refused_total[1m]))"}),
    ],
    "Redis and memory": [
        ("Commits", "Bps", {"{{instance}}": "sum by (instance) (rate(engram_commit_bytes_total[1m]))"}),
        ("Redis's memory", "bytes", {"used": "max(engram_redis_memory_bytes)"}),
        ("The servers' memory", "bytes", {
            "resident {{instance}} {{process}}": 'process_resident_memory_bytes{job="engram"}',
            "arenas {{instance}} {{device}}": "engram_device_memory_bytes"}),
    ],
    "Memories and models": [
        ("Cues a second, by what they recalled", "ops", {"{{outcome}}": "sum by (outcome) (rate(engram_recalls_total[1m]))"}),
        ("A recall, p99", "s", {"p99": "histogram_quantile(0.99, sum by (le) (rate(engram_recall_seconds_bucket[1m])))"}),
        ("Bundles loaded and refused", "short", {"{{outcome}} {{instance}}": "engram_model_loads_total"}),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for row, entries in ROWS.items():
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}}
        )
        for at, (title, unit, queries) in enumerate(entries):
            place = {"x": at * WIDTH, "y": y + 1, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(len(panels) + 1, title, unit, queries, place))
        y += 1 + HEIGHT
    return {
        "title": "Engram", "uid": "engram", "schemaVersion": 39, "refresh": "10s", "time": {"from": "now-30m", "to": "now"},
        "tags": ["engram"], "panels": panels,
    }  # fmt: skip


def _panel(number: int, title: str, unit: str, queries: dict[str, str], place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    targets = [
        {"refId": chr(ord("A") + n), "expr": query, "legendFormat": legend, "datasource": source}
        for n, (legend, query) in enumerate(queries.items())
    ]
    defaults = {"unit": unit, "min": 0, "custom": {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}}
    return {
        "id": number, "type": "timeseries", "title": title, "gridPos": place, "datasource": source, "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []}, "options": {"legend": {"displayMode": "list"}},
    }  # fmt: skip


def main() -> int:
    text = json_text(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() == text:
            return 0
        print(f"{PAGE.name} is not what tools/dashboard.py makes: make docs", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
