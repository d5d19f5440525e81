"""The result file and its table in docs/faults.md: what each world and each measured scenario gave, and the sums.

Worlds and scenarios that were not run again are kept, each with the seed that it was run from.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from chaos.campaign import Outcome
from engram._json import json_text

BEGIN, END = "<!-- campaign -->", "<!-- end of campaign -->"
_SUMS = ("faults", "acknowledged", "lost", "doubled", "reordered", "differing", "errors", "rewound")


def write(path: pathlib.Path, outcomes: Sequence[Outcome], measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Puts these into the file; returns what it now holds."""
    gpu = "" if device == "cpu" else f", {torch.cuda.get_device_name(device)}"
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = [*found.get("worlds", []), *(outcome.as_json() for outcome in outcomes)]
    worlds = {(one["world"], one["wire"]): one for one in rows}
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}{gpu}",
        "total": {name: sum(one[name] for one in worlds.values()) for name in _SUMS},
        "measured": found.get("measured", {}) | measured,
        "worlds": list(worlds.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(result, indent=2) + "\n")
    return result


def write_table(page: pathlib.Path, result: dict[str, Any]) -> None:
    """Replaces the table between the page's marks."""
    head, rest = page.read_text().split(BEGIN)
    page.write_text("\n".join([head + BEGIN, *_lines(result), END + rest.split(END)[1]]))


def _lines(result: dict[str, Any]) -> Iterable[str]:
    yield f"{result['machine']}."
    yield ""
    yield "| world | wire | seed | s | " + " | ".join(_SUMS) + " |"
    yield "|---|---|---:|---:|" + "---:|" * len(_SUMS)
    for one in result["worlds"]:
        yield f"| {one['world']} | {one['wire']} | {one['seed']} | {one['seconds']:.0f} | {_cells(one)} |"
    yield f"| **all** | | | {sum(one['seconds'] for one in result['worlds']):.0f} | {_cells(result['total'])} |"
    yield ""
    for name, figures in result["measured"].items():
        yield f"- **{name}**: " + "; ".join(f"{key} {_value(value)}" for key, value in figures.items())


def _cells(one: dict[str, Any]) -> str:
    return " | ".join(f"{one[name]:,}" for name in _SUMS)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_value(one)}" for key, one in value.items()) + ")"
    return ", ".join(map(_value, value)) if isinstance(value, list) else f"{value:,}"
