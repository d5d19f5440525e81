"""Scales of a table's columns, from its training part alone, and the cell that keeps them. For the tasks on tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_models.cell import Cell
from engram_models.normalised import TRANSFORMS, Normalised
from engram_models.training.errors import TrainingError


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """Mean and standard deviation of each column [columns], float64, of the transformed values."""

    transform: str
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: NDArray[np.float64], transform: str) -> Scales:
        """Of values [rows, columns]. A column that never changes has scale 1."""
        changed = TRANSFORMS[transform][0](torch.from_numpy(values))
        scale = changed.std(0, correction=0)
        return cls(transform, changed.mean(0), torch.where(scale > 0, scale, 1.0))

    def normalised(self, values: NDArray[np.float64]) -> Tensor:
        """float32, as the inner cell takes them."""
        return ((TRANSFORMS[self.transform][0](torch.from_numpy(values)) - self.mean) / self.scale).float()

    def wrap(self, cell: Cell, inputs: Sequence[str], outputs: Sequence[str], targets: Sequence[int] | None) -> Cell:
        """The cell with these scales; `targets` are the columns that its outputs stand for, None where they have no units."""
        try:
            served = Normalised(cell, self.transform, targets is not None, inputs, outputs)
        except ValueError as error:
            raise TrainingError(f"this task normalises its columns: {error}") from error
        with torch.no_grad():
            served.input_mean.copy_(self.mean)
            served.input_scale.copy_(self.scale)
            if targets is not None:
                served.output_mean.copy_(self.mean[list(targets)])
                served.output_scale.copy_(self.scale[list(targets)])
        return served


def part(share: float, count: int) -> int:
    """How many of `count` a share stands for: a fraction below 1, or the number itself."""
    return int(share) if share >= 1 else round(share * count)


def check_share(name: str, share: float) -> None:
    """Raises ValueError."""
    if share < 0 or (share >= 1 and share != int(share)):
        raise ValueError(f"{name} must be a fraction below 1 or a whole number, not {share}")


def padded(sequences: Sequence[Tensor]) -> Tensor:
    """[n, longest time, columns], zeros behind the shorter ones: a cell's outputs do not depend on what comes later."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
