"""The Hopfield network as a cell: patterns that a model comes with, and a state that sweeps towards them.

Source: Hopfield 1982 and the deck's "Hopfield Networks"; the rules are those of pattern_rules.py, the dense one that of Ramsauer
et al. 2020. What a session stores beyond the model's own patterns is kept in a PatternMemory by the service, which begins as
`Hopfield.memory` does; steps know the model's own alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_models.cell import Cell, State
from engram_models.pattern_rules import exactly_summed, learn
from engram_models.patterns import BETA, PATTERNS_MAX, PatternMemory, check_labels, own_memory
from engram_models.spec import TensorSpec


class Hopfield(Cell):
    """A step sets the units where the input is not 0 to its sign, then lets all units take the sign of their field at once.

    x [size] -> y [size], both float32; y is -1 and +1, and 0 for units that were told nothing and feel nothing yet. Fed back,
    or fed with zeros, it sweeps on until it rests; two states may take turns for ever. State tensor: units [size], what y was.

    `labels` name the model's own patterns, buffer `patterns` bool [len(labels), size], +1 as true. `patterns_max` bounds a
    session's memory, its own included. Every sum is exact in float64 (weights are multiples of a power of two), so that a
    row's bits depend neither on its batch nor on the library. There is no gradient.
    """

    kind = "hopfield"
    patterns: Tensor
    weights: Tensor

    def __init__(
        self,
        size: int,
        rule: str = "dense",
        beta: float = BETA,
        patterns_max: int = PATTERNS_MAX,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        PatternMemory(size, rule, beta, patterns_max)  # its refusals are ours
        self.labels = list(labels)
        check_labels(self.labels, patterns_max)
        self.size, self.rule, self.beta, self.patterns_max = size, rule, float(beta), patterns_max
        self.register_buffer("patterns", torch.zeros(len(self.labels), size, dtype=torch.bool))
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float64), persistent=False)
        self._derive()
        self.register_load_state_dict_post_hook(_derived)  # type: ignore[no-untyped-call]
        config = {"size": size, "rule": rule, "beta": self.beta, "patterns_max": patterns_max, "labels": self.labels}
        self.declare(
            TensorSpec("input", "float32", (size,)),
            TensorSpec("output", "float32", (size,)),
            (TensorSpec("units", "float32", (size,), "recurrent"),),
            config,
        )

    @classmethod
    def of(cls, patterns: NDArray[Any], labels: Sequence[str], rule: str = "dense", **options: Any) -> Hopfield:
        """A cell with patterns [n, size] of -1 and +1, or 0 and 1. Raises ValueError, PatternError among them."""
        cell = cls(np.shape(patterns)[1], rule, labels=labels, **options)
        bits = PatternMemory.pack(patterns, cell.size)
        PatternMemory(cell.size, rule, cell.beta, cell.patterns_max).check(bits, labels)
        cell.patterns.copy_(torch.from_numpy(PatternMemory.unpack(bits, cell.size) > 0))
        cell._derive()
        return cell

    def memory(self) -> PatternMemory:
        """The model's own patterns, for a session to add to."""
        return own_memory(self.config, {"patterns": self.patterns.cpu().numpy()})

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        units = torch.where(x != 0, torch.sign(x), torch.sign(state[0]))
        fields = self._fields(units.double())
        y = torch.where(fields == 0, units, torch.sign(fields).to(units.dtype))
        return y, self.state_type(y)

    def _fields(self, units: Tensor) -> Tensor:
        """What each unit feels, float64 [batch, size], times a positive number; exact."""
        if self.rule != "dense":
            return units @ self.weights
        if not self.labels:
            return torch.zeros_like(units)
        signs = self.patterns.double() * 2 - 1
        overlaps = units @ signs.T
        behind = overlaps.amax(1, keepdim=True) - overlaps
        return self.weights[behind.long()] @ signs

    def _derive(self) -> None:
        """Makes the weights that the patterns give: they are not in the bundle."""
        if self.patterns.is_meta:
            return  # a cell of shapes alone
        if self.rule == "dense":
            weights = _softmax_table(self.size, len(self.labels), self.beta)
        else:
            own = self.patterns.cpu().numpy().astype(np.int8) * np.int8(2) - np.int8(1)
            weights = exactly_summed(learn(self.rule, own)).astype(np.float64)
        self.weights = torch.from_numpy(weights).to(self.patterns.device)


def _derived(cell: nn.Module, _: object) -> None:
    """A hook for after load_state_dict."""
    assert isinstance(cell, Hopfield)
    cell._derive()


def _softmax_table(size: int, count: int, beta: float) -> NDArray[np.float64]:
    """exp(-beta d) for every difference d = 0 .. 2 size of two overlaps, so rounded that sums over all patterns are exact."""
    bits = 52 - ceil(log2(max(count, 2)))
    table: NDArray[np.float64] = np.floor(np.exp(-beta * np.arange(2 * size + 1)) * 2.0**bits) / 2.0**bits
    return table


KINDS: tuple[type[Cell], ...] = (Hopfield,)
