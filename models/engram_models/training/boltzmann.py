"""How RBMs are learnt: contrastive divergence (CD-k), persistent chains (PCD), and stacks of RBMs layer by layer.

Also what a small RBM's learning can be held against: its exact partition function, likelihood and gradient, by counting all
states. Source: Hinton 2002 (CD), Tieleman 2008 (PCD), Hinton, Osindero and Teh 2006 (stacks), Hinton 2010, "A practical guide
to training RBMs" (the recipe). Used by the procedures "rbm-exact" and "dbn-digits".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engram_models.boltzmann import RBM

UNITS_MAX = 16  # of the smaller side, whose 2^n states are counted one by one
_PROBABILITY_MIN = 0.01  # of a visible unit, when biases start from how often it is on
_EPOCHS_GENTLE = 5  # with half the momentum, until the weights know where to go (Hinton 2010, section 9)


class Gradient(NamedTuple):
    """Where the mean log-likelihood of the data rises: by weight (hidden, visible), visible_bias [visible], bias [hidden]."""

    weight: Tensor
    visible_bias: Tensor
    bias: Tensor

    def flat(self) -> Tensor:
        return torch.cat([part.flatten() for part in self])


def gibbs(rbm: RBM, v: Tensor, k: int, generator: torch.Generator, smooth: bool = False) -> Tensor:
    """v [batch, visible] after k sweeps, each h ~ P(h | v), then v ~ P(v | h); smooth: v = P(v | h)."""
    for _ in range(k):
        v = rbm.down(_drawn(rbm.up(v), generator))
        v = v if smooth else _drawn(v, generator)
    return v


@torch.no_grad()
def contrastive_divergence(rbm: RBM, v: Tensor, k: int, generator: torch.Generator, smooth: bool = False) -> Gradient:
    """CD-k: the model's statistics are taken after k sweeps from the data, v [batch, visible]. Hinton 2002.

    smooth leaves visible units at their probabilities, which has less noise and suits data between 0 and 1, but does not
    tend to the exact gradient as k grows (Hinton 2010, section 3.2).
    """
    return _difference(_statistics(rbm, v), _statistics(rbm, gibbs(rbm, v, k, generator, smooth)))


@torch.no_grad()
def persistent_divergence(
    rbm: RBM, v: Tensor, chains: Tensor, k: int, generator: torch.Generator
) -> tuple[Gradient, Tensor]:
    """PCD: the model's statistics come from chains [n, visible] that go on from call to call. Tieleman 2008.

    -> gradient, the chains after k more sweeps
    """
    chains = gibbs(rbm, chains, k, generator)
    return _difference(_statistics(rbm, v), _statistics(rbm, chains)), chains


def log_partition(rbm: RBM) -> Tensor:
    """log Z, summed over all states of the smaller side, in float64. Raises ValueError beyond UNITS_MAX units there."""
    weight, a, b = _double(rbm)
    if len(b) <= len(a):
        h = all_states(len(b))
        return torch.logsumexp(h @ b + functional.softplus(a + h @ weight).sum(1), 0)
    return torch.logsumexp(-_free_energy(rbm, all_states(len(a))), 0)


def log_likelihood(rbm: RBM, v: Tensor) -> Tensor:
    """log P(v) = -F(v) - log Z, exactly, in float64. v [batch, visible] -> [batch]. Raises as log_partition."""
    return -_free_energy(rbm, v.double()) - log_partition(rbm)


@torch.no_grad()
def exact_gradient(rbm: RBM, v: Tensor) -> Gradient:
    """Of the mean log-likelihood of v [batch, visible]: <v h> under the data less <v h> under the model, in float64."""
    weight, a, b = _double(rbm)
    v = v.double()
    h = torch.sigmoid(b + v @ weight.t())
    data = Gradient(h.t() @ v / len(v), v.mean(0), h.mean(0))
    if len(b) <= len(a):
        hs = all_states(len(b))
        p = torch.softmax(hs @ b + functional.softplus(a + hs @ weight).sum(1), 0)
        vs = torch.sigmoid(a + hs @ weight)
    else:
        vs = all_states(len(a))
        p = torch.softmax(-_free_energy(rbm, vs), 0)
        hs = torch.sigmoid(b + vs @ weight.t())
    return _difference(data, Gradient((hs * p[:, None]).t() @ vs, p @ vs, p @ hs))


def all_states(units: int) -> Tensor:
    """Every state of so many binary units, float64 [2^units, units]. Raises ValueError beyond UNITS_MAX."""
    if units > UNITS_MAX:
        raise ValueError(
            f"an RBM with {units} units on its smaller side has too many states to count, up to {UNITS_MAX} go"
        )
    return (torch.arange(2**units)[:, None] >> torch.arange(units) & 1).double()


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """1 with probability p, else 0; twice as fast as torch.bernoulli."""
    return (torch.rand(p.shape, generator=generator, dtype=p.dtype) < p).to(p.dtype)


def _statistics(rbm: RBM, v: Tensor) -> Gradient:
    h = rbm.up(v)
    return Gradient(h.t() @ v / len(v), v.mean(0), h.mean(0))


def _difference(data: Gradient, model: Gradient) -> Gradient:
    return Gradient(*(one - other for one, other in zip(data, model, strict=True)))


def _double(rbm: RBM) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, visible bias and hidden bias in float64."""
    return rbm.weight.double(), rbm.visible_bias.double(), rbm.bias.double()


