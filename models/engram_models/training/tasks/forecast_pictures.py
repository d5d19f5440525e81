"""Pictures of the task "forecast": what was said beside what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engram_models.training.pictures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
_MOST = 4  # columns that are drawn


def forecast(times: Array, truth: Array, made: Array, names: Sequence[str]) -> Figure:
    """Held-out rows and their one-step forecasts [rows, targets], and the errors below."""
    count = min(len(names), _MOST)
    drawn = figure(7 if count == 1 else 5 * count, 5)
    axes = drawn.subplots(2, count, sharex=True, squeeze=False, height_ratios=[3, 1])
    for at in range(count):
        above, below = axes[:, at]
        above.plot(times, truth[:, at], color="0.3", marker=".", label="as it was")
        above.plot(times, made[:, at], color="tab:orange", label="forecast, one step ahead")
        above.set(title=f"{names[at]}: held out")
        above.legend(loc="best", fontsize="small")
        below.bar(times, made[:, at] - truth[:, at], color="tab:orange")
        below.set(ylabel="error" if at == 0 else "")
    return drawn


def free_run(times: Array, truth: Array, made: Array, names: Sequence[str]) -> Figure:
    """Held-out rows and what the model says when it reads nothing but its own outputs, [rows, columns]."""
    count = min(len(names), _MOST)
    drawn = figure(7 if count == 1 else 5 * count, 3.5)
    for at, axes in enumerate(drawn.subplots(1, count, squeeze=False)[0]):
        axes.plot(times, truth[:, at], color="0.3", marker=".", label="as it was")
        axes.plot(times, made[:, at], color="tab:blue", label="fed back on itself")
        axes.set(title=f"{names[at]}: free run")
        axes.legend(loc="best", fontsize="small")
    return drawn
