"""The adding problem: two of T numbers are marked, and their sum is asked for at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engram_models.cell import Cell
from engram_models.training.bptt import Batch
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Adding:
    """Hochreiter and Schmidhuber 1997, experiment 4, in the form of Le et al. 2015.

    Inputs: a number from [0, 1) and a marker that is 1 at one place of either half, else 0. Target of the last step: the sum
    of the two marked numbers. Who always answers 1 has a mean squared error of 0.1667.
    """

    length: int = 100
    test_rows: int = 10_000

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError("length must be at least 2")

    input_size = 2
    output_size = 1

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        return self._draw(rows, generator(seed, number))

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        test = self._draw(self.test_rows if thorough else self.test_rows // 10, generator(seed, 0, purpose=1))
        with torch.inference_mode():
            answers = cell.sequence(test.inputs)[0][:, -1]
        errors = (answers - test.targets[:, -1]).abs()
        return {"mse": errors.square().mean().item(), "right_within_0.1": (errors < 0.1).double().mean().item()}

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        return {}

    def _draw(self, rows: int, source: torch.Generator) -> Batch:
        values = torch.rand(rows, self.length, generator=source)
        half = self.length // 2
        first = torch.randint(0, half, (rows, 1), generator=source)
        second = torch.randint(half, self.length, (rows, 1), generator=source)
        marks = torch.zeros(rows, self.length).scatter_(1, first, 1).scatter_(1, second, 1)
        targets, weights = torch.zeros(rows, self.length, 1), torch.zeros(rows, self.length)
        targets[:, -1, 0], weights[:, -1] = (values * marks).sum(1), 1
        return Batch(torch.stack((values, marks), 2), targets, weights)
