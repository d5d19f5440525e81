"""The deck's recurrent cells: vanilla RNN, both GRUs, LSTM and peephole LSTM, in layers, with an optional linear head.

Source: the deck "Theories behind recurrent neural networks"; the symbols are its own. W are recurrent weights, U input
weights, b biases, sigma the logistic function, o the elementwise product. Both weight matrices of a layer are kept as one,
[U | W], of shape (gates * hidden, input + hidden): one product a layer and step. The order of the gates is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_models.cell import Cell, State
from engram_models.spec import TensorSpec

LAYERS_MAX = 256
_VECTOR = 16  # float32 in the widest vector register


def sigma_(x: Tensor) -> Tensor:
    """The logistic function; the same bits for a number wherever in a tensor it stands. In serving it overwrites x.

    torch.sigmoid on the CPU rounds the last few numbers of each thread's share in another way than the rest, so that a row's
    bits would depend on its place. The parts used here instead do not. Training keeps torch.sigmoid: its gradient does
    not overflow.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return torch.sigmoid(x)
    return x.neg_().exp_().add_(1).reciprocal_()


def tanh_(x: Tensor) -> Tensor:
    """tanh. In serving it overwrites x: fresh memory costs a tenth of a large batch's time."""
    return torch.tanh(x) if torch.is_grad_enabled() else x.tanh_()


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b. x [batch, in], weight [out, in], bias [out] -> [batch, out]."""
    y = functional.linear(x, *_widened(weight, bias))
    return y if y.shape[1] == len(bias) else y[:, : len(bias)]


def _widened(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Adds rows of zeros to weight [..., out, in] and bias [..., out] up to a whole number of vectors.

    Matrix libraries treat the columns that do not fill a vector apart, some by the row's place in the batch.
    """
    missing = -weight.shape[-2] % _VECTOR
    if missing:
        return functional.pad(weight, (0, 0, 0, missing)), functional.pad(bias, (0, missing))
    return weight, bias


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "softmax": lambda y: torch.softmax(y, -1),
    "sigmoid": lambda y: sigma_(y.clone()),  # without a head y is a state too
}
_NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": sigma_}


