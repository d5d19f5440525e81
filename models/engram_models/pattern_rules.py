"""The learning rules of Hopfield networks: from patterns to weights, and how many patterns each carries.

patterns.py keeps a store's weights with it, hopfield.py those of a served cell. Weights W are symmetric with a zero diagonal,
[N, N]. They are rounded to multiples of a power of two so fine that float64 holds every sum of them exactly, whatever the
order in which it is summed: fields and energies then depend on neither library nor batch, and the energy's fall under
asynchronous updates is exact. Hebb's are whole numbers before they are divided by N, and lose nothing.
"""

from __future__ import annotations

from math import ceil, log, log2, sqrt

import numpy as np
from numpy.typing import NDArray

from engram_models.pattern_bits import unpack

RULES = ("hebb", "storkey", "pseudo-inverse", "dense")
CLASSICAL_SIZE_MAX = 1 << 14  # N x N weights of 2 GB
_FINEST_BITS = 30
_EXACT = {np.dtype(np.float32): 24, np.dtype(np.float64): 53}  # bits of a whole number that each type holds

Matrix = NDArray[np.float64]


class Weights:
    """One network's weights, brought up to date pattern by pattern where the rule allows it. Not for the dense rule."""

    def __init__(self, size: int, rule: str) -> None:
        self._size, self._rule = size, rule
        self._raw: Matrix = np.zeros((size, size))
        self._rounded: NDArray[np.floating] | None = None
        self._learned = 0

    @property
    def nbytes(self) -> int:
        return self._raw.nbytes + (0 if self._rounded is None else self._rounded.nbytes)

    @property
    def scale(self) -> float:
        """What the matrix is to be divided by: Hebb's is left in whole numbers."""
        return float(self._size) if self._rule == "hebb" else 1.0

    def matrix(self, bits: NDArray[np.uint8]) -> NDArray[np.floating]:
        """`scale` times the weights of all the store's patterns, float32 where that is exact, else float64.

        bits [P, bytes]: the patterns, those that were learned before still first.
        """
        if self._rounded is None or self._learned != len(bits):
            known = 0 if self._rule == "pseudo-inverse" else self._learned
            self._raw = learn(self._rule, unpack(bits[known:], self._size), self._raw if known else None)
            self._rounded = exactly_summed(self._raw)
            self._learned = len(bits)
        return self._rounded

    def forget(self, before: int, forgotten: NDArray[np.int8]) -> None:
        """Patterns [n, N] leave a store that had `before`. Hebb subtracts them; the other rules begin again."""
        if self._rule == "hebb" and self._learned == before:
            self._raw -= _outer(forgotten)
            self._learned -= len(forgotten)
        else:
            self._raw, self._learned = np.zeros_like(self._raw), 0
        self._rounded = None


def learn(rule: str, patterns: NDArray[np.int8], before: Matrix | None = None) -> Matrix:
    """The weights of patterns [P, N], on top of those of earlier ones; the pseudo-inverse takes all at once.

    Hebb's are not yet divided by N.
    """
    if rule == "pseudo-inverse":
        return _pseudo_inverse(patterns)
    known = np.zeros((patterns.shape[1],) * 2) if before is None else before
    return known + _outer(patterns) if rule == "hebb" else _storkey(known, patterns)


def exactly_summed(weights: Matrix) -> NDArray[np.floating]:
    """Weights rounded so that any sum s'Ws over s in -1, 0, +1 is exact in float64; as float32 where Ws is exact there."""
    most, size = float(np.abs(weights).max(initial=0)), len(weights)
    whole = bool((weights == np.rint(weights)).all())
    room = _EXACT[np.dtype(np.float64)] - ceil(log2(max(most, 1))) - 2 * ceil(log2(size))
    bits = 0 if whole else min(_FINEST_BITS, room)
    rounded: Matrix = np.rint(weights * 2.0**bits) / 2.0**bits
    # The bound is on the sum of one unit's weights, each a whole number of steps.
    exact = float(np.abs(rounded).sum(1).max(initial=0)) * 2.0**bits < 2.0 ** _EXACT[np.dtype(np.float32)]
    return rounded.astype(np.float32) if exact else rounded


