"""Patterns between a caller's arrays and the bits of the wire, and what memories answer, as frozen dataclasses. Pure.

A caller's pattern is of -1 and +1, or of 0 and 1, or of booleans; on the wire it is bits in the order of numpy.packbits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._errors import AlreadyExistsError, InvalidInputError
from engram._values import array_of, hidden_of
from engram.v1 import memory_pb2

CUE = "cue"
_BLOCK_ROWS = 1 << 16  # looked at together, so that a large array is not there several times over


@dataclass(frozen=True, slots=True)
class Stored:
    """What a `store` did."""

    labels: list[str]
    """Of the patterns that were stored, in their order: the caller's, or those that the server made."""

    count: int
    """Patterns in the memory now."""

    load: float
    """Patterns a bit, the theory's alpha."""

    warning: str
    """What the theory says of this load, where that is bad news; else empty. It is logged too."""


@dataclass(frozen=True, slots=True, eq=False)
class Recall:
    """What a cue brought back."""

    pattern: NDArray[Any]
    """[N], as the cue was written: -1 and +1 (int8), 0 and 1 (int8) where the cue had a 0, or booleans."""

    label: str
    """Of the nearest stored pattern."""

    overlap: float
    """Of `pattern` with it, -1 to 1; 1 where they are equal."""

    distance: int
    """Bits in which they differ."""

    energies: NDArray[np.float64]
    """[sweeps + 1]: before the first sweep and after each."""

    sweeps: int
    converged: bool
    """False: it was still changing after `sweeps_max` sweeps, or swings between two states."""

    spurious: bool
    """It ended in a state that is no stored pattern."""


@dataclass(frozen=True, slots=True, eq=False)
class Patterns:
    """What a memory holds."""

    labels: list[str]
    patterns: NDArray[np.int8] | None
    """[count, N] of -1 and +1; None: they were not asked for."""

    load: float
    size: int
    """N, bits of a pattern."""

    rule: str
    """"hebb", "storkey", "pseudo-inverse" or "dense"."""


@dataclass(frozen=True, slots=True, eq=False)
class Recreation:
    """What a Boltzmann machine makes of an input."""

    values: NDArray[np.float32]
    """[visible], or [n, visible] of many: the probability of each unit to be 1."""

    energies: NDArray[np.float32]
    """[sweeps + 1], or [n, sweeps + 1]: before the first sweep and after each."""


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """Patterns or cues, ready to be sent.

    Attributes:
        bits: uint8 [n, ceil(size / 8)].
        unknown: the same, 1 where a bit of a cue is not known; None: all are.
        dtype: of the caller's patterns; `zeros`: they are of 0 and 1.
        single: the caller gave one, not a matrix.
    """

    bits: NDArray[np.uint8]
    unknown: NDArray[np.uint8] | None
    size: int
    dtype: np.dtype[Any]
    zeros: bool
    single: bool

    def written(self, bits: NDArray[np.uint8]) -> NDArray[Any]:
        """Bits as the caller writes patterns, [n, size]."""
        plain = np.unpackbits(bits, axis=1, count=self.size)
        if self.dtype == np.bool_:
            return plain.astype(np.bool_)
        values = plain.view(np.int8)
        return values if self.zeros else values * np.int8(2) - np.int8(1)


