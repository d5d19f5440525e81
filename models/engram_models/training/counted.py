"""Experiments that count and train nothing: pieces of work that each give a few numbers. Used by hopfield, dense and letters.

Every piece has a generator of its own, seeded with the seed and its number, so that a resumed run needs no state but what
was counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_models.patterns import BETA, PatternMemory

if TYPE_CHECKING:
    from engram_models.training.recipe import Recipe

Patterns = NDArray[np.int8]


class Counted:
    """An experiment whose pieces each give a few numbers: a table [total, columns] that fills row by row."""

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, recipe: Recipe, seed: int, total: int) -> None:
        self.recipe, self.seed, self.total, self.done = recipe, seed, total, 0
        self.table = np.zeros((total, len(self.columns)))

    def piece(self, number: int, generator: np.random.Generator) -> Sequence[float]:
        """One number for each column."""
        raise NotImplementedError

    def advance(self) -> str:
        self.table[self.done] = self.piece(self.done, self.generator(self.done))
        self.done += 1
        return ", ".join(
            f"{name} {value:.3g}" for name, value in zip(self.columns, self.table[self.done - 1], strict=True)
        )

    def generator(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, number]))

    def tensors(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done), "table": torch.from_numpy(self.table.copy())}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors["table"].shape != self.table.shape:
            raise ValueError(f"the table is {tuple(tensors['table'].shape)}, not {self.table.shape}")
        self.done, self.table = int(tensors["done"]), tensors["table"].numpy().copy()

    def column(self, name: str) -> NDArray[np.float64]:
        values: NDArray[np.float64] = self.table[:, self.columns.index(name)]
        return values


def random_patterns(count: int, size: int, generator: np.random.Generator) -> Patterns:
    return np.where(generator.random((count, size), np.float32) < 0.5, np.int8(-1), np.int8(1))


def flipped(patterns: Patterns, share: float, generator: np.random.Generator) -> Patterns:
    """Each pattern with exactly that share of its units wrong, rounded to whole units."""
    return patterns * np.where(_chosen(patterns.shape, share, generator), np.int8(-1), np.int8(1))


def unknown(shape: tuple[int, ...], share: float, generator: np.random.Generator) -> Patterns:
    """0 for exactly that share of every row's units, 1 for the others."""
    return np.where(_chosen(shape, share, generator), np.int8(0), np.int8(1))


def stored(patterns: Patterns, rule: str, beta: float = BETA) -> tuple[PatternMemory, Patterns]:
    """A memory with these patterns, labelled by their number."""
    memory = PatternMemory(patterns.shape[1], rule, beta)
    memory.add(PatternMemory.pack(patterns, memory.size), [str(number) for number in range(len(patterns))])
    return memory, patterns


def _chosen(shape: tuple[int, ...], share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    return generator.random(shape).argsort(1).argsort(1) < round(share * shape[1])
