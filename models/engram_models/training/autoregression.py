"""Linear autoregression: what a forecast has to beat. Used by the task "forecast" alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit(series: Sequence[Array], order_max: int) -> Array:
    """y_t = a_0 + a_1 y_{t-1} + ... + a_p y_{t-p} by least squares over all series [time]; returns a, [p+1].

    p is what Akaike's criterion, n log(SSE / n) + 2 (p + 1), finds best up to order_max, with every order tried on the same rows.
    Raises ValueError where there are too few rows.
    """
    rows, targets = _design(series, order_max)
    if len(targets) < 2 * (order_max + 1):
        raise ValueError(f"{len(targets)} rows after the first {order_max} are too few for an order of {order_max}")
    return _least_squares(*_design(series, min(range(1, order_max + 1), key=lambda order: _aic(rows, targets, order))))


def forecasts(series: Array, coefficients: Array) -> Array:
    """One-step forecasts of series [time]: [time], NaN for the first p, that have no p values before them."""
    order = len(coefficients) - 1
    rows, _ = _design([series], order)
    return np.concatenate((np.full(min(order, len(series)), np.nan), rows @ coefficients))


def _design(series: Sequence[Array], order: int) -> tuple[Array, Array]:
    """Rows (1, y_{t-1}, ..., y_{t-order}) and their targets y_t."""
    rows = [_lags(one, order) for one in series if len(one) > order]
    targets = [one[order:] for one in series if len(one) > order]
    return np.concatenate(rows or [np.empty((0, order + 1))]), np.concatenate(targets or [np.empty(0)])


def _lags(series: Array, order: int) -> Array:
    lagged = [series[order - lag : len(series) - lag] for lag in range(1, order + 1)]
    return np.stack([np.ones(len(series) - order), *lagged], 1)


def _aic(rows: Array, targets: Array, order: int) -> float:
    residuals = targets - rows[:, : order + 1] @ _least_squares(rows[:, : order + 1], targets)
    error = max(float(residuals @ residuals) / len(targets), np.finfo(float).tiny)
    return len(targets) * float(np.log(error)) + 2 * (order + 1)


def _least_squares(rows: Array, targets: Array) -> Array:
    found: Array = np.asarray(np.linalg.lstsq(rows, targets, rcond=None)[0], np.float64)
    return found
