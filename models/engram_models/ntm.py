"""The Neural Turing Machine: a controller beside a memory that it reads and writes through heads.

Source: Graves, Wayne and Danihelka 2014, "Neural Turing Machines"; section numbers below are the paper's. The memory's
constant start, the clipped head parameters and the bounded keys and adds follow Collier and Beel 2018. N is the number of
memory locations (`slots`), M the width of one. Heads are in the order read 0, read 1, ..., write 0, write 1, ... throughout.

One step: the controller sees the input and what was read in the step before; every head addresses the memory as the step
found it; the read heads read that memory; then all write heads erase, then all add; the output sees controller and reads.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_models.cell import Cell, State
from engram_models.recurrent import HEADS, LSTMLayer, affine, sigma_
from engram_models.spec import TensorSpec

MEMORY_START = 1e-6
PLACES_MAX = 1 << 20  # slots of a memory, heads
PARAMETER_MAX = 20.0  # head parameters are clipped to this, so that no strength or sharpness runs away
TINY = 1e-8
_ALIGNED = 4  # float32 in the 16 bytes at which matrix libraries like rows to start


def content_addressing(memory: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    """Weightings by likeness: softmax over the N locations of beta * cosine(key, location). Section 3.3.1, (5) and (6).

    memory [batch, N, M], key [batch, heads, M], beta [batch, heads] -> [batch, heads, N], each row a distribution.
    Norms are at least 1e-4, so that an empty location or key is unlike everything rather than undefined.
    """
    dots = product(key, memory.transpose(1, 2))
    norms = _norm(key).unsqueeze(2) * _norm(memory).unsqueeze(1)
    return torch.softmax(beta.unsqueeze(2) * (dots / norms), 2)


def shift(weighting: Tensor, shifts: Tensor) -> Tensor:
    """Circular convolution: w~(i) = sum_j w(i - j) s(j). Section 3.3.2, (8).

    weighting [batch, heads, N], shifts [batch, heads, 2 reach + 1] for j = -reach .. reach -> [batch, heads, N].
    """
    reach = shifts.shape[2] // 2
    moved = torch.roll(weighting, -reach, 2) * shifts[:, :, :1]
    for place in range(1, 2 * reach + 1):
        moved = moved + torch.roll(weighting, place - reach, 2) * shifts[:, :, place : place + 1]
    return moved


def sharpen(weighting: Tensor, gamma: Tensor) -> Tensor:
    """w(i)^gamma / sum_j w(j)^gamma, by logarithms, so that it neither under- nor overflows. Section 3.3.2, (9).

    weighting [batch, heads, N], gamma [batch, heads] -> [batch, heads, N]. What is below 0, which only a state from
    elsewhere can be, counts as 0.
    """
    return torch.softmax(gamma.unsqueeze(2) * torch.log(weighting.clamp(min=0) + TINY), 2)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); on the CPU the same bits for a number wherever in a tensor it stands. See recurrent.sigma_."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return functional.softplus(x)
    return torch.relu(x) + torch.log1p(torch.exp(-x.abs()))


def product(rows: Tensor, matrices: Tensor) -> Tensor:
    """Each batch row's own product: rows [batch, heads, in], matrices [batch, in, out] -> [batch, heads, out].

    Matrix libraries round by where in memory a matrix starts, so that a row's bits would depend on its place in the batch;
    with zeros up to whole multiples of 16 bytes all places are alike.
    """
    inner, outer = -matrices.shape[1] % _ALIGNED, -matrices.shape[2] % _ALIGNED
    if torch.is_grad_enabled() or not (inner or outer):
        return torch.bmm(rows, matrices)
    wide = torch.bmm(functional.pad(rows, (0, inner)), functional.pad(matrices, (0, outer, 0, inner)))
    return wide[:, :, : matrices.shape[2]]


def _norm(rows: Tensor) -> Tensor:
    """Euclidean, over the last dimension, with a gradient at 0."""
    return torch.sqrt((rows * rows).sum(-1) + TINY)


class FeedForward(nn.Module):
    """h = tanh(U x + b): a controller without a state of its own."""

    states = ()

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        bound = 1 / sqrt(input_size)
        self.weight = nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: State) -> State:
        return (torch.tanh(affine(x, self.weight, self.bias)),)


_CONTROLLERS: dict[str, type[LSTMLayer] | type[FeedForward]] = {"lstm": LSTMLayer, "feedforward": FeedForward}


class NTM(Cell):
    """A Neural Turing Machine.

    State tensors, float32: h, c [hidden] of an LSTM controller; memory [N, M], initially 1e-6 everywhere; each head's last
    weighting, read_weighting0, ..., write_weighting0, ... [N]; what each read head read, read0, ... [M]. A weighting that is
    0 everywhere, as before the first step, stands for a head at location 0: were all heads spread evenly over an even
    memory, no location could ever come to differ from another.

    The weights do not depend on N. `shifts` is how far a head may move in one step, to either side.
    """

    kind = "ntm"
    start: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        hidden_size: int = 100,
        controller: str = "lstm",
        slots: int = 128,
        width: int = 20,
        read_heads: int = 1,
        write_heads: int = 1,
        shifts: int = 1,
        activation: str = "none",
    ) -> None:
        super().__init__()
        if min(input_size, output_size, hidden_size, slots, width, read_heads, write_heads) < 1:
            raise ValueError("input_size, output_size, hidden_size, slots, width and heads must be at least 1")
        if max(slots, read_heads, write_heads) > PLACES_MAX:
            raise ValueError(f"slots and heads must be at most {PLACES_MAX}")
        if shifts < 0 or 2 * shifts + 1 > slots:
            raise ValueError(f"shifts {shifts} must be at least 0 and 2 * shifts + 1 at most slots, which is {slots}")
        if controller not in _CONTROLLERS:
            raise ValueError(f"controller {controller!r} is not one of {', '.join(_CONTROLLERS)}")
        if activation not in HEADS:
            raise ValueError(f"activation {activation!r} is not one of {', '.join(HEADS)}")
        self.read_heads, self.heads, self.width, self.reach = read_heads, read_heads + write_heads, width, shifts
        self.controller = _CONTROLLERS[controller](input_size + read_heads * width, hidden_size)
        self.sizes = self._parameter_sizes()
        self.emit = nn.Linear(hidden_size, sum(self.sizes))
        self.head = nn.Linear(hidden_size + read_heads * width, output_size)
        self.activate = HEADS[activation]
        self.register_buffer("start", torch.eye(1, slots).view(1, 1, slots), persistent=False)
        config = {
            "input_size": input_size, "output_size": output_size, "hidden_size": hidden_size, "controller": controller,
            "slots": slots, "width": width, "read_heads": read_heads, "write_heads": write_heads, "shifts": shifts,
            "activation": activation,
        }  # fmt: skip
        self.declare(
            TensorSpec("input", "float32", (input_size,)),
            TensorSpec("output", "float32", (output_size,)),
            self._schema(hidden_size, slots),
            config,
        )

    def _parameter_sizes(self) -> list[int]:
        """Numbers that the controller emits: keys, strengths, gates, shifts, sharpness of all heads; erases and adds."""
        heads, writes = self.heads, self.heads - self.read_heads
        return [
            heads * self.width, heads, heads, heads * (2 * self.reach + 1), heads, writes * self.width, writes * self.width,
        ]  # fmt: skip

    def _schema(self, hidden_size: int, slots: int) -> tuple[TensorSpec, ...]:
        weightings = [f"read_weighting{number}" for number in range(self.read_heads)]
        weightings += [f"write_weighting{number}" for number in range(self.heads - self.read_heads)]
        return (
            *(TensorSpec(name, "float32", (hidden_size,), "recurrent") for name in self.controller.states),
            TensorSpec("memory", "float32", (slots, self.width), "memory", MEMORY_START),
            *(TensorSpec(name, "float32", (slots,), "addressing") for name in weightings),
            *(TensorSpec(f"read{number}", "float32", (self.width,), "recurrent") for number in range(self.read_heads)),
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        owned = len(self.controller.states)
        memory, weightings, reads = state[owned], state[owned + 1 : -self.read_heads], state[-self.read_heads :]
        after = self.controller(torch.cat((x, *reads), 1), state[:owned])
        emitted = affine(after[0], self.emit.weight, self.emit.bias).clamp(-PARAMETER_MAX, PARAMETER_MAX)
        *addressing, erase, add = torch.split(emitted, self.sizes, 1)
        weighting = self._address(memory, torch.stack(weightings, 1), *addressing)
        read = product(weighting[:, : self.read_heads], memory)
        memory = self._write(memory, weighting[:, self.read_heads :], self._rows(erase), self._rows(add))
        y = self.activate(affine(torch.cat((after[0], read.flatten(1)), 1), self.head.weight, self.head.bias))
        return y, self.state_type(*after[:owned], memory, *weighting.unbind(1), *read.unbind(1))

    def _address(self, memory: Tensor, before: Tensor, *emitted: Tensor) -> Tensor:
        """The heads' weightings, [batch, heads, N], from those of the step before. Figure 2."""
        key, beta, gate, shifts, gamma = emitted
        content = content_addressing(memory, torch.tanh(self._rows(key)), softplus(beta))
        before = torch.where(before.amax(2, keepdim=True) > 0, before, self.start)
        g = sigma_(gate.clone()).unsqueeze(2)
        interpolated = g * content + (1 - g) * before  # (7)
        moved = shift(interpolated, torch.softmax(shifts.reshape(-1, self.heads, 2 * self.reach + 1), 2))
        return sharpen(moved, 1 + softplus(gamma))

    def _rows(self, emitted: Tensor) -> Tensor:
        """[batch, heads * M] -> [batch, heads, M]."""
        return emitted.reshape(-1, emitted.shape[1] // self.width, self.width)

    def _write(self, memory: Tensor, weighting: Tensor, erase: Tensor, add: Tensor) -> Tensor:
        """M(i) prod_h (1 - w_h(i) e_h) + sum_h w_h(i) a_h, e in (0, 1), a in (-1, 1). Section 3.2, (3) and (4)."""
        erase, add = sigma_(erase.clone()), torch.tanh(add)
        places = weighting.unsqueeze(3)
        for number in range(self.heads - self.read_heads):
            memory = memory * (1 - places[:, number] * erase[:, number : number + 1])
        for number in range(self.heads - self.read_heads):
            memory = memory + places[:, number] * add[:, number : number + 1]
        return memory


KINDS: tuple[type[Cell], ...] = (NTM,)
