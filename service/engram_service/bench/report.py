"""Results as a table for people, in the terminal and in docs/benchmarks/, and the machine they were measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from engram_service.bench.measure import TOLERANCE, Result
from engram_service.bench.workload import gpu
from engram_service.store import StoreError
from engram_service.store.private import redis_binary

_PACKAGES = ("engram", "onnxruntime", "torch", "grpcio", "numpy", "redis")
_COLUMNS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("sessions", lambda one: f"{one.sessions:,}"),
    ("connections", lambda one: f"{one.connections}"),
    ("durability", lambda one: one.durability),
    ("steps/s", lambda one: f"{one.steps_per_s:,.0f}"),
    ("p50 ms", lambda one: f"{one.p50_ms:.2f}"),
    ("p99 ms", lambda one: f"{one.p99_ms:.2f}"),
    ("ONNX Runtime steps/s", lambda one: _number(one.ceilings.get("ONNX Runtime"), ",.0f")),
    ("torch steps/s", lambda one: _number(one.ceilings.get("torch"), ",.0f")),
    ("runtime alone", lambda one: _number(one.runtime_ratio, ".2f")),
    ("of ceiling", lambda one: f"{one.ratio:.2f}"),
    ("plain steps/s", lambda one: _number(one.plain_steps_per_s, ",.0f")),
    ("plain p50 ms", lambda one: _number(one.plain_p50_ms, ".2f")),
    ("x plain", lambda one: _number(one.plain_ratio, ".1f")),
    ("batches/s", lambda one: _number(one.batches_per_s, ",.0f")),
    ("rows/batch", lambda one: _number(one.rows_per_batch, ",.1f")),
    ("server MB", lambda one: _number(one.server_rss_mb, ",.0f")),
    ("Redis MB", lambda one: _number(one.redis_mb, ",.1f")),
)


_SHORT = ("sessions", "connections", "durability", "steps/s", "p50 ms", "p99 ms", "of ceiling", "x plain")


def table(results: Sequence[Result], short: bool = False) -> str:
    """A Markdown table, which reads in a terminal too. `short`: the columns that the README has."""
    columns = [column for column in _COLUMNS if not short or column[0] in _SHORT]
    rows = [[name for name, _ in columns], *([shown(one) for _, shown in columns] for one in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def verdict(results: Sequence[Result]) -> str:
    """What the comparison of outputs gave, in a sentence."""
    steps = sum(one.checked_steps for one in results)
    worst = max(one.difference_max for one in results)
    plain = " and ".join(f"plain {name}" for name in results[0].compared_with)
    held = f"equal {plain}" if all(one.outputs_equal for one in results) else f"DIFFER from {plain}"
    return f"Outputs {held} within {TOLERANCE:g}: {steps:,} steps compared, largest difference {worst:.1e}."


def machine() -> dict[str, str]:
    """The machine and the versions, without names and paths of either."""
    found = {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }
    if name := gpu():
        found["gpu"] = name
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    with contextlib.suppress(StoreError):  # there is none here: it was another machine's
        said = subprocess.run([redis_binary(), "--version"], capture_output=True, text=True, check=True).stdout
        found["redis-server"] = next((word[2:] for word in said.split() if word.startswith("v=")), said.strip())
    return found


def _line(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
