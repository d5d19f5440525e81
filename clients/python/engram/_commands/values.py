"""Values in text as numbers and arrays: of JSON, of the arguments of commands. Used by _commands/rows.py and `engram stream`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engram._commands.text import TextError, row_of
from engram._json import json_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engram import TensorSpec

_HUGE = 2**1023  # beyond what a float can be asked for


def constant_of(text: str) -> tuple[str, Any]:
    """NAME=VALUE: a number, true or false, numbers with commas between, or JSON lists of them. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ValueError("give NAME=VALUE, as in sr=16000")
    value = value.strip()
    if value in ("true", "false") or value[0] == "[":
        parsed = json_value(value)
        flat(parsed)
        return name.strip(), parsed
    numbers = row_of(value)
    return name.strip(), numbers if len(numbers) > 1 else numbers[0]


def json_value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise TextError(f"column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError:
        raise ValueError("not JSON numbers: too many brackets") from None


def flat(values: Any) -> list[float | int]:
    """The numbers of lists in lists of equal lengths, row by row."""
    import numpy as np

    try:
        array = np.array(values, object)
    except ValueError as error:
        raise ValueError("not JSON numbers: rows of unequal length") from error
    found = array.reshape(-1).tolist()
    for place, value in enumerate(found, 1):
        if isinstance(value, list):
            raise ValueError("not JSON numbers: rows of unequal length")
        if not isinstance(value, int | float):
            raise TextError(f"column {place}: {json_text(value)[:40]} is not a JSON number")
    return found


def tensor_of(values: Sequence[float | int], spec: TensorSpec, columns: Sequence[int]) -> NDArray[Any]:
    """A tensor of values that stand in these columns, from 0."""
    import numpy as np

    kind = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
    if kind.kind == "f":
        with np.errstate(over="ignore"):
            array = np.array([float(value) if abs(value) < _HUGE else np.inf for value in values]).astype(kind)
        fits = np.isfinite(array)
    else:
        low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        fits = np.array([value == value // 1 and low <= value <= high for value in values], np.bool_)
        array = np.array([int(value) if fit else 0 for value, fit in zip(values, fits, strict=True)], kind)
    if not fits.all():
        place = int(np.argmin(fits))
        raise TextError(f"column {columns[place] + 1}: the model takes {spec.dtype}, which {values[place]} is not")
    return array.reshape(spec.shape)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number that JSON or a model takes")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