def bits_of(values: ArrayLike, mask: ArrayLike | None = None, what: str = "pattern") -> Bits:
    """Packs one pattern [N] or many [n, N]. mask: bool [N] or [n, N], True where a bit is unknown; its value is not looked at.
    Masked values of a cue are unknown too.

    Raises InvalidInputError.
    """
    values, hidden = hidden_of(values) if what == CUE else (values, None)
    array = _array(values, what)
    single = array.ndim == 1
    rows = np.atleast_2d(array)
    if rows.ndim != 2 or not rows.size:
        raise _bad(f"a {what} is one row of bits or [n, bits], none of them 0; got {list(array.shape)}")
    unknown = None if mask is None and hidden is None else _unknown(mask, hidden, rows, what)
    packed = np.empty((len(rows), -(-rows.shape[1] // 8)), np.uint8)
    zeros = minus = False
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        known = np.True_ if unknown is None else ~unknown[part]
        on, zero, less = rows[part] == 1, (rows[part] == 0) & known, (rows[part] == -1) & known
        _refuse(rows[part], ~(on | zero | less) & known, start, what)
        zeros |= bool(zero.any())
        minus |= bool(less.any())
        packed[part] = np.packbits(on & known, axis=1)
    if zeros and minus:
        raise _bad(f"{what}s have both 0 and -1; write them with -1 and +1, or with 0 and 1")
    sent = None if unknown is None else np.packbits(unknown, axis=1)
    return Bits(packed, sent, rows.shape[1], array.dtype, zeros, single)


def check_labels(labels: Sequence[str] | str | None, rows: int) -> list[str]:
    """The labels as a list, one a row; empty where the server is to make them. Raises InvalidInputError, AlreadyExistsError."""
    if labels is None:
        return []
    found: list[Any] = [labels] if isinstance(labels, str) else list(labels)
    if any(not isinstance(label, str) or not label for label in found):
        raise _bad("labels are strings, none of them empty")
    if len(found) != rows:
        raise _bad(f"{rows} patterns and {len(found)} labels; give one for each, or none")
    if len(set(found)) < rows:
        twice, _ = Counter(found).most_common(1)[0]
        raise AlreadyExistsError(f"the label {twice!r} is given more than once", reason="DUPLICATE_LABEL")
    return found


def recalls_of(response: memory_pb2.RecallResponse, cues: Bits) -> list[Recall]:
    """The answers to cues, each in the way in which its cue was written."""
    sweeps = np.frombuffer(response.sweeps, "<u4").astype(np.int64)
    patterns = cues.written(np.frombuffer(response.patterns, np.uint8).reshape(len(sweeps), -1))
    energies = np.split(np.frombuffer(response.energies, "<f8"), np.cumsum(sweeps + 1)[:-1])
    columns = zip(
        patterns, response.labels, np.frombuffer(response.overlaps, "<f8").tolist(),
        np.frombuffer(response.distances, "<u4").tolist(), energies, sweeps.tolist(),
        np.frombuffer(response.converged, np.bool_).tolist(), np.frombuffer(response.spurious, np.bool_).tolist(),
        strict=True,
    )  # fmt: skip
    return [Recall(*row) for row in columns]


def _array(values: ArrayLike, what: str) -> NDArray[Any]:
    array = array_of(values, f"a {what}", "INVALID_PATTERN")
    if array.dtype.kind not in "biuf":
        raise _bad(f"a {what} is of numbers, -1 and +1 or 0 and 1; got {array.dtype}")
    return array


def _unknown(
    mask: ArrayLike | None, hidden: NDArray[np.bool_] | None, rows: NDArray[Any], what: str
) -> NDArray[np.bool_]:
    array = np.False_ if mask is None else _mask(mask, rows)
    unknown: NDArray[np.bool_] = np.broadcast_to(array if hidden is None else array | hidden, rows.shape)
    if unknown.all(1).any():
        message = f"{what} {int(unknown.all(1).argmax())}: every bit is masked, so that there is nothing to go by"
        raise InvalidInputError(message, reason="CUE_ALL_MASKED")
    return unknown


def _mask(mask: ArrayLike, rows: NDArray[Any]) -> NDArray[np.bool_]:
    array = array_of(mask, "the mask", "INVALID_PATTERN")
    if array.dtype != np.bool_ or array.shape not in (rows.shape, rows.shape[1:]):
        message = f"mask must be bool{list(rows.shape[1:])} or bool{list(rows.shape)}, True where a bit is unknown"
        raise _bad(f"{message}; got {array.dtype}{list(array.shape)}")
    return array


def _refuse(rows: NDArray[Any], bad: NDArray[np.bool_], start: int, what: str) -> None:
    if bad.any():
        row, bit = (int(place) for place in np.argwhere(bad)[0])
        raise _bad(f"{what} {start + row}, bit {bit} is {rows[row, bit]}; bits are -1 and +1, or 0 and 1")


def _bad(message: str) -> InvalidInputError:
    return InvalidInputError(message, reason="INVALID_PATTERN")
