"""What an import takes each tensor of a graph for, and how it knows: the proposal that is shown, proved and written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_models.importing.interface import Dim

Array = np.ndarray[Any, np.dtype[Any]]
STATES = ("recurrent", "counter", "constant", "window")


@dataclass(slots=True)
class Line:
    """One tensor. `dims` are the graph's, `shape` is as served: without the batch.

    A window of an input's past is a line of its own, whose `of` is the input; the graph has no such tensor. A window of an
    output's past is a tensor of the graph, and `output` is what it is fed with.
    """

    tensor: str
    role: str  # input, output, recurrent, counter, constant, window
    dtype: str
    dims: tuple[Dim, ...] | None
    output: str = ""
    of: str = ""
    context: int = 0  # of an input: how much of its past is kept before it; of a window: how much it keeps
    axis: int | None = None
    full: tuple[int, ...] = ()  # the graph's dimensions with their sizes; -1 is the batch
    shape: tuple[int, ...] = ()
    initial: float | Array = 0.0
    initial_words: str = ""
    how: list[str] = field(default_factory=list)

    @property
    def is_state(self) -> bool:
        return self.role in STATES

    @property
    def in_graph(self) -> bool:
        """Whether the graph has an input of this name."""
        return self.role != "output" and not self.of


@dataclass(slots=True)
class Proposal:
    lines: list[Line]
    settled: bool = False  # axes and shapes are known
    why: str = ""  # rows go one by one
    static: bool = False  # the graph has a batch of 1 or none: the normal form adds it by Reshape
    open: bool = False  # the graph loads only if its dynamic dimensions have no sizes
    taken: dict[str, tuple[int | None, tuple[int, ...]]] = field(
        default_factory=dict
    )  # of the graph's outputs: batch axis, dimensions
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of_role(self, *roles: str) -> list[Line]:
        return [line for line in self.lines if line.role in roles]

    @property
    def states(self) -> list[Line]:
        return self.of_role(*STATES)
