"""Handwritten digits, read row by row or pixel by pixel; after each the cell says what it may be reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_models.cell import Cell
from engram_models.digits import split_digits
from engram_models.training.bptt import Batch
from engram_models.training.errors import TrainingError
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLASSES, _SIDE = 10, 8
_DRAWN = 6


@dataclass(frozen=True)
class DigitRows:
    """scikit-learn's digits, 8x8 pixels of 0..1: 1,437 to train on, 360 held out (see digits.split_digits).

    Inputs: the rows, top first, `width` pixels at a time (8: a row a step, 1: a pixel a step). Targets: the class, after every
    step; the steps count 1, 2, 3, ..., so that the last counts most and the first is still calibrated, or `last_only`. In
    training each image is moved by up to `shift` pixels to the side and gets `noise` (a standard deviation): 1,437 images
    alone are learnt by heart. Quick evaluations look at the training digits; the held-out ones are for the result alone.
    """

    width: int = 8
    shift: int = 1
    noise: float = 0.05
    last_only: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or _SIDE % self.width or not 0 <= self.shift < _SIDE or self.noise < 0:
            raise ValueError("width must divide 8, shift be 0 to 7 and noise not be negative")

    @property
    def input_size(self) -> int:
        return self.width

    output_size = _CLASSES

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        """Every epoch has another order; digits that do not fill a last batch wait for the next one."""
        images, labels = _digits()[0]
        if rows > len(labels):
            raise TrainingError(f"a batch of {rows} is more than the {len(labels)} digits that there are")
        epoch, place = divmod(number, len(labels) // rows)
        order = torch.randperm(len(labels), generator=generator(seed, epoch, purpose=2))
        chosen = order[place * rows : (place + 1) * rows]
        inputs = self._steps(self._disturbed(images[chosen], generator(seed, number)))
        weights = torch.arange(1.0, inputs.shape[1] + 1)
        if self.last_only:
            weights[:-1] = 0
        return Batch(inputs, labels[chosen].unsqueeze(1).expand(inputs.shape[:2]), weights.expand(inputs.shape[:2]))

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        trained, held = _digits()
        found: dict[str, Any] = {"training_accuracy": self._by_step(cell, *trained)[-1]}
        if thorough:
            by_step = self._by_step(cell, *held)
            found |= {"accuracy": by_step[-1], "accuracy_by_step": by_step}
            found |= {"trained_on": len(trained[1]), "held_out": len(held[1])}
        return found

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        return {"beliefs": lambda: self._drawn(cell)}

    def _steps(self, images: Tensor) -> Tensor:
        """[n, 8, 8] -> [n, steps, width]"""
        return images.reshape(len(images), -1, self.width)

    def _disturbed(self, images: Tensor, source: torch.Generator) -> Tensor:
        padded = torch.nn.functional.pad(images, (self.shift, self.shift))
        moved = torch.randint(0, 2 * self.shift + 1, (len(images), 1, 1), generator=source)
        columns = (torch.arange(_SIDE).view(1, 1, _SIDE) + moved).expand(-1, _SIDE, -1)
        return padded.gather(2, columns) + self.noise * torch.randn(images.shape, generator=source)

    def _by_step(self, cell: Cell, images: Tensor, labels: Tensor) -> list[float]:
        """The share of digits named correctly after each step."""
        with torch.inference_mode():
            named = cell.sequence(self._steps(images))[0].argmax(2)
        return [round(share, 4) for share in (named == labels.unsqueeze(1)).double().mean(0).tolist()]

    def _drawn(self, cell: Cell) -> Figure:
        """Some held-out digits, and beside each what is believed after every step."""
        from engram_models.training.pictures import figure

        images = _digits()[1][0][:_DRAWN]
        with torch.inference_mode():
            beliefs = cell.sequence(self._steps(images))[0]
        drawn = figure(1.8 * _DRAWN, 4.5)
        for place, (above, below) in enumerate(zip(*drawn.subplots(2, _DRAWN), strict=True)):
            above.imshow(images[place].numpy(), cmap="gray_r")
            above.axis("off")
            below.imshow(beliefs[place].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            below.set(xlabel="class", ylabel="" if place else "step", xticks=range(_CLASSES))
            below.tick_params(labelsize="x-small")
        return drawn


@cache
def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images [n, 8, 8], labels [n]) to train on, and held out."""
    try:
        trained, held = split_digits()
    except ImportError as error:
        raise TrainingError(f"the digits are scikit-learn's: pip install 'engram[train]' ({error})") from error
    pair = [(torch.from_numpy(part.rows), torch.from_numpy(part.labels)) for part in (trained, held)]
    return pair[0], pair[1]
