"""Constants of sessions (a sample rate, a language): what a caller gives at `open`, as the OpenFrame has it. Used by _opening.py.

A model's constants are state tensors of role constant. They are set when a session is created, and no step changes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from engram._arrays import RowCodec
from engram._errors import InvalidInputError
from engram._types import ModelInfo
from engram._values import array_of

Constants: TypeAlias = Mapping[str, ArrayLike]
Encoded: TypeAlias = tuple[tuple[str, bytes], ...]  # name and bytes, in the model's order: equal ones mean the same


def encoded(given: Any, info: ModelInfo) -> Encoded:
    """What was given, checked and as bytes. Raises InvalidInputError."""
    if not isinstance(given, Mapping):
        message = f'constants is a dict of values by name, {{"sr": 8000}}; got {type(given).__name__}'
        raise InvalidInputError(message, reason="INVALID_CONSTANT")
    specs = {spec.name: spec for spec in info.constants}
    unknown = [name for name in given if name not in specs]
    if unknown:
        there = f"its constants are {', '.join(f'{name!r} ({spec})' for name, spec in specs.items())}"
        message = f"model {info.name} has no constant {unknown[0]!r}; {there if specs else 'it has none'}"
        raise InvalidInputError(message, reason="INVALID_CONSTANT")
    try:
        return tuple(
            (name, RowCodec(spec, f"constant {name!r} of {info.name}").one(_shaped(given[name], spec.shape)))
            for name, spec in specs.items()
            if name in given
        )
    except InvalidInputError as error:
        raise InvalidInputError(error.message, reason="INVALID_CONSTANT") from error


def _shaped(value: Any, shape: tuple[int, ...]) -> Any:
    """A single number is taken for a tensor of one element too."""
    if isinstance(value, bool | int | float) and shape and not any(size > 1 for size in shape):
        return np.full(shape, value).tolist()  # without a dtype still
    if isinstance(value, np.ndarray | np.generic) and value.size == 1 and not any(size > 1 for size in shape):
        return array_of(value, "a constant").reshape(shape)
    return value
