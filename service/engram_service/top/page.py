"""The figures as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engram_service.observability.stages import STAGES

_SERVER = (
    "server",
    "",
    "sessions",
    "resident",
    "streams",
    "in flight",
    "steps/s",
    "rows/batch",
    "busy",
    "total p99",
    "memory",
)


def page(found: dict[str, Any]) -> list[str]:
    total = found["total"]
    lines = [
        f"{total['servers_up']} of {len(found['servers'])} servers up   {total['sessions']:,} sessions   "
        f"{total['streams']:,} streams   {total['steps_per_s']:,.0f} steps/s",
        "",
        *_columns([_SERVER, *(_server(server) for server in found["servers"])]),
        "",
        *_columns(
            [("stage", "p50 ms", "p99 ms"), *((stage, *_both(total["latency_ms"][stage], ".3f")) for stage in STAGES)]
        ),
    ]
    if total["models"]:
        rows = [
            (model, f"{rates.get('ok', 0.0):,.0f}", _others(rates)) for model, rates in sorted(total["models"].items())
        ]
        lines += ["", *_columns([("model", "steps/s", "not done/s"), *rows])]
    for server in found["servers"]:
        if not server["up"]:
            lines += ["", f"{server['address']}: {server['error']}"]
        elif server["refused_per_s"]:
            lines += ["", f"{server['address']} refuses: {_reasons(server['refused_per_s'])}"]
    return lines


def _server(server: dict[str, Any]) -> tuple[str, ...]:
    if not server["up"]:
        return (server["address"], "down", *[""] * (len(_SERVER) - 2))
    return (
        server["address"], "up" if server["redis_up"] else "no store", f"{server['sessions']['known']:,}",
        f"{server['sessions'].get('device', 0):,}", f"{server['streams']:,}", f"{server['rows_in_flight']:,}",
        _number(server["steps_per_s"], ",.0f"), _number(server["rows_per_batch"], ",.1f"), _number(server["busy"], ".0%"),
        _both(server["latency_ms"]["total"])[1], f"{server['memory_bytes'] / 1e6:,.0f} MB",
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _both(latency: dict[str, float] | None, form: str = ".1f") -> tuple[str, str]:
    return ("-", "-") if latency is None else (format(latency["p50"], form), format(latency["p99"], form))


def _others(rates: dict[str, float]) -> str:
    return _reasons({outcome: rate for outcome, rate in rates.items() if outcome != "ok"})


def _reasons(rates: dict[str, float]) -> str:
    return ", ".join(f"{reason} {rate:,.0f}/s" for reason, rate in sorted(rates.items()))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    return lines
