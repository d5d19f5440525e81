"""What callers give as numbers, as numpy arrays; what is none, or would lose something on the way, is refused by name.

Used by _arrays.py, _patterns.py and _memories.py. A masked value is missing: nothing here takes what hides behind a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._errors import InvalidInputError

_DTYPE = "INVALID_INPUT_DTYPE"


def array_of(values: Any, what: str, reason: str = _DTYPE) -> NDArray[Any]:
    """The values as an array of any dtype, perhaps the caller's own memory. Raises InvalidInputError."""
    if _masked(values):
        message = f"{what} has masked values, which are missing; say with .filled(value) what they stand for"
        raise InvalidInputError(message, reason=reason)
    try:
        array = np.asarray(values)
    except Exception as error:  # whatever the caller's own class raises, as a tensor with a gradient does
        if isinstance(error, ValueError) and "inhomogeneous" in str(error):
            ragged = "INVALID_INPUT_WIDTH" if reason == _DTYPE else reason
            raise InvalidInputError(f"{what} is of rows of unequal length, a ragged list", reason=ragged) from error
        why = (str(error).splitlines() or [""])[0]
        raise InvalidInputError(f"{what} is no array: {type(values).__name__}: {why}", reason=reason) from error
    if array.dtype == np.object_:
        raise InvalidInputError(f"{what} is not of numbers: {_named(values)}", reason=reason)
    return array


def hidden_of(values: ArrayLike) -> tuple[ArrayLike, NDArray[np.bool_] | None]:
    """A masked array's data and mask, for calls that take unknown values; anything else as it is, and None."""
    if isinstance(values, np.ma.MaskedArray) and _masked(values):
        return values.data, np.ma.getmaskarray(values)
    return values, None


def narrowed(array: NDArray[Any], dtype: np.dtype[Any], what: str) -> NDArray[Any]:
    """A copy of another dtype. Floats may lose digits; whole numbers may not change, and nothing becomes infinite.

    Raises InvalidInputError.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype.kind == "f" and array.dtype.kind in "iuf":
        bad = np.isinf(cast)
        if array.dtype.kind == "f":
            bad &= ~np.isinf(array)
        elif array.size and array.dtype.itemsize > 1:
            bad |= _inexact(array, cast)
    else:
        bad = np.asarray(cast != array)
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        where = f" at {[int(one) for one in place]}" if place else ""
        raise InvalidInputError(f"{what}: {array[place]!s}{where} does not fit {dtype.name}", reason=_DTYPE)
    return cast


def _inexact(array: NDArray[Any], cast: NDArray[Any]) -> NDArray[np.bool_]:
    """Which whole numbers a float type rounds; in Python's own integers, for a round trip may overflow."""
    exact = 2 ** (np.finfo(cast.dtype).nmant + 1)
    bad = (array > exact) | (array < -exact)
    if bad.any():
        pairs = zip(array[bad].tolist(), cast[bad].tolist(), strict=True)
        bad[bad] = [not np.isfinite(got) or int(got) != given for given, got in pairs]
    return np.asarray(bad)


def _masked(values: Any) -> bool:
    if isinstance(values, np.ma.MaskedArray):
        return bool(np.ma.is_masked(values))
    return isinstance(values, list | tuple) and any(map(_masked, values))


def _named(values: Any) -> str:
    kind = type(values).__name__
    if isinstance(values, Mapping):
        return f"{kind}; give the array alone"
    if hasattr(values, "toarray"):
        return f"{kind}, a sparse matrix; give .toarray()"
    if hasattr(values, "dtype") or isinstance(values, list | tuple):
        return f"{kind} of objects; convert it yourself, and say what missing values stand for"
    return kind
