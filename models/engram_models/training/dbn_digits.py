"""The procedure "dbn-digits": belief networks on scikit-learn's handwritten digits, and the same nets from random weights.

The RBMs learn from all training images, without their labels. Then nets are tuned on the labels of some of the images, each
once from the RBMs' weights and once from random ones, by the same recipe; held-out digits judge them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engram_models.boltzmann import DBN
from engram_models.digits import split_digits
from engram_models.training.boltzmann import Learning, Pretraining
from engram_models.training.checkpoint import under
from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Outcome
from engram_models.training.fine_tuning import FineTuning, Tuning
from engram_models.training.pictures import figure
from engram_models.training.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
SIDE = 8
FILLING_SWEEPS = 5
_SHOWN = 10  # digits in a picture


@dataclass(frozen=True)
class DigitsOptions:
    """The [options] of a recipe."""

    hidden: tuple[int, ...] = (192, 192)
    labels: tuple[int, ...] = (0,)  # how many a net is tuned on; 0: all
    draws: int = 1  # of each number of labels
    random_gain: float = (
        4.0  # random weights: Glorot's, times this; 4 is what Glorot and Bengio 2010 advise for sigmoids
    )
    pretraining_epochs: int = 50
    pretraining_rate: float = 0.1
    pretraining_batch: int = 20
    momentum: float = 0.9
    weight_decay: float = 2e-4  # of the RBMs
    k: int = 1
    persistent: bool = False
    smooth: bool = True
    epochs: int = 100
    learning_rate: float = 3e-3
    batch: int = 32
    dropout: float = 0.0
    turn: float = 0.0
    grow: float = 0.0
    move: float = 0.0

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1 or self.draws < 1:
            raise ValueError("hidden must be one or more sizes of at least 1, and draws at least 1")
        if not self.labels or min(self.labels) < 0 or len(set(self.labels)) < len(self.labels):
            raise ValueError("labels must be different numbers; 0 stands for all")
        self.learning, self.tuning  # noqa: B018 - they look at their own numbers

    @property
    def learning(self) -> Learning:
        return Learning(
            self.pretraining_epochs, self.pretraining_rate, self.pretraining_batch, self.momentum, self.weight_decay,
            self.k, self.persistent, self.smooth,
        )  # fmt: skip

    @property
    def tuning(self) -> Tuning:
        return Tuning(
            self.epochs,
            self.learning_rate,
            self.batch,
            dropout=self.dropout,
            turn=self.turn,
            grow=self.grow,
            move=self.move,
        )


class _Net(NamedTuple):
    """One of the nets that are tuned."""

    pretrained: bool
    labels: int
    draw: int


class DBNDigits:
    """An Experiment. `total` and `done` count epochs, of RBMs and of nets."""

    Options: ClassVar[type] = DigitsOptions

    def __init__(self, recipe: Recipe, options: DigitsOptions, seed: int) -> None:
        trained, held = split_digits()
        self._images, self._labels = _flat(trained.rows), torch.from_numpy(trained.labels)
        self._held, self._held_labels = _flat(held.rows), torch.from_numpy(held.labels)
        if max(options.labels) > len(self._labels):
            raise TrainingError(f"{recipe.path}: [options] labels are at most {len(self._labels)}; 0 stands for all")
        self.options, self.seed = options, seed
        self._nets = [
            _Net(pretrained, labels, draw)
            for labels in options.labels for draw in range(options.draws) for pretrained in (False, True)
        ]  # fmt: skip
        self._pretraining = Pretraining(self._images, options.hidden, options.learning, seed)
        self._tuning: FineTuning | None = None
        self._accuracies: list[float] = []  # of the nets that are done
        self._losses: list[float] = []  # of the tuning, all nets one after another
        self.done, self.total = 0, self._pretraining.total + len(self._nets) * options.epochs

    def advance(self) -> str:
        self.done += 1
        if self._pretraining.done < self._pretraining.total:
            return f"recreation error {self._pretraining.advance():.4f}"
        if self._tuning is None or self._tuning.done == self.options.epochs:
            self._tuning = self._begin(len(self._accuracies))
        self._losses.append(self._tuning.advance())
        if self._tuning.done == self.options.epochs:
            self._accuracies.append(self._accuracy(self._tuning.dbn))
        last = f", last net {self._accuracies[-1]:.4f}" if self._accuracies else ""
        return f"loss {self._losses[-1]:.4f}{last}"

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"pretraining.{key}": value for key, value in self._pretraining.tensors().items()}
        if self._tuning is not None:
            kept |= {f"tuning.{key}": value for key, value in self._tuning.tensors().items()}
        kept["accuracies"] = torch.tensor(self._accuracies, dtype=torch.float64)
        kept["losses"] = torch.tensor(self._losses, dtype=torch.float64)
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._pretraining.restore(under("pretraining.", tensors))
        self._accuracies, self._losses = tensors["accuracies"].tolist(), tensors["losses"].tolist()
        self.done = self._pretraining.done + len(self._losses)
        if self._losses:
            self._tuning = self._begin((len(self._losses) - 1) // self.options.epochs)
            self._tuning.restore(under("tuning.", tensors))

    def finish(self) -> Outcome:
        assert self._tuning is not None
        dbn = self._tuning.dbn.eval()  # the last net: pretrained, and of the last number of labels
        metrics = {**self._comparison(), **self._anchor(dbn), **recreation(dbn, self._held, self._images.mean(0))}
        pictures: dict[str, Callable[[], Figure]] = {
            "features": lambda: features_picture(dbn),
            "recreations": lambda: recreations_picture(dbn, self._held[:_SHOWN]),
        }
        if len(self.options.labels) > 1:
            pictures["accuracy"] = lambda: accuracy_picture(self.options.labels, metrics)
        return Outcome(metrics, {"recreation error": self._pretraining.errors, "loss": self._losses}, pictures, dbn)

    def _begin(self, number: int) -> FineTuning:
        """The tuning of a net. The two of a draw differ in their weights alone: the same images, and in the same order."""
        net, options = self._nets[number], self.options
        seed = self.seed * 1000 + net.draw
        torch.manual_seed(seed)
        dbn = DBN.from_rbms(self._pretraining.rbms, CLASSES)
        if not net.pretrained:
            for layer in dbn.net:
                torch.nn.init.xavier_uniform_(layer.weight, options.random_gain)
                torch.nn.init.zeros_(layer.bias)
        rows = torch.randperm(len(self._labels), generator=torch.Generator().manual_seed(seed))
        rows = rows[: net.labels or len(rows)]
        return FineTuning(dbn, self._images[rows], self._labels[rows], options.tuning, seed)

    def _accuracy(self, dbn: DBN) -> float:
        with torch.no_grad():
            return (dbn.logits(self._held).argmax(1) == self._held_labels).double().mean().item()

    def _comparison(self) -> dict[str, float]:
        """Mean accuracies over the draws, for each number of labels and, if there are several, over all of them."""
        table = np.array(self._accuracies).reshape(len(self.options.labels), self.options.draws, 2).mean(1)
        found: dict[str, float] = {}
        for labels, row in zip(self.options.labels, table, strict=True):
            if len(table) > 1:
                found |= {f"accuracy_random_{labels}": row[0], f"accuracy_pretrained_{labels}": row[1]}
        random, pretrained = table.mean(0)
        found |= {"accuracy_random": random, "accuracy_pretrained": pretrained, "advantage": pretrained - random}
        found["advantage_least"] = (table[:, 1] - table[:, 0]).min()
        return {name: round(float(value), 5) for name, value in found.items()}

    def _anchor(self, dbn: DBN) -> dict[str, float]:
        """RBM + logistic regression, the public anchor: one RBM's features of all training images, with all labels."""
        from sklearn.linear_model import LogisticRegression

        with torch.no_grad():
            trained, held = (dbn.stack[0].up(images).numpy() for images in (self._images, self._held))
        regression = LogisticRegression(max_iter=2000).fit(trained, self._labels.numpy())
        return {"accuracy_rbm_logistic": round(float(regression.score(held, self._held_labels.numpy())), 5)}


