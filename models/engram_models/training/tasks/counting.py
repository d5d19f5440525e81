"""Counting: strings a^n b^n, read symbol by symbol; after each the cell names every symbol that may come next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_models.cell import Cell
from engram_models.training.bptt import Batch
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_S, _A, _B = range(3)  # inputs: the start, a, b
_NEXT_A, _NEXT_B, _NEXT_T = range(3)  # outputs: a, b or the end may follow
_THRESHOLD = 0.5


@dataclass(frozen=True)
class Counting:
    """Gers and Schmidhuber 2001, "LSTM recurrent networks learn simple context-free and context-sensitive languages".

    Inputs, one-hot: S a^n b^n. Targets: after S an a or the end, after an a either letter, after a b the next b, or the end
    where as many b as a were read. A string is accepted if after each of its symbols exactly the possible ones have an
    output above 1/2. Every batch holds n = 1 .. `train_max` in turn; the cell never trains on a longer string.
    `noise` is the standard deviation of what is added to the inputs in training: it asks for a counter whose steps are alike
    whatever comes in, which is what counting far beyond the training takes.
    `validate_max` is what the quick evaluations try, so a recipe that keeps the best of them has looked that far.
    """

    train_max: int = 10
    noise: float = 0.0
    validate_max: int = 50
    test_max: int = 1000

    def __post_init__(self) -> None:
        if not 1 <= self.train_max <= self.validate_max <= self.test_max:
            raise ValueError("train_max, validate_max and test_max must be at least 1 and in ascending order")
        if self.noise < 0:
            raise ValueError("noise must not be negative")

    input_size = 3
    output_size = 3

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        drawn = strings(1 + torch.arange(rows) % self.train_max)
        noise = torch.randn(drawn.inputs.shape, generator=generator(seed, number))
        return replace(drawn, inputs=drawn.inputs + self.noise * noise)

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        most = self.test_max if thorough else self.validate_max
        margins = _margins(cell, strings(torch.arange(1, most + 1)))
        refused = (margins <= 0).nonzero()
        return {
            "contiguous": int(refused[0]) if len(refused) else most,  # n = 1 .. this are all accepted
            "accepted": int((margins > 0).sum()),
            "tried_to": most,
            "margin": margins.min().item(),  # how far the worst output of all strings is on its right side of 1/2
        }

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        return {"counter": lambda: _drawn(cell, 2 * self.train_max)}


def strings(lengths: Tensor) -> Batch:
    """S a^n b^n for each n of `lengths`, int64 [rows]: [rows, 2 max + 1, 3]. Steps after a string's end weigh 0."""
    n = lengths.unsqueeze(1)
    place = torch.arange(2 * int(lengths.max()) + 1)
    symbols = torch.where(place == 0, _S, torch.where(place <= n, _A, _B))
    targets = torch.zeros(*symbols.shape, 3)
    targets[..., _NEXT_A] = (place <= n).float()
    targets[..., _NEXT_B] = ((place >= 1) & (place < 2 * n)).float()
    targets[..., _NEXT_T] = ((place == 0) | (place == 2 * n)).float()
    return Batch(torch.nn.functional.one_hot(symbols, 3).float(), targets, (place <= 2 * n).float())


def _margins(cell: Cell, batch: Batch) -> Tensor:
    """Of each string, the least distance of an output from the threshold, negative on the wrong side. [rows]"""
    with torch.inference_mode():
        outputs = cell.sequence(batch.inputs)[0]
    right_side = (outputs - _THRESHOLD) * (2 * batch.targets - 1)
    return right_side.masked_fill(batch.weights.unsqueeze(2) == 0, torch.inf).flatten(1).amin(1)


def _drawn(cell: Cell, n: int) -> Figure:
    """State tensors and outputs over one string twice as long as any of the training."""
    from engram_models.training.pictures import figure

    inputs, state = strings(torch.tensor([n])).inputs, cell.initial_state(1)
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    with torch.inference_mode():
        for x in inputs.unbind(1):
            y, state = cell(x, state)
            outputs.append(y[0])
            states.append(state[-1][0].clone())
    drawn = figure(7, 5)
    above, below = drawn.subplots(2, 1, sharex=True)
    above.plot(torch.stack(states).numpy())
    above.set(title=f"reading a^{n} b^{n}", ylabel=cell.state_schema[-1].name)
    below.plot(torch.stack(outputs).numpy(), label=["a", "b", "end"])
    below.set(xlabel="step", ylabel="may follow")
    below.legend()
    return drawn
