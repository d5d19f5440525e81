"""Associative recall: a list of items is shown, then one of them again; the item that came after it has to be named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engram_models.cell import Cell
from engram_models.training.bptt import Batch
from engram_models.training.tasks import generator
from engram_models.training.tasks.copying import memory_pictures, wrong_bits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AssociativeRecall:
    """Graves et al. 2014, section 4.3: 2 to `items` items of `vectors` vectors of `bits` bits.

    Each item is preceded by a delimiter of one channel; the query stands between two delimiters of another. The answer is the
    item that followed the queried one. Thorough tests go to `many` items.
    """

    bits: int = 6
    vectors: int = 3
    items: int = 6
    many: int = 12
    test_rows: int = 1000

    def __post_init__(self) -> None:
        if min(self.bits, self.vectors) < 1 or min(self.items, self.many) < 2:
            raise ValueError("bits and vectors must be at least 1, items and many at least 2")

    @property
    def input_size(self) -> int:
        return self.bits + 2

    @property
    def output_size(self) -> int:
        return self.bits

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        source = generator(seed, number)
        return self.draw(rows, int(torch.randint(2, self.items + 1, (), generator=source)), source)

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        each = (self.test_rows if thorough else self.test_rows // 5) // (self.items - 1)
        errors = [self._errors(cell, each, items, seed) for items in range(2, self.items + 1)]
        found = {"bit_errors": torch.cat(errors).double().mean().item()}
        if thorough:
            found["exact"] = (torch.cat(errors) == 0).double().mean().item()
            found["exact_many_items"] = (self._errors(cell, each, self.many, seed) == 0).double().mean().item()
        return found

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        shown = self.draw(1, self.items, generator(seed, 0, purpose=2))
        return memory_pictures(cell, shown, f"{self.items} items, and one that is asked for")

    def _errors(self, cell: Cell, rows: int, items: int, seed: int) -> torch.Tensor:
        return wrong_bits(cell, self.draw(rows, items, generator(seed, items, purpose=1)))

    def draw(self, rows: int, items: int, source: torch.Generator) -> Batch:
        bits, size = self.bits, self.vectors + 1
        shown = torch.randint(0, 2, (rows, items, self.vectors, bits), generator=source).float()
        asked = torch.randint(0, items - 1, (rows,), generator=source)
        time = (items + 1) * size + 1 + self.vectors
        inputs = torch.zeros(rows, time, bits + 2)
        for place in range(items):
            inputs[:, place * size, bits] = 1
            inputs[:, place * size + 1 : (place + 1) * size, :bits] = shown[:, place]
        query, end = items * size, (items + 1) * size
        inputs[:, [query, end], bits + 1] = 1
        inputs[:, query + 1 : end, :bits] = shown[torch.arange(rows), asked]
        targets, weights = torch.zeros(rows, time, bits), torch.zeros(rows, time)
        targets[:, end + 1 :] = shown[torch.arange(rows), asked + 1]
        weights[:, end + 1 :] = 1
        return Batch(inputs, targets, weights)
