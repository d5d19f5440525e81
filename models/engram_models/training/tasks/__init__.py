"""What is learnt: each task makes batches from a seed, and measures what a cell has learnt of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from engram_models.cell import Cell
from engram_models.training.bptt import Batch
from engram_models.training.errors import TrainingError
from engram_models.training.recipe import parsed
from engram_models.training.tables import located

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TASKS = {
    "adding": "engram_models.training.tasks.adding:Adding",
    "temporal-order": "engram_models.training.tasks.order:TemporalOrder",
    "counting": "engram_models.training.tasks.counting:Counting",
    "copy": "engram_models.training.tasks.copying:Copy",
    "repeat-copy": "engram_models.training.tasks.copying:RepeatCopy",
    "associative-recall": "engram_models.training.tasks.recall:AssociativeRecall",
    "digits": "engram_models.training.tasks.digits:DigitRows",
    "forecast": "engram_models.training.tasks.forecast:Forecast",
    "classify": "engram_models.training.tasks.classify:Classify",
}


class Task(Protocol):
    """A frozen dataclass of plain values: the keys of the recipe's [task] table beside its name."""

    @property
    def input_size(self) -> int: ...

    @property
    def output_size(self) -> int: ...

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        """Batch `number` of the training data; the same for the same arguments, so that nothing need be kept of the past."""

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        """What a cell, in evaluation mode, makes of data that training does not see; quickly, or for the result file."""

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        """What the result is looked at with."""


@runtime_checkable
class Wrapping(Protocol):
    """A task whose cell is not served as it was trained, but behind the scales of the data."""

    @property
    def note(self) -> str:
        """What the served cell takes and answers: goes into the bundle's description."""

    def wrap(self, cell: Cell) -> Cell:
        """The cell to serve, with the trained one's parameters. Raises TrainingError where it does not fit the task."""


def task(name: str, table: Mapping[str, Any], where: str, directory: Path) -> Task:
    """The task of a recipe's [task] table; a `file` in it is relative to the recipe's directory. Raises TrainingError."""
    if name not in _TASKS:
        raise TrainingError(f"{where}: there is no task {name!r}; there are: {', '.join(_TASKS)}")
    module, _, kind = _TASKS[name].partition(":")
    if isinstance(file := table.get("file"), str):
        table = {**table, "file": str(located(file, directory))}
    made: Task = parsed(getattr(import_module(module), kind), table, where)
    return made


def generator(seed: int, number: int, purpose: int = 0) -> torch.Generator:
    """Random numbers for one batch: a function of seed and number alone. Purpose 0 is training, others never meet it."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + purpose * 0x94D049BB133111EB) % 2**63
    return torch.Generator().manual_seed(mixed ^ (mixed >> 31))
