"""Pictures of what was learnt, with matplotlib. Only what several experiments draw is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram_models.ntm import NTM
    from engram_models.training.bptt import Batch

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


def curves(losses: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Losses over the course of training, as they were and smoothed, on a logarithmic scale."""
    import numpy as np

    drawn = figure()
    axes = drawn.subplots()
    for number, (label, values) in enumerate(losses.items()):
        width = max(1, min(_SMOOTH, len(values) // 20))
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        course = np.linspace(0, 1, len(values))
        axes.semilogy(course, values, color=f"C{number}", linewidth=0.5, alpha=0.25)
        axes.semilogy(course[width - 1 :], smooth, color=f"C{number}", label=label)
    axes.set(title=title, xlabel="share of the training", ylabel="loss")
    axes.legend()
    return drawn


def memory(cell: NTM, batch: Batch, title: str) -> Figure:
    """What a Turing machine does with one sequence: inputs, outputs, where its heads are, and the memory afterwards.

    The deck's second criticism answered: values are bound to places. Graves et al. 2014, figures 6, 8 and 11.
    """
    import torch

    names = [spec.name for spec in cell.state_schema]
    state, outputs, seen = cell.initial_state(1), [], []
    with torch.inference_mode():
        for x in batch.inputs[:1].unbind(1):
            y, state = cell(x, state)
            outputs.append(y[0])
            seen.append({name: value[0] for name, value in zip(names, state, strict=True)})
    heads = [name for name in names if "weighting" in name]
    used = torch.stack([step[name] for step in seen for name in heads]).amax(0) > 0.05
    top = int(used.nonzero().amax()) + 2 if bool(used.any()) else cell.config["slots"]
    panels = [("inputs", batch.inputs[0].T), ("outputs", torch.stack(outputs).T)]
    panels += [
        (name.replace("_weighting", " head "), torch.stack([step[name] for step in seen])[:, :top].T) for name in heads
    ]
    panels.append(("memory at the end", seen[-1]["memory"][:top].T))
    drawn = figure(9, 1.7 * len(panels))
    drawn.suptitle(title)
    for axes, (name, values) in zip(drawn.subplots(len(panels), 1), panels, strict=True):
        axes.imshow(values.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_ylabel(name, fontsize=8)
    return drawn
