"""JSON that every reader takes, for `--json` and results. Used by the models' commands and training.

JSON has no NaN and no infinities, and a model may well give them: each is `null`. The same as engram/_json.py, for the models
know nothing of the SDK; tests/house compares them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def json_text(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The value as JSON, in ASCII. default: what to make of objects that JSON does not know."""
    try:
        return json.dumps(value, indent=indent, default=default, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
