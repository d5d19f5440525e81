"""Several tensors in one row: inputs that callers give as a dict of arrays by name, and outputs that they get as one.

On the wire a row is its tensors' bytes, one after the other as the model declares them. Such rows stay bytes until a caller gets
them. A model's one input or output is `RowCodec`'s alone (_arrays.py), an array. Used by _client.py, _core.py and _session.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._arrays import RowCodec
from engram._errors import EngramError, InvalidInputError
from engram._types import TensorSpec

Input: TypeAlias = ArrayLike | Mapping[str, ArrayLike] | Sequence[Mapping[str, ArrayLike]]


class DictCodec:
    """Rows of several named tensors, and RowCodec's methods for them: inside, rows are uint8 [n, nbytes]."""

    def __init__(self, specs: Sequence[TensorSpec], what: str, whole: str) -> None:
        """what: one of them, "input"; whole: all of them, "the input of arm"."""
        self.what = whole
        self.names = [spec.name for spec in specs]
        self._codecs = [RowCodec(spec, f"{what} {spec.name!r}") for spec in specs]
        stops = np.cumsum([codec.nbytes for codec in self._codecs]).tolist()
        self._bounds = list(zip([0, *stops[:-1]], stops, strict=True))
        self.nbytes: int = stops[-1]

    def one(self, x: Any) -> bytes:
        """One row as bytes, a copy. Raises InvalidInputError."""
        given = self._chosen(x)
        return b"".join(codec.one(value) for codec, value in zip(self._codecs, given, strict=True))

    def many(self, x: Any, rows: int | None = None) -> NDArray[np.uint8]:
        """Rows as bytes, uint8 [n, nbytes], copied, of a dict of arrays [n, ...] or of n dicts. Raises InvalidInputError."""
        if isinstance(x, list | tuple) and all(isinstance(row, Mapping) for row in x):
            if rows is not None and len(x) != rows:
                raise InvalidInputError(f"{self.what} must be {rows} dicts; got {len(x)}", reason="INVALID_INPUT_WIDTH")
            return np.frombuffer(b"".join(map(self.one, x)), np.uint8).reshape(len(x), self.nbytes)
        pieces: list[NDArray[np.uint8]] = []
        for codec, value in zip(self._codecs, self._chosen(x), strict=True):
            pieces.append(codec.many(value, rows))
            rows = len(pieces[0])
        return np.concatenate(pieces, axis=1)

    def decode(self, data: bytes, rows: int) -> NDArray[np.uint8]:
        """Rows, read-only. Raises ValueError if the length does not fit."""
        return np.frombuffer(data, np.uint8).reshape(rows, self.nbytes)

    def empty(self, rows: int) -> NDArray[np.uint8]:
        """Room for `rows` rows; zeros."""
        return np.zeros((rows, self.nbytes), np.uint8)

    def given(self, rows: NDArray[np.uint8]) -> dict[str, Any]:
        """Rows [..., nbytes] as callers get them: their own arrays [..., *shape] by name."""
        before = rows.shape[:-1]
        found: dict[str, Any] = {}
        for name, codec, (start, stop) in zip(self.names, self._codecs, self._bounds, strict=True):
            values = codec.decode(rows[..., start:stop].copy(), math.prod(before))
            found[name] = values.reshape((*before, *codec.shape))[()]  # a number where it is one
        return found

    own = given

    def _chosen(self, x: Any) -> list[Any]:
        """The tensors in order. Raises InvalidInputError."""
        names = ", ".join(map(repr, self.names))
        if not isinstance(x, Mapping):
            raise InvalidInputError(
                f"{self.what} must be a dict of arrays by name, {names}; got {_kind(x)}", reason="INVALID_ARGUMENT"
            )
        unknown = [key for key in x if key not in self.names]
        missing = [name for name in self.names if name not in x]
        if unknown or missing:
            faults = [f"lacks {', '.join(map(repr, missing))}"] * bool(missing)
            faults += [f"has {', '.join(map(repr, unknown))}, which the model does not take"] * bool(unknown)
            raise InvalidInputError(
                f"{self.what} {' and '.join(faults)}; it is a dict of {names}", reason="INVALID_ARGUMENT"
            )
        return [x[name] for name in self.names]


Codec: TypeAlias = RowCodec | DictCodec


def codec_of(specs: Sequence[TensorSpec], what: str, model: str) -> Codec:
    """For a model's inputs or outputs; what: "input" or "output"."""
    if len(specs) == 1:
        return RowCodec(specs[0], f"the {what} of {model}")
    if not specs:
        raise EngramError(f"the server says that {model} has no {what}; is it of another edition than this client?")
    return DictCodec(specs, what, f"the {what} of {model}")


def _kind(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else f"an array {list(shape)}"