def _free_energy(rbm: RBM, v: Tensor) -> Tensor:
    weight, a, b = _double(rbm)
    return -(v @ a) - functional.softplus(b + v @ weight.t()).sum(1)


@dataclass(frozen=True)
class Learning:
    """How each RBM of a stack is learnt."""

    epochs: int
    learning_rate: float
    batch: int
    momentum: float
    weight_decay: float
    k: int
    persistent: bool  # PCD, else CD
    smooth: bool  # CD's visible units are not sampled

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.k) < 1 or self.learning_rate <= 0:
            raise ValueError("epochs, batch, k and learning_rate of an RBM must be greater than 0")


class Pretraining:
    """Greedy, layer by layer: each RBM learns the features of the one below as its data. An epoch at a time; resumable.

    data [n, visible], 0..1; a number between is taken for the probability of a 1.
    """

    def __init__(self, data: Tensor, hidden: Sequence[int], learning: Learning, seed: int) -> None:
        torch.manual_seed(seed)
        self.rbms = [RBM(*pair) for pair in zip([data.shape[1], *hidden], hidden, strict=False)]
        self.done, self.total = 0, learning.epochs * len(hidden)
        self.errors: list[float] = []  # mean squared error of the recreation, an epoch each
        self._learning, self._input = learning, data
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_layer()

    def advance(self) -> float:
        """An epoch of the layer that is being learnt; the mean squared error of its recreations."""
        learning, rbm = self._learning, self.rbms[self._layer]
        gentle = self.done % learning.epochs < _EPOCHS_GENTLE
        error = 0.0
        with torch.no_grad():
            order = torch.randperm(len(self._features), generator=self._generator)
            for rows in order.split(learning.batch):  # type: ignore[no-untyped-call]
                v = self._features[rows]
                self._step(rbm, v, learning.momentum / 2 if gentle else learning.momentum)
                error += (rbm.down(rbm.up(v)) - v).square().sum().item()
        self.errors.append(error / self._features.numel())
        self.done += 1
        if self.done % learning.epochs == 0 and self.done < self.total:
            self._begin_layer()
        return self.errors[-1]

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"{n}.{key}": value for n, rbm in enumerate(self.rbms) for key, value in rbm.state_dict().items()}
        kept |= {f"velocity.{name}": value for name, value in self._velocity._asdict().items()}
        kept |= {"chains": self._chains, "generator": self._generator.get_state(), "done": torch.tensor(self.done)}
        return {**kept, "errors": torch.tensor(self.errors, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for number, rbm in enumerate(self.rbms):
            rbm.load_state_dict({key: tensors[f"{number}.{key}"] for key in rbm.state_dict()})
        self.done, self.errors = int(tensors["done"]), tensors["errors"].tolist()
        self._features = self._below(self._layer)
        self._velocity = Gradient(*(tensors[f"velocity.{name}"].clone() for name in Gradient._fields))
        self._chains = tensors["chains"].clone()
        self._generator.set_state(tensors["generator"])

    @property
    def _layer(self) -> int:
        return min(self.done // self._learning.epochs, len(self.rbms) - 1)

    def _begin_layer(self) -> None:
        rbm, learning = self.rbms[self._layer], self._learning
        self._features = self._below(self._layer)
        self._velocity = Gradient(*(torch.zeros_like(getattr(rbm, name)) for name in Gradient._fields))
        self._chains = _drawn(self._features[: learning.batch], self._generator)
        with torch.no_grad():  # each visible unit is on as often as in the data, before anything is learnt
            rbm.visible_bias.copy_(torch.logit(self._features.mean(0), _PROBABILITY_MIN))

    @torch.no_grad()
    def _below(self, layer: int) -> Tensor:
        """What a layer has as its data."""
        v = self._input
        for rbm in self.rbms[:layer]:
            v = rbm.up(v)
        return v

    def _step(self, rbm: RBM, v: Tensor, momentum: float) -> None:
        learning = self._learning
        if learning.persistent:
            gradient, self._chains = persistent_divergence(rbm, v, self._chains, learning.k, self._generator)
        else:
            gradient = contrastive_divergence(rbm, v, learning.k, self._generator, learning.smooth)
        gradient.weight.sub_(rbm.weight, alpha=learning.weight_decay)
        for name, velocity in self._velocity._asdict().items():
            velocity.mul_(momentum).add_(getattr(gradient, name), alpha=learning.learning_rate)
            getattr(rbm, name).add_(velocity)
