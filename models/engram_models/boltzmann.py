"""Restricted Boltzmann machines, and belief networks that are stacks of them; what else is initialised from either.

Source: the deck's "Weight initialization using RBM" and "Deep Belief Network"; Smolensky 1986, Hinton 2002, Hinton, Osindero
and Teh 2006. Units are binary, v visible and h hidden; a, b their biases; E(v, h) = -a.v - b.h - v'Wh. A number between 0
and 1 stands for the probability that a unit is 1. Weights are kept as (hidden, visible), the transpose of the deck's W. How
they are learnt is in training/boltzmann.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from engram_models.cell import Cell, State
from engram_models.ntm import softplus
from engram_models.recurrent import Layer, RecurrentCell, affine, sigma_
from engram_models.spec import TensorSpec

WEIGHT_START = 0.01  # standard deviation of an untrained RBM's weights (Hinton 2010, "A practical guide", section 8)


class RBM(Cell):
    """A restricted Boltzmann machine as a model without state: each step is answered from its input alone.

    output "recreate": y = P(v | P(h | x)), [visible], the deck's recreation of x; "features": y = P(h | x), [hidden].
    """

    kind = "rbm"

    def __init__(self, visible: int, hidden: int, output: str = "recreate") -> None:
        super().__init__()
        if min(visible, hidden) < 1:
            raise ValueError("visible and hidden must be at least 1")
        sizes = {"recreate": visible, "features": hidden}
        if output not in sizes:
            raise ValueError(f"output {output!r} is not one of {', '.join(sizes)}")
        self.recreates = output == "recreate"
        self.weight = nn.Parameter(torch.randn(hidden, visible) * WEIGHT_START)
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.declare(
            TensorSpec("input", "float32", (visible,)),
            TensorSpec("output", "float32", (sizes[output],)),
            (),
            {"visible": visible, "hidden": hidden, "output": output},
        )

    def up(self, v: Tensor) -> Tensor:
        """P(h = 1 | v) = sigma(b + v W). [batch, visible] -> [batch, hidden]"""
        return sigma_(affine(v, self.weight, self.bias))

    def down(self, h: Tensor) -> Tensor:
        """P(v = 1 | h) = sigma(a + W h). [batch, hidden] -> [batch, visible]"""
        return sigma_(affine(h, self.weight.t(), self.visible_bias))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        features = self.up(x)
        return self.down(features) if self.recreates else features, state

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -a.v - sum_j log(1 + e^(b + v W)_j), so that P(v) = e^-F(v) / Z. [batch, visible] -> [batch]"""
        sums = affine(v, self.weight, self.bias)
        return -(v * self.visible_bias).sum(1) - softplus(sums).sum(1)

    def mean_field_energy(self, v: Tensor) -> Tensor:
        """F(v) less the entropy of units that are on with probability v; F(v) itself where v is 0 or 1. [batch]"""
        entropy: Tensor = (torch.special.entr(v) + torch.special.entr(1 - v)).sum(1)
        return self.free_energy(v) - entropy

    def recreate(self, x: Tensor, mask: Tensor | None = None, sweeps: int = 1) -> tuple[Tensor, Tensor]:
        """x recreated by sweeps of mean-field Gibbs updates, v <- P(v | P(h | v)), and the energy before and after each.

        x [batch, visible], 0..1; mask [batch, visible], bool: the units that are known, which keep their values, while
        the others start from P(v | h = 0), whatever x has there. -> probabilities [batch, visible], mean-field energies
        [batch, sweeps + 1], which no sweep raises. Raises ValueError where a known unit is not within 0..1.
        """
        return _recreate(self, self, x, mask, sweeps)

    def _swept(self, v: Tensor) -> Tensor:
        return self.down(self.up(v))


