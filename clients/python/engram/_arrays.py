"""Rows of a model's input and output, between numpy arrays and bytes. Refuses what does not fit before it is sent."""

from __future__ import annotations

from operator import methodcaller
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engram._errors import InvalidInputError
from engram._types import TensorSpec
from engram._values import array_of, narrowed

_BFLOAT16 = "bfloat16"
_BFLOAT16_INFINITY = 0x7F80


class RowCodec:
    """One tensor's rows. bfloat16, which numpy lacks, is float32 for the caller.

    Attributes:
        dtype: what the caller sees.
        shape: one row, without the batch dimension.
        nbytes: one row on the wire.
        own: a caller's copy of one output; a view would keep the whole frame in memory as long as he keeps it.
    """

    own: Final = methodcaller("copy")

    def __init__(self, spec: TensorSpec, what: str) -> None:
        self.what = what
        self.shape = spec.shape
        self._bfloat16 = spec.dtype == _BFLOAT16
        self.dtype: np.dtype[Any] = np.dtype(np.float32 if self._bfloat16 else spec.dtype)
        self._wire = np.dtype(np.uint16) if self._bfloat16 else self.dtype.newbyteorder("<")
        self.nbytes = spec.size * self._wire.itemsize
        self.name = spec.dtype

    def one(self, x: Any) -> bytes:
        """One row as bytes: a copy, which the caller's later changes do not reach. Raises InvalidInputError."""
        if type(x) is np.ndarray and x.dtype == self.dtype and x.shape == self.shape and not self._bfloat16:
            return x.tobytes()
        array = array_of(x, self.what)
        return self._encode(array, self.shape, self._text(self.shape), not hasattr(x, "dtype")).tobytes()

    def many(self, x: Any, rows: int | None = None) -> NDArray[np.uint8]:
        """Rows [n, *shape] as bytes, uint8 [n, nbytes], copied; `rows` is how many there must be. Raises InvalidInputError."""
        array = array_of(x, self.what)
        count = array.shape[0] if array.ndim else 0
        wanted = count if rows is None else rows
        text = self._text(("n" if rows is None else rows, *self.shape))
        encoded = self._encode(array, (wanted, *self.shape), text, not hasattr(x, "dtype"))
        own = encoded.copy() if np.may_share_memory(encoded, array) else encoded
        return own.reshape(wanted, self.nbytes)

    def decode(self, data: bytes | NDArray[np.uint8], rows: int) -> NDArray[Any]:
        """Rows [rows, *shape], read-only where no conversion was needed. Raises ValueError if the length does not fit."""
        values = np.frombuffer(data, self._wire)
        if self._bfloat16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(rows, *self.shape)

    def empty(self, rows: int) -> NDArray[Any]:
        """Room for `rows` rows; zeros, so that what is never filled is not somebody's memory."""
        return np.zeros((rows, *self.shape), self.dtype)

    def given(self, rows: NDArray[Any]) -> Any:
        """Rows as callers get them."""
        return rows

    def _encode(self, array: NDArray[Any], shape: tuple[int, ...], wanted: str, plain: bool) -> NDArray[np.uint8]:
        """`plain`: the caller gave Python's own numbers, which have no dtype."""
        if array.shape != shape:
            got = f"{array.dtype}{list(array.shape)}"
            raise InvalidInputError(f"{self.what} must be {wanted}; got {got}", reason="INVALID_INPUT_WIDTH")
        if array.dtype != self.dtype:
            array = self._cast(array, plain, wanted)
        if self._bfloat16:
            array = self._bfloats(array)
        return np.ascontiguousarray(array, self._wire).reshape(-1).view(np.uint8)

    def _cast(self, array: NDArray[Any], plain: bool, wanted: str) -> NDArray[Any]:
        """Safe casts, and two that everyone expects: float64 to a narrower float, and plain Python numbers that fit."""
        floats = array.dtype.kind == "f" and self.dtype.kind == "f"
        numbers = plain and array.dtype.kind in "biu"
        safe = np.can_cast(array.dtype, self.dtype, "safe")
        if safe or (floats and array.dtype.itemsize >= 8) or numbers:
            return narrowed(array, self.dtype, self.what)
        raise InvalidInputError(
            f"{self.what} must be {wanted}; got {array.dtype}, which does not convert safely; convert it yourself",
            reason="INVALID_INPUT_DTYPE",
        )

    def _bfloats(self, values: NDArray[Any]) -> NDArray[np.uint16]:
        rounded = _to_bfloat16(values)
        if (((rounded & 0x7FFF) == _BFLOAT16_INFINITY) & np.isfinite(values)).any():
            raise InvalidInputError(f"{self.what}: a value does not fit bfloat16", reason="INVALID_INPUT_DTYPE")
        return rounded

    def _text(self, shape: tuple[Any, ...]) -> str:
        return f"{self.name}[{', '.join(map(str, shape))}]" if shape else f"one {self.name}"


def _to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even, as hardware does; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