@torch.no_grad()
def recreation(dbn: DBN, held: Tensor, mean: Tensor) -> dict[str, float]:
    """Mean squared errors of a pixel: recreated; its lower half filled in, and that by the training's mean."""
    known = lower_half_unknown(held)
    filled = dbn.recreate(held, known, FILLING_SWEEPS)[0]
    found = {
        "recreation_error": (dbn.recreate(held)[0] - held).square().mean(),
        "filling_error": (filled - held)[~known].square().mean(),
        "filling_error_of_mean": (mean.expand_as(held) - held)[~known].square().mean(),
    }
    return {name: round(float(value), 5) for name, value in found.items()}


def lower_half_unknown(images: Tensor) -> Tensor:
    """A mask for `recreate`: bool [n, pixels], true in the upper half."""
    return (torch.arange(images.shape[1]) < images.shape[1] // 2).expand_as(images)


def features_picture(dbn: DBN) -> Figure:
    """What the first RBM's hidden units look for: the weights of up to 100 of them, as images."""
    weights = dbn.stack[0].weight.detach()[:100]
    drawn = figure(6, 6)
    axes = drawn.subplots()
    axes.imshow(_mosaic(weights / weights.abs().amax(1, keepdim=True), 10), cmap="RdBu", vmin=-1, vmax=1)
    axes.set_title("weights of the first layer")
    axes.set_axis_off()
    return drawn


@torch.no_grad()
def recreations_picture(dbn: DBN, images: Tensor) -> Figure:
    """Held-out digits, their recreations, the digits with their lower half taken away, and what is filled in."""
    known = lower_half_unknown(images)
    filled = dbn.recreate(images, known, FILLING_SWEEPS)[0]
    rows = torch.cat((images, dbn.recreate(images)[0], images * known, filled))
    drawn = figure(len(images) * 0.7, 3.2)
    axes = drawn.subplots()
    axes.imshow(_mosaic(rows, len(images)), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title("digits, recreated; lower half unknown, filled in")
    axes.set_axis_off()
    return drawn


def accuracy_picture(labels: tuple[int, ...], metrics: Mapping[str, float]) -> Figure:
    drawn = figure()
    axes = drawn.subplots()
    for name in ("pretrained", "random"):
        axes.plot(labels, [metrics[f"accuracy_{name}_{count}"] for count in labels], "o-", label=f"{name} weights")
    axes.set(title="held-out digits named correctly", xlabel="labels", ylabel="accuracy")
    axes.legend()
    return drawn


def _mosaic(images: Tensor, across: int) -> NDArray[np.float32]:
    """Images [n, pixels] side by side, `across` in a row, with a pixel of NaN between: one picture is drawn faster than many."""
    padded = functional.pad(images.view(-1, SIDE, SIDE), (0, 1, 0, 1), value=torch.nan)
    padded = functional.pad(padded, (0, 0, 0, 0, 0, -len(images) % across), value=torch.nan)
    tiles = padded.view(-1, across, SIDE + 1, SIDE + 1).transpose(1, 2)
    mosaic: NDArray[np.float32] = tiles.reshape(-1, across * (SIDE + 1)).numpy()
    return mosaic


def _flat(rows: Any) -> Tensor:
    return torch.from_numpy(rows).view(len(rows), -1)
