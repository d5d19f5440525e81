"""What a recipe runs: an experiment that advances in small pieces, can be put down and taken up again, and ends in an outcome.

run.py drives it, writes its checkpoints, its result file, its pictures and its bundle; procedures.py names the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from engram_models.cell import Cell
    from engram_models.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment found. `metrics` and `curves` go into the result file; numbers must be finite or None."""

    metrics: Mapping[str, Any]  # what the recipe's [pass] table is held against, and whatever else was measured
    curves: Mapping[str, list[float]] = field(default_factory=dict)  # "loss" and the like, for the picture
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)  # file name without .png -> drawing
    cell: Cell | None = None  # what the bundle is made of, where the recipe wants one
    note: str = ""  # what its inputs and outputs are, after the bundle's description


class Experiment(Protocol):
    """Made from a recipe and a seed; the same recipe and seed give the same outcome, interrupted or not."""

    Options: ClassVar[type]  # a frozen dataclass of plain values with defaults: the keys of the recipe's [options]
    done: int  # units of work behind, of `total`
    total: int

    def __init__(self, recipe: Recipe, options: Any, seed: int) -> None:
        """Raises TrainingError where the recipe does not fit."""

    def advance(self) -> str:
        """A piece of work of a second or less, which moves `done`; returns a note (loss, accuracy) for the progress bar."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed experiment needs: weights, the optimiser's moments, generators' states, curves so far."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up where `tensors` were taken; `done` included."""

    def finish(self) -> Outcome:
        """Tests what was learnt; called once, when `done` has reached `total`."""
