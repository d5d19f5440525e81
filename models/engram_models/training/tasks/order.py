"""Temporal order: which symbols stood at a few early places, and in which order, is asked for at the end."""

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

_NOISE = 4  # distractors a, b, c, d; then X, Y; then the symbol that begins and the one that asks


@dataclass(frozen=True)
class TemporalOrder:
    """Hochreiter and Schmidhuber 1997, experiment 6b (three symbols, eight classes), with `length` steps.

    One-hot inputs: begin, then noise with X or Y at `symbols` places, each in its own part of the first 70 %, then the end. The
    class of the sequence of X and Y is asked for at the last step.
    """

    length: int = 50
    symbols: int = 3
    test_rows: int = 2560

    def __post_init__(self) -> None:
        if self.length < 5 * self.symbols:
            raise ValueError(f"length must be at least {5 * self.symbols} for {self.symbols} symbols")

    input_size = _NOISE + 4

    @property
    def output_size(self) -> int:
        return 1 << self.symbols

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        return self._draw(rows, generator(seed, number))

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        test = self._draw(self.test_rows if thorough else self.test_rows // 5, generator(seed, 0, purpose=1))
        with torch.inference_mode():
            named = cell.sequence(test.inputs)[0][:, -1].argmax(1)
        return {"accuracy": (named == test.targets[:, -1]).double().mean().item()}

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        return {}

    def _draw(self, rows: int, source: torch.Generator) -> Batch:
        symbols = torch.randint(0, _NOISE, (rows, self.length), generator=source)
        symbols[:, 0], symbols[:, -1] = _NOISE + 2, _NOISE + 3
        part = (self.length * 7 // 10 - 1) // self.symbols
        classes = torch.zeros(rows, dtype=torch.int64)
        for place in range(self.symbols):
            at = 1 + place * part + torch.randint(0, max(1, part // 2), (rows, 1), generator=source)
            bit = torch.randint(0, 2, (rows, 1), generator=source)
            symbols.scatter_(1, at, _NOISE + bit)
            classes = 2 * classes + bit.squeeze(1)
        targets, weights = torch.zeros(rows, self.length, dtype=torch.int64), torch.zeros(rows, self.length)
        targets[:, -1], weights[:, -1] = classes, 1
        return Batch(torch.nn.functional.one_hot(symbols, self.input_size).float(), targets, weights)
