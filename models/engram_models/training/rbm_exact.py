"""The procedure "rbm-exact": a small RBM whose likelihood and gradient are known exactly, and contrastive divergence beside.

The RBM learns bars and stripes by exact gradient ascent, stopped while it still learns, when its Gibbs chains already mix
slowly. Then many short chains give the CD-k gradient for several k; its cosine with the exact gradient is what k buys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from engram_models.boltzmann import RBM
from engram_models.training.boltzmann import (
    all_states,
    contrastive_divergence,
    exact_gradient,
    log_likelihood,
    log_partition,
)
from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Outcome
from engram_models.training.pictures import figure
from engram_models.training.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE_MAX = 12  # units on each side: all pairs of their states are summed
_STEPS_AT_ONCE = 20
_BLOCK = 256  # visible states whose pairs with all hidden ones are summed at once


@dataclass(frozen=True)
class ExactOptions:
    """The [options] of a recipe."""

    rows: int = 3  # of the bars and stripes; visible units are rows * columns
    columns: int = 4
    hidden: int = 12
    learning_rate: float = 0.3
    steps: int = 600  # of exact gradient ascent
    ks: tuple[int, ...] = (1, 2, 5, 10, 25)
    chains: int = 22_000  # at once, as many from each pattern
    rounds: int = 20  # chains * rounds samples for each k

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.hidden) < 1 or max(self.rows * self.columns, self.hidden) > SIDE_MAX:
            raise ValueError(f"an RBM here has 1 to {SIDE_MAX} units on a side; rows * columns are the visible ones")
        if min(self.steps, self.rounds, self.chains) < 1 or self.learning_rate <= 0:
            raise ValueError("steps, rounds, chains and learning_rate must be greater than 0")
        if len(self.ks) < 2 or list(self.ks) != sorted(set(self.ks)) or self.ks[0] < 1:
            raise ValueError("ks must be two or more rising numbers from 1")


class RBMExact:
    """An Experiment. `total` and `done` count steps of ascent and rounds of chains."""

    Options: ClassVar[type] = ExactOptions

    def __init__(self, recipe: Recipe, options: ExactOptions, seed: int) -> None:
        self.options, self.done, self.total = options, 0, options.steps + options.rounds
        self.patterns = bars_and_stripes(options.rows, options.columns)
        if options.chains < len(self.patterns):
            raise TrainingError(f"{recipe.path}: [options] chains must be at least {len(self.patterns)}, one a pattern")
        torch.manual_seed(seed)
        self.rbm = RBM(options.rows * options.columns, options.hidden).double()
        torch.nn.init.normal_(self.rbm.weight, std=0.1)  # from less it takes long to come off the ground
        self._generator = torch.Generator().manual_seed(seed)
        self._sums = torch.zeros(len(options.ks), sum(p.numel() for p in self.rbm.parameters()), dtype=torch.float64)
        self._likelihoods: list[float] = []

    def advance(self) -> str:
        if self.done < self.options.steps:
            for _ in range(min(_STEPS_AT_ONCE, self.options.steps - self.done)):
                self._ascend()
            self._likelihoods.append(log_likelihood(self.rbm, self.patterns).mean().item())
            return f"log-likelihood {self._likelihoods[-1]:.3f}"
        start = self.patterns.repeat(self.options.chains // len(self.patterns), 1)
        for number, k in enumerate(self.options.ks):
            self._sums[number] += contrastive_divergence(self.rbm, start, k, self._generator).flat()
        self.done += 1
        return f"cosines {', '.join(f'{value:.3f}' for value in self._cosines())}"

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"rbm.{key}": value for key, value in self.rbm.state_dict().items()}
        kept |= {"sums": self._sums, "generator": self._generator.get_state(), "done": torch.tensor(self.done)}
        return {**kept, "likelihoods": torch.tensor(self._likelihoods, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.rbm.load_state_dict({key: tensors[f"rbm.{key}"] for key in self.rbm.state_dict()})
        self._generator.set_state(tensors["generator"])
        self._sums, self.done = tensors["sums"].clone(), int(tensors["done"])
        self._likelihoods = tensors["likelihoods"].tolist()

    def finish(self) -> Outcome:
        cosines = self._cosines()
        log_z, by_pairs = log_partition(self.rbm), log_partition_of_pairs(self.rbm)
        likelihood = log_likelihood(self.rbm, self.patterns)
        metrics = {
            "log_likelihood": likelihood.mean().item(),
            "log_likelihood_best": -math.log(len(self.patterns)),  # of any model: the patterns are equally likely
            "partition_difference": abs(log_z - by_pairs).item(),
            "likelihood_difference": (likelihood - _likelihood_of_pairs(self.rbm, self.patterns, by_pairs)).abs().max().item(),
            **{f"cosine_{k}": cosine for k, cosine in zip(self.options.ks, cosines, strict=True)},
            "smallest_rise": min(after - before for before, after in itertools.pairwise(cosines)),
            "samples": self.options.rounds * (self.options.chains // len(self.patterns)) * len(self.patterns),
        }  # fmt: skip
        curves = {"log-likelihood": self._likelihoods}
        return Outcome(metrics, curves, {"cosine": lambda: self._picture(cosines)}, None)

    def _ascend(self) -> None:
        gradient = exact_gradient(self.rbm, self.patterns)
        with torch.no_grad():
            for name, value in gradient._asdict().items():
                getattr(self.rbm, name).add_(value, alpha=self.options.learning_rate)
        self.done += 1

    def _cosines(self) -> list[float]:
        exact = exact_gradient(self.rbm, self.patterns).flat()
        cosines: list[float] = torch.cosine_similarity(self._sums, exact[None], 1).tolist()
        return cosines

    def _picture(self, cosines: list[float]) -> Figure:
        drawn = figure()
        axes = drawn.subplots()
        axes.semilogx(self.options.ks, cosines, "o-")
        axes.set(
            title="CD-k against the exact gradient",
            xlabel="k, sweeps of Gibbs sampling",
            ylabel="cosine",
            ylim=(0, 1.02),
        )
        axes.set_xticks(self.options.ks, [str(k) for k in self.options.ks])
        axes.minorticks_off()
        return drawn


def bars_and_stripes(rows: int, columns: int) -> Tensor:
    """Every image whose rows, or whose columns, are each all on or all off. float64 [2^rows + 2^columns - 2, pixels]"""
    stripes = {tuple(bit for bit in bits for _ in range(columns)) for bits in itertools.product((0, 1), repeat=rows)}
    bars = {bits * rows for bits in itertools.product((0, 1), repeat=columns)}
    return torch.tensor(sorted(stripes | bars), dtype=torch.float64)


@torch.no_grad()
def log_partition_of_pairs(rbm: RBM) -> Tensor:
    """log Z as its definition has it: over every pair (v, h), e^-E(v, h), with neither side summed in closed form. float64"""
    vs = all_states(rbm.weight.shape[1])
    parts = [
        torch.logsumexp(-_energies(rbm, vs[start : start + _BLOCK]), (0, 1)) for start in range(0, len(vs), _BLOCK)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


@torch.no_grad()
def _likelihood_of_pairs(rbm: RBM, v: Tensor, log_z: Tensor) -> Tensor:
    return torch.logsumexp(-_energies(rbm, v), 1) - log_z


def _energies(rbm: RBM, v: Tensor) -> Tensor:
    """E(v, h) = -a.v - b.h - v'Wh for every h. v [n, visible] -> float64 [n, 2^hidden]"""
    hs = all_states(rbm.weight.shape[0])
    return -(v @ rbm.visible_bias.double())[:, None] - hs @ rbm.bias.double() - v @ rbm.weight.double().t() @ hs.t()
