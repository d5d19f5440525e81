"""The result file: what each world and each measured scenario gave, and the sums. Worlds that were not run again are kept."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from chaos.campaign import Outcome

_SUMS = ("faults", "acknowledged", "lost", "doubled", "reordered", "differing", "rewound", "errors")


def write(path: pathlib.Path, outcomes: Sequence[Outcome], measured: dict[str, Any]) -> dict[str, Any]:
    """Puts these into the file; returns what it now holds."""
    found = json.loads(path.read_text()) if path.exists() else {}
    worlds = {one["world"]: one for one in [*found.get("worlds", []), *(outcome.as_json() for outcome in outcomes)]}
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "total": {name: sum(one[name] for one in worlds.values()) for name in _SUMS},
        "measured": found.get("measured", {}) | measured,
        "worlds": list(worlds.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result