def _outer(patterns: NDArray[np.int8]) -> Matrix:
    """sum_mu p_mu p_mu' without its diagonal: N times Hebb's weights. Hopfield 1982, (2); the deck's "Hebb rule"."""
    rows = patterns.astype(np.float64)
    product = rows.T @ rows
    np.fill_diagonal(product, 0)
    return product


def _storkey(weights: Matrix, patterns: NDArray[np.int8]) -> Matrix:
    """w_ij += (p_i p_j - p_i h_ji - h_ij p_j) / N with h_ij = sum over k other than i, j of w_ik p_k. Storkey 1997.

    The local fields h are those of the weights before this pattern; with w_ii = 0 they are f_i - w_ij p_j for f = W p, and
    the sum in brackets is p_i g_j + g_i p_j + 2 w_ij for g = p/2 - f.
    """
    weights, size = weights.copy(), len(weights)
    change = np.empty_like(weights)
    for p in patterns.astype(np.float64):
        g = p / 2 - weights @ p
        np.matmul(np.stack((p, g), 1), np.stack((g, p)) / size, out=change)
        weights *= 1 + 2 / size
        weights += change
        np.fill_diagonal(weights, 0)
    return weights


def _pseudo_inverse(patterns: NDArray[np.int8]) -> Matrix:
    """The projection on the space of the patterns, X^+ X, without its diagonal. Personnaz, Guyon and Dreyfus 1985.

    From the eigenvectors of the smaller Gram matrix; those of eigenvalue 0, which dependent patterns cause, are left out.
    """
    rows = patterns.astype(np.float64)
    wide = len(rows) <= rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = values > max(rows.shape) * np.finfo(np.float64).eps * values.max(initial=0)
    basis = (rows.T @ vectors[:, kept]) / np.sqrt(values[kept]) if wide else vectors[:, kept]
    projection: Matrix = basis @ basis.T
    projection = (projection + projection.T) / 2
    np.fill_diagonal(projection, 0)
    return projection


def load_warning(rule: str, size: int, count: int, beta: float) -> str:
    """What theory says against recalling `count` patterns of `size` units, with the load alpha; empty if nothing."""
    if rule == "dense":
        return _dense_warning(size, count, beta)
    load = count / size
    for bound, what in _bounds(rule, log(max(size, 3))):
        if load > bound:
            return f"the load alpha = P/N would be {count}/{size} = {load:.3f}; beyond {bound:.3g} {what}"
    return ""


def _bounds(rule: str, log_size: float) -> list[tuple[float, str]]:
    """Loads from the highest down, each with what happens beyond it."""
    if rule == "hebb":
        return [
            (0.138, "Hebb's rule recalls next to nothing (Amit, Gutfreund and Sompolinsky 1985)"),
            (1 / (2 * log_size), "= 1 / (2 ln N) not every pattern comes back without an error (McEliece et al. 1987)"),
        ]
    if rule == "storkey":
        return [(1 / sqrt(2 * log_size), "= 1 / sqrt(2 ln N) Storkey's rule loses patterns (Storkey 1997)")]
    return [
        (1.0, "the pseudo-inverse tells patterns from nothing else (Personnaz, Guyon and Dreyfus 1985)"),
        (0.5, "the pseudo-inverse mends few errors, its basins are narrow (Kanter and Sompolinsky 1987)"),
    ]


def _dense_warning(size: int, count: int, beta: float) -> str:
    """A rival that is two bits further away has e^(-4 beta) of the nearest's weight; P of them must not outweigh it."""
    if count > 1 and log(count) > size * log(2) / 2:
        return (
            f"the load alpha = P/N would be {count}/{size} = {count / size:.3f}; beyond P = 2^(N/2) patterns of {size} units "
            "are no longer told apart (Demircigil et al. 2017)"
        )
    if count > 1 and log(count) > 4 * beta:
        return (
            f"{count} patterns ask for a beta above ln(P)/4 = {log(count) / 4:.2f}, this memory's is {beta:g}: a nearest "
            "pattern that leads by two bits may be outvoted (Ramsauer et al. 2020)"
        )
    return ""
