"""Backpropagation through time, whole and truncated, over the cell contract. Gradients are left in the parameters' .grad.

A batch's loss is the mean of its steps' losses, each times its weight: a step of weight 0 (an input whose output nobody
looks at) costs nothing, so one form serves all four variants of the deck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engram_models.cell import Cell, State


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs [batch, time, *input]; targets [batch, time, *output], or int64 [batch, time] of classes; weights [batch, time]."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor


StepLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs without activation [n, *output], targets [n, ...]) -> losses [n]."""


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def _classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)


LOSSES: dict[str, StepLoss] = {"none": _squared, "softmax": _classes, "sigmoid": _bits}
"""By the head's activation: outputs are numbers, one of several classes, or bits."""


def backpropagate(cell: Cell, batch: Batch, loss: StepLoss) -> float:
    """Full BPTT; the batch's mean loss."""
    return truncated(cell, batch, loss, batch.inputs.shape[1], batch.inputs.shape[1])


def truncated(cell: Cell, batch: Batch, loss: StepLoss, k1: int, k2: int) -> float:
    """BPTT(k1, k2), Williams and Peng 1990: after every k1 steps their losses go back through the last k2 steps.

    Where k2 reaches back to the beginning, the losses of all such steps go back together, in one pass over one graph: with
    k2 >= time the gradient is that of full BPTT to the bit. Returns the batch's mean loss.
    """
    scale = batch.weights.sum().clamp_min(1e-12)
    total, state = 0.0, cell.initial_state(len(batch.inputs), batch.inputs.device, batch.inputs.dtype)
    at = 0  # where `state` stands
    for start, first, stop in _windows(batch.inputs.shape[1], k1, k2):
        state, at = _walk(cell, batch, state, at, start)
        outputs = _steps(cell, batch, state, start, stop)
        part = _loss(outputs[first - start :], batch, first, stop, loss) / scale
        part.backward()  # type: ignore[no-untyped-call]
        total += part.item()
    return total


def _windows(time: int, k1: int, k2: int) -> Iterator[tuple[int, int, int]]:
    """(start of the graph, first step whose loss counts, stop); windows that start at 0 are one."""
    if min(k1, k2) < 1:
        raise ValueError(f"k1 {k1} and k2 {k2} must be at least 1")
    ends = [*range(k1, time, k1), time]
    whole = max([0, *(end for end in ends if end <= k2)])
    if whole:
        yield 0, 0, whole
    for end in ends:
        if end > whole:
            first = max(whole, (end - 1) // k1 * k1)
            yield max(0, min(first, end - k2)), first, end


def _walk(cell: Cell, batch: Batch, state: State, at: int, to: int) -> tuple[State, int]:
    """The state before step `to`, without a graph."""
    with torch.no_grad():
        for time in range(at, to):
            _, state = cell(batch.inputs[:, time], state)
    return state, max(at, to)


def _steps(cell: Cell, batch: Batch, state: State, start: int, stop: int) -> list[Tensor]:
    outputs = []
    for time in range(start, stop):
        y, state = cell(batch.inputs[:, time], state)
        outputs.append(y)
    return outputs


def _loss(outputs: Sequence[Tensor], batch: Batch, first: int, stop: int, loss: StepLoss) -> Tensor:
    """Sum of weight times loss over steps first .. stop; only steps that somebody looks at are computed."""
    weights = batch.weights[:, first:stop]
    looked_at = [t for t in range(stop - first) if bool(weights[:, t].any())]
    if not looked_at:
        return sum((y.sum() for y in outputs), torch.zeros(())) * 0
    stacked = torch.stack([outputs[t] for t in looked_at], 1).flatten(0, 1)
    targets = torch.stack([batch.targets[:, first + t] for t in looked_at], 1).flatten(0, 1)
    return (loss(stacked, targets) * weights[:, looked_at].flatten()).sum()