class Layer(nn.Module):
    """One layer: weight (gates*hidden, input+hidden), bias (gates*hidden), and what a subclass adds."""

    gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]]  # names of its state tensors, each [hidden]; the first is its output

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        bound = 1 / sqrt(hidden_size)
        self.weight = nn.Parameter(
            torch.empty(self.gates * hidden_size, input_size + hidden_size).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(self.gates * hidden_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: State) -> State:
        raise NotImplementedError

    def sums(self, x: Tensor, h: Tensor, gates: int) -> Tensor:
        """U x + W h + b for the first gates, [gates, batch, hidden].

        A batched product, one matrix a gate: on a CPU its blocks go to the threads whole, which is 10-30 % faster than one
        wide product split by the library, and leaves each gate contiguous for what follows.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if gates < self.gates:
            weight, bias = weight[: gates * self.hidden_size], bias[: gates * self.hidden_size]
        weight = weight.view(gates, self.hidden_size, -1)
        bias = bias.view(gates, 1, self.hidden_size)
        weight, bias = _widened(weight, bias)
        sums = torch.baddbmm(bias, torch.cat((x, h), 1).expand(gates, -1, -1), weight.transpose(1, 2))
        return sums if sums.shape[2] == self.hidden_size else sums[..., : self.hidden_size]


class RNNLayer(Layer):
    """s_t = phi(W s_{t-1} + U x_t + b), phi tanh, ReLU or the logistic function."""

    gates = 1
    states = ("h",)

    def __init__(self, input_size: int, hidden_size: int, nonlinearity: str = "tanh") -> None:
        super().__init__(input_size, hidden_size)
        if nonlinearity not in _NONLINEARITIES:
            raise ValueError(f"nonlinearity {nonlinearity!r} is not one of {', '.join(_NONLINEARITIES)}")
        self.phi = _NONLINEARITIES[nonlinearity]

    def forward(self, x: Tensor, state: State) -> State:
        return (self.phi(affine(torch.cat((x, state[0]), 1), self.weight, self.bias)),)


class GRULayer(Layer):
    """The deck's GRU ("reset before"); gates r, z, n.

    r = sigma(W_r s + U_r x + b_r), z = sigma(W_z s + U_z x + b_z), n = tanh(W (r o s) + U x + b), s' = z o s + (1-z) o n
    """

    gates = 3
    states = ("h",)

    def forward(self, x: Tensor, state: State) -> State:
        (s,) = state
        split = 2 * self.hidden_size
        r, z = sigma_(self.sums(x, s, 2))
        n = torch.tanh(affine(torch.cat((x, r * s), 1), self.weight[split:], self.bias[split:]))
        return (n + z * (s - n),)


class GRUResetAfterLayer(Layer):
    """PyTorch's and cuDNN's GRU ("reset after"); gates r, z, n, and a recurrent bias b_hn of n that r scales too.

    n = tanh(W_in x + b_in + r o (W_hn s + b_hn)), s' = (1-z) o n + z o s
    """

    gates = 3
    states = ("h",)

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        bound = 1 / sqrt(hidden_size)
        self.bias_n = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: State) -> State:
        (s,) = state
        split, inputs = 2 * self.hidden_size, self.input_size
        r, z = sigma_(self.sums(x, s, 2))
        from_input = affine(x, self.weight[split:, :inputs], self.bias[split:])
        from_state = affine(s, self.weight[split:, inputs:], self.bias_n)
        n = torch.tanh(from_input + r * from_state)
        return (n + z * (s - n),)


class LSTMLayer(Layer):
    """i, f, o = sigma(W h + U x + b), g = tanh(W h + U x + b), c' = f o c + i o g, h' = o o tanh(c'); gates i, f, g, o."""

    gates = 4
    states = ("h", "c")

    def forward(self, x: Tensor, state: State) -> State:
        h, c = state
        sums = self.sums(x, h, 4)
        i, f = sigma_(sums[:2])
        c = torch.addcmul(f * c, i, tanh_(sums[2]))
        return sigma_(sums[3]) * torch.tanh(c), c


class PeepholeLSTMLayer(LSTMLayer):
    """LSTM whose gates see the memory cell: i, f also P_i o c, P_f o c; o sees P_o o c', the new one. P is diagonal.

    Gers and Schmidhuber 2000. `peephole` is (3, hidden): rows P_i, P_f, P_o.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        bound = 1 / sqrt(hidden_size)
        self.peephole = nn.Parameter(torch.empty(3, hidden_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = self.sums(x, h, 4)
        p_i, p_f, p_o = self.peephole
        i = sigma_(torch.addcmul(i, p_i, c))
        f = sigma_(torch.addcmul(f, p_f, c))
        c = torch.addcmul(f * c, i, tanh_(g))
        return sigma_(torch.addcmul(o, p_o, c)) * torch.tanh(c), c


class RecurrentCell(Cell):
    """Layers of one kind on top of each other, and a linear head if `output_size` is given.

    State tensors are named after their layer: h0, c0, h1, ...; float32 [hidden_size], initially 0. Without a head the
    output is the last layer's h.
    """

    layer_type: ClassVar[type[Layer]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layers: int = 1,
        output_size: int | None = None,
        activation: str = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, layers, output_size or 1) < 1:
            raise ValueError("input_size, hidden_size, layers and output_size must be at least 1")
        if layers > LAYERS_MAX:
            raise ValueError(f"layers {layers} must be at most {LAYERS_MAX}")
        if activation not in HEADS:
            raise ValueError(f"activation {activation!r} is not one of {', '.join(HEADS)}")
        sizes = [input_size, *[hidden_size] * (layers - 1)]
        self.layers = nn.ModuleList(self.layer_type(size, hidden_size, **options) for size in sizes)
        self.head = None if output_size is None else nn.Linear(hidden_size, output_size)
        self.activate = HEADS[activation]
        names = [f"{name}{number}" for number in range(layers) for name in self.layer_type.states]
        config = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "layers": layers,
            "activation": activation,
            **options,
        }
        self.declare(
            TensorSpec("input", "float32", (input_size,)),
            TensorSpec("output", "float32", (output_size or hidden_size,)),
            tuple(TensorSpec(name, "float32", (hidden_size,), "recurrent") for name in names),
            config if output_size is None else {**config, "output_size": output_size},
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        per_layer = len(self.layer_type.states)
        after: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            new = layer(x, state[number * per_layer : (number + 1) * per_layer])
            after.extend(new)
            x = new[0]
        y = self.activate(x if self.head is None else affine(x, self.head.weight, self.head.bias))
        return y, self.state_type(*after)


class VanillaRNN(RecurrentCell):
    kind = "rnn"
    layer_type = RNNLayer


class GRU(RecurrentCell):
    kind = "gru"
    layer_type = GRULayer


class GRUResetAfter(RecurrentCell):
    kind = "gru-reset-after"
    layer_type = GRUResetAfterLayer


class LSTM(RecurrentCell):
    kind = "lstm"
    layer_type = LSTMLayer


class PeepholeLSTM(RecurrentCell):
    kind = "lstm-peephole"
    layer_type = PeepholeLSTMLayer


KINDS: tuple[type[Cell], ...] = (VanillaRNN, GRU, GRUResetAfter, LSTM, PeepholeLSTM)
