"""Classify: which class a user's own sequence belongs to. Many to one: the answer after the last row counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engram_models.cell import Cell
from engram_models.normalised import TRANSFORMS
from engram_models.training.bptt import Batch
from engram_models.training.errors import TrainingError
from engram_models.training.scales import Scales, check_share, padded, part
from engram_models.training.tables import Columns, Table, read_csv, read_npz
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Classify:
    """Sequences from `file`: a CSV with a `sequence` and a `label` column, or an NPZ with X [n, time, columns] and y [n].

    They are drawn into training, validation and test part class by class, by `split_seed`, whatever the run's seed; the shares are
    fractions of each class, or numbers of sequences of each class. Scales come from the training part alone. The loss asks for
    the class after every row, weighted by the row's number, so that the last counts most; sequences may differ in length.
    """

    file: str
    columns: tuple[str, ...] = ()
    sequence: str = "sequence"
    label: str = "label"
    time: str = ""
    validation: float = 0.2
    test: float = 0.0
    split_seed: int = 1
    transform: str = "none"
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_share("validation", self.validation)
        check_share("test", self.test)
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform {self.transform!r} is not one of {', '.join(TRANSFORMS)}")
        if self.noise < 0 or self.split_seed < 0:
            raise ValueError("noise and split_seed must not be negative")

    @property
    def input_size(self) -> int:
        return len(self._table.names)

    @property
    def output_size(self) -> int:
        return len(self._classes)

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        source = generator(seed, number)
        members = self._parts["train"]
        drawn = [members[at] for at in torch.randint(0, len(members), (rows,), generator=source).tolist()]
        inputs = padded([self._normalised[at] for at in drawn])
        if self.noise:
            inputs = inputs + self.noise * torch.randn(inputs.shape, generator=source)
        steps, lengths = torch.arange(1.0, inputs.shape[1] + 1), self._lengths[drawn, None]
        weights = torch.where(steps <= lengths, 2 * steps / (lengths * (lengths + 1)), 0.0)
        return Batch(inputs, self._labels[drawn, None].expand(-1, inputs.shape[1]), weights)

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in _PARTS if thorough else ("validation",):
            if members := self._parts[name]:
                right = self._answers(cell, members) == self._labels[members]
                found[f"{name}_accuracy"] = right.double().mean().item()
                found |= {f"{name}_sequences": len(members)} if thorough else {}
        if thorough:
            counts = torch.bincount(self._labels)
            found |= {"most_frequent_class": counts.max().item() / len(self._labels), "classes": list(self._classes)}
        return found

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        members = self._parts["test"] or self._parts["validation"]
        if not members:
            return {}
        answers = self._answers(cell, members)
        return {"confusion": lambda: _confusion(self._labels[members], answers, self._classes)}

    def wrap(self, cell: Cell) -> Cell:
        if cell.config.get("activation") != "softmax":
            raise TrainingError('the task classify names one of several classes: [model] activation must be "softmax"')
        return self._scales.wrap(cell, self._table.names, self._classes, None)

    @property
    def note(self) -> str:
        return f"Takes {', '.join(self._table.names)}; answers the probabilities of {', '.join(self._classes)}."

    @cached_property
    def _table(self) -> Table:
        path = Path(self.file)
        if path.suffix == ".npz":
            if self.columns:
                raise TrainingError(f"{path}: `columns` are for CSV files; an NPZ file's X has them all")
            return read_npz(path, labelled=True)
        if not (self.sequence and self.label):
            raise TrainingError(f"{path}: to classify, `sequence` and `label` must name columns")
        return read_csv(path, Columns(self.columns, self.sequence, self.label, self.time))

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        classes = sorted(set(self._table.labels), key=_number_first)
        if len(classes) < 2:
            raise TrainingError(f"{self.file}: there is one class only, {classes[0]!r}; two are needed at least")
        return tuple(classes)

    @cached_property
    def _labels(self) -> Tensor:
        """int64 [n]: places among the classes."""
        place = {name: number for number, name in enumerate(self._classes)}
        return torch.tensor([place[label] for label in self._table.labels])

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor([float(len(values)) for values in self._table.values])

    @cached_property
    def _parts(self) -> dict[str, list[int]]:
        """The sequences of each part, by their numbers."""
        source = torch.Generator().manual_seed(self.split_seed)
        parts: dict[str, list[int]] = {name: [] for name in _PARTS}
        for number, name in enumerate(self._classes):
            members = (self._labels == number).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=source)]
            # A class without a validation sequence could not be seen to fail.
            held = [max(1, part(share, len(members))) if share else 0 for share in (self.validation, self.test)]
            if sum(held) >= len(members):
                raise TrainingError(
                    f"{self.file}: class {name!r} has too few sequences: of {len(members)}, validation and test take {sum(held)}; "
                    "training needs one at least"
                )
            sizes = [len(members) - sum(held), *held]
            for key, some in zip(_PARTS, torch.split(members, sizes), strict=True):
                parts[key] += some.tolist()
        return parts

    @cached_property
    def _scales(self) -> Scales:
        return Scales.of(np.concatenate([self._table.values[at] for at in self._parts["train"]]), self.transform)

    @cached_property
    def _normalised(self) -> list[Tensor]:
        return [self._scales.normalised(values) for values in self._table.values]

    def _answers(self, cell: Cell, members: list[int]) -> Tensor:
        """The likeliest class after the last row of each, int64 [n]."""
        inputs = padded([torch.from_numpy(self._table.values[at]).float() for at in members])
        with torch.inference_mode():
            outputs = cell.sequence(inputs)[0]
        last = outputs[torch.arange(len(members)), self._lengths[members].long() - 1]
        return last.argmax(1)


def _number_first(label: str) -> tuple[int, float, str]:
    """Numbers in their order, before words."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _confusion(labels: Tensor, answers: Tensor, classes: tuple[str, ...]) -> Figure:
    from engram_models.training.pictures import figure

    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
    drawn = figure(5, 4.5)
    axes = drawn.subplots()
    axes.imshow(counts.numpy(), cmap="Blues")
    for row, column in counts.nonzero().tolist():
        axes.text(column, row, str(counts[row, column].item()), ha="center", va="center")
    axes.set(title="held out", xlabel="answered", ylabel="is", xticks=range(len(classes)), yticks=range(len(classes)))
    axes.set_xticklabels(classes, rotation=45)
    axes.set_yticklabels(classes)
    return drawn
