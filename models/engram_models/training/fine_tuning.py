"""Fine-tuning: the classifier of a belief network by backpropagation, softmax on top. Used by the procedure "dbn-digits"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engram_models.boltzmann import DBN
from engram_models.training.checkpoint import optimizer_tensors, restore_optimizer, under


@dataclass(frozen=True)
class Tuning:
    """How a net is tuned, whatever its weights came from. 0 stands for "not" but for epochs, learning_rate and batch."""

    epochs: int
    learning_rate: float  # of Adam, going down to 0 along a cosine
    batch: int
    weight_decay: float = 0.0
    dropout: float = 0.0  # share of the hidden units that is left out at a time
    turn: float = 0.0  # images are turned by up to so many radians,
    grow: float = 0.0  # made larger or smaller by up to this share,
    move: float = 0.0  # and moved by up to this share of half their width

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError("epochs, batch and learning_rate of the tuning must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and less than 1")


class FineTuning:
    """An epoch at a time; resumable. x [n, side * side], labels int64 [n]; changes dbn's classifier, not its RBMs."""

    def __init__(self, dbn: DBN, x: Tensor, labels: Tensor, tuning: Tuning, seed: int) -> None:
        self.dbn, self.done = dbn, 0
        self._x, self._labels, self._tuning = x, labels, tuning
        self._generator = torch.Generator().manual_seed(seed)
        self._weights = [*dbn.layers.parameters(), *dbn.head.parameters()]
        self._optimizer = torch.optim.AdamW(self._weights, tuning.learning_rate, weight_decay=tuning.weight_decay)
        self._steps = math.ceil(len(x) / tuning.batch) * tuning.epochs

    def advance(self) -> float:
        """An epoch; the mean loss (cross-entropy)."""
        tuning, total = self._tuning, 0.0
        parts = torch.randperm(len(self._x), generator=self._generator).split(tuning.batch)  # type: ignore[no-untyped-call]
        for number, rows in enumerate(parts, self.done * len(parts)):
            for group in self._optimizer.param_groups:
                group["lr"] = tuning.learning_rate * 0.5 * (1 + math.cos(math.pi * number / self._steps))
            loss = functional.cross_entropy(self._logits(self._disturbed(self._x[rows])), self._labels[rows])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += loss.item() * len(rows)
        self.done += 1
        return total / len(self._x)

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"weight.{number}": value.detach() for number, value in enumerate(self._weights)}
        kept |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self._optimizer).items()}
        return {**kept, "generator": self._generator.get_state(), "done": torch.tensor(self.done)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for number, weight in enumerate(self._weights):
                weight.copy_(tensors[f"weight.{number}"])
        restore_optimizer(self._optimizer, under("optimizer.", tensors))
        self._generator.set_state(tensors["generator"])
        self.done = int(tensors["done"])

    def _logits(self, x: Tensor) -> Tensor:
        """DBN.logits, with hidden units left out."""
        kept = 1 - self._tuning.dropout
        if kept == 1:
            return self.dbn.logits(x)
        for layer in self.dbn.net:
            h = torch.sigmoid(layer(x))
            x = h * torch.bernoulli(torch.full_like(h, kept), generator=self._generator) / kept
        logits: Tensor = self.dbn.head(x)
        return logits

    def _disturbed(self, x: Tensor) -> Tensor:
        """Each image a little turned, grown and moved, each in its own way: few images alone are learnt by heart."""
        tuning, rows, side = self._tuning, len(x), math.isqrt(x.shape[1])
        if not (tuning.turn or tuning.grow or tuning.move):
            return x
        angle, size, right, down = (torch.rand(4, rows, generator=self._generator) * 2 - 1) * torch.tensor(
            [tuning.turn, tuning.grow, tuning.move, tuning.move]
        )[:, None]
        cos, sin = (1 + size) * torch.cos(angle), (1 + size) * torch.sin(angle)
        maps = torch.stack((cos, -sin, right, sin, cos, down), 1).view(rows, 2, 3)
        grid = functional.affine_grid(maps, [rows, 1, side, side], align_corners=False)
        return functional.grid_sample(x.view(rows, 1, side, side), grid, align_corners=False).view(rows, -1)
