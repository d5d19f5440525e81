"""The stories' pictures for `--out`, with matplotlib. Each function takes what was shown and gives a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIGITS = 6


def beliefs(images: NDArray[np.uint8], labels: NDArray[np.int64], y: NDArray[np.float32]) -> Figure:
    """A few digits [n, 8, 8], and under each the class probabilities y [rows, n, 10] after every row."""
    drawn, count = _figure(9, 3.4), min(_DIGITS, len(images))
    drawn.suptitle("digits, and what the model believes of them after every row")
    axes = drawn.subplots(2, count, squeeze=False)
    for one in range(count):
        axes[0, one].imshow(images[one], cmap="gray_r", interpolation="nearest")
        axes[0, one].set_title(str(labels[one]), fontsize=9)
        axes[1, one].imshow(y[:, one].T, cmap="viridis", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        axes[0, one].axis("off")
        axes[1, one].set(yticks=range(10), xticks=[])
        axes[1, one].tick_params(labelsize=6)
    axes[1, 0].set_ylabel("digit")
    return drawn


def recall(panels: Sequence[tuple[str, NDArray[np.int8]]], energies: Sequence[float]) -> Figure:
    """Patterns [side * side] with their titles, and the energy before the first sweep and after each."""
    drawn = _figure(2.2 * len(panels) + 3, 2.8)
    axes = drawn.subplots(1, len(panels) + 1)
    for place, (title, pattern) in zip(axes, panels, strict=False):
        side = round(len(pattern) ** 0.5)
        place.imshow(-pattern.reshape(side, side), cmap="gray", interpolation="nearest", vmin=-1, vmax=1)
        place.set_title(title, fontsize=9)
        place.set(xticks=[], yticks=[])
    axes[-1].plot(energies, marker="o")
    axes[-1].set(title="energy", xlabel="sweep", xticks=range(len(energies)))
    return drawn


def tape(panels: Sequence[tuple[str, NDArray[Any]]], title: str) -> Figure:
    """What a Turing machine did: titled matrices, [things, steps] or the memory, one under the other."""
    drawn = _figure(8, 1.7 * len(panels))
    drawn.suptitle(title)
    for axes, (name, values) in zip(drawn.subplots(len(panels), 1), panels, strict=True):
        axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.locator_params(integer=True)
        axes.set_ylabel(name, fontsize=8)
    return drawn


def forecast(
    years: NDArray[np.int64],
    truth: NDArray[Any],
    lines: Sequence[tuple[str, NDArray[np.int64], NDArray[Any]]],
    title: str,
) -> Figure:
    """What came, truth [n] in `years` [n], and forecasts as (name, years, values)."""
    drawn = _figure(8, 3.2)
    axes = drawn.subplots()
    axes.plot(years, truth, color="0.55", label="what came")
    for name, when, values in lines:
        axes.plot(when, values, label=name)
    axes.set(title=title, xlabel="year", ylabel="sunspots")
    axes.legend()
    return drawn


def _figure(width: float, height: float) -> Figure:
    """Imported here: matplotlib comes with the extra `train`, and most runs of the demo draw nothing with it."""
    from engram_models.training.pictures import figure

    return figure(width, height)