class DBN(Cell):
    """A deep belief network: RBMs, each on the features of the one below, and a net for classes that starts as they are.

    `rbms` recreate, and stay as pretraining left them; `layers` and `head` are the feed-forward net that fine-tuning turns
    into a classifier. sizes: visible units, then the hidden ones of each RBM. Without state, as the RBM.
    output "classify": y = softmax over the classes, [classes]; "recreate": up through all RBMs and down again, [visible].
    """

    kind = "dbn"

    def __init__(self, sizes: Sequence[int], classes: int, output: str = "classify") -> None:
        super().__init__()
        if len(sizes) < 2 or min(*sizes, classes) < 1:
            raise ValueError("sizes must be two or more numbers, the visible units first; they and classes at least 1")
        outputs = {"classify": classes, "recreate": sizes[0]}
        if output not in outputs:
            raise ValueError(f"output {output!r} is not one of {', '.join(outputs)}")
        self.recreates = output == "recreate"
        self.rbms = nn.ModuleList(RBM(*pair) for pair in pairwise(sizes))
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], classes)
        self.declare(
            TensorSpec("input", "float32", (sizes[0],)),
            TensorSpec("output", "float32", (outputs[output],)),
            (),
            {"sizes": list(sizes), "classes": classes, "output": output},
        )

    @property
    def stack(self) -> list[RBM]:
        """The RBMs, lowest first."""
        return cast(list[RBM], list(self.rbms))

    @property
    def net(self) -> list[nn.Linear]:
        """The classifier's layers below its head, lowest first."""
        return cast(list[nn.Linear], list(self.layers))

    @classmethod
    def from_rbms(cls, rbms: Sequence[RBM], classes: int, output: str = "classify") -> DBN:
        """A network of copies of trained RBMs, lowest first, whose classifier starts from their weights.

        Raises ValueError where one has not as many visible units as the one below has hidden.
        """
        if not rbms:
            raise ValueError("a belief network needs at least one RBM")
        sizes = [rbms[0].weight.shape[1], *(rbm.weight.shape[0] for rbm in rbms)]
        for number, (rbm, size) in enumerate(zip(rbms, sizes, strict=False)):
            if rbm.weight.shape[1] != size:
                raise ValueError(
                    f"RBM {number} has {rbm.weight.shape[1]} visible units, {size} features come from below"
                )
        dbn = cls(sizes, classes, output)
        for own, rbm in zip(dbn.stack, rbms, strict=True):
            own.load_state_dict(rbm.state_dict())
        dbn.start_from_rbms()
        return dbn

    def start_from_rbms(self) -> None:
        """Sets the classifier's layers to the RBMs' weights and hidden biases; the head stays."""
        with torch.no_grad():
            for layer, rbm in zip(self.net, self.stack, strict=True):
                layer.weight.copy_(rbm.weight)
                layer.bias.copy_(rbm.bias)

    def logits(self, x: Tensor) -> Tensor:
        """What the softmax is taken of. [batch, visible] -> [batch, classes]"""
        for layer in self.net:
            x = sigma_(affine(x, layer.weight, layer.bias))
        return affine(x, self.head.weight, self.head.bias)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._swept(x) if self.recreates else torch.softmax(self.logits(x), 1), state

    def recreate(self, x: Tensor, mask: Tensor | None = None, sweeps: int = 1) -> tuple[Tensor, Tensor]:
        """As RBM.recreate, a sweep going up through all RBMs and down; the energies are the lowest RBM's, and may rise."""
        return _recreate(self, self.stack[0], x, mask, sweeps)

    def _swept(self, v: Tensor) -> Tensor:
        for rbm in self.stack:
            v = rbm.up(v)
        for rbm in reversed(self.stack):
            v = rbm.down(v)
        return v


def _recreate(cell: RBM | DBN, lowest: RBM, x: Tensor, mask: Tensor | None, sweeps: int) -> tuple[Tensor, Tensor]:
    if sweeps < 1:
        raise ValueError(f"sweeps {sweeps} must be at least 1")
    if x.dim() != 2 or x.shape[1] != cell.input.shape[0]:
        raise ValueError(f"inputs are {list(x.shape)}, expected [batch, {cell.input.shape[0]}]")
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"the mask is {list(mask.shape)}, the inputs are {list(x.shape)}; they must be alike")
    known = torch.zeros_like(x, dtype=torch.bool) if mask is None else mask.bool()
    if mask is not None:
        x = torch.where(known, x, sigma_(lowest.visible_bias.clone()))
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("a known unit is not within 0..1; a unit's value is the probability that it is 1")
    v, energies = x, [lowest.mean_field_energy(x)]
    for _ in range(sweeps):
        v = torch.where(known, x, cell._swept(v))
        energies.append(lowest.mean_field_energy(v))
    return v, torch.stack(energies, 1)


_CANDIDATE = {"rnn": 0, "gru": 2, "gru-reset-after": 2, "lstm": 2, "lstm-peephole": 2}  # place among a layer's gates


def initialise(cell: RecurrentCell, trained: RBM | DBN) -> None:
    """The deck's weight initialisation: U and b of a recurrent cell's layers become the W and b of trained RBMs.

    An RBM goes into the first layer, a DBN's RBMs into as many, lowest first. In a cell with gates it is the candidate
    (n of a GRU, g of an LSTM) that sees the input through them; the gates and all recurrent weights stay as they are. Raises
    ValueError, with nothing changed, where sizes do not agree.
    """
    rbms = [trained] if isinstance(trained, RBM) else trained.stack
    layers = cast(list[Layer], list(cell.layers))
    if len(rbms) > len(layers):
        raise ValueError(f"{len(rbms)} RBMs do not fit a cell of {len(layers)} layers")
    for number, (layer, rbm) in enumerate(zip(layers, rbms, strict=False)):
        if tuple(rbm.weight.shape) != (layer.hidden_size, layer.input_size):
            raise ValueError(
                f"layer {number} has {layer.input_size} inputs and hidden size {layer.hidden_size}, "
                f"its RBM {rbm.weight.shape[1]} visible and {rbm.weight.shape[0]} hidden units; they must be the same"
            )
    with torch.no_grad():
        for layer, rbm in zip(layers, rbms, strict=False):
            start = _CANDIDATE[cell.kind] * layer.hidden_size
            layer.weight[start : start + layer.hidden_size, : layer.input_size] = rbm.weight
            layer.bias[start : start + layer.hidden_size] = rbm.bias


def feed_forward(dbn: DBN) -> nn.Sequential:
    """A plain feed-forward net with a copy of the classifier's weights: x [batch, visible] -> logits [batch, classes]."""
    modules: list[nn.Module] = []
    for layer in dbn.net:
        modules += [_copy(layer), nn.Sigmoid()]
    return nn.Sequential(*modules, _copy(dbn.head))


def _copy(layer: nn.Linear) -> nn.Linear:
    copy = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    copy.load_state_dict(layer.state_dict())
    return copy


KINDS: tuple[type[Cell], ...] = (RBM, DBN)
