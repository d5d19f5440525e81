"""Pictures of what was learnt, with matplotlib. Only what several experiments draw is here."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTH = 50


def figure(width: float = 7, height: float = 4) -> Figure:
    """An empty figure that no window system knows of."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def png(drawn: Figure) -> bytes:
    """Without a date or versions: the same figure gives the same bytes."""
    data = BytesIO()
    drawn.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def curve(losses: Sequence[float], title: str) -> Figure:
    """The loss over batches, as it was and smoothed, on a logarithmic scale."""
    import numpy as np

    drawn = figure()
    axes = drawn.subplots()
    axes.semilogy(losses, color="0.8", linewidth=0.5)
    width = max(1, min(_SMOOTH, len(losses) // 10))
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    axes.semilogy(np.arange(width - 1, width - 1 + len(smooth)), smooth, color="tab:blue")
    axes.set(title=title, xlabel="batch", ylabel="loss")
    return drawn
