"""Bidirectional cells: one net reads the inputs as they come, another backwards from a little ahead; outputs are joined.

Source: the deck's bidirectional RNN (Schuster and Paliwal 1997), in the latency-controlled form (Zhang et al. 2016) that can
be stepped: s_t = f(s_{t-1}, x_t) as ever, and for the output of step t the backward net starts from 0 at x_{t+R} and runs
down to x_t. R, the look-ahead, is part of the config.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engram_models.cell import Cell, State
from engram_models.recurrent import HEADS, Layer, RecurrentCell, affine
from engram_models.recurrent import KINDS as RECURRENT
from engram_models.spec import TensorSpec

_LAYERS: dict[str, type[Layer]] = {kind.kind: kind.layer_type for kind in RECURRENT if issubclass(kind, RecurrentCell)}


class Bidirectional(Cell):
    """Two layers of one kind, `net` ("rnn", "gru", "gru-reset-after", "lstm", "lstm-peephole"), and a linear head if wanted.

    The step that takes input t gives the output for input t - R. The first R steps have nothing to answer for yet: their
    outputs are 0, whatever the activation. So the outputs for the last R inputs of a sequence come only with R more inputs;
    `whole` gives them all at once, where the sequence has an end.

    State: the forward net's tensors (h, and c of an LSTM) float32 [hidden]; inputs [R+1, input] and outputs [R+1, hidden],
    the last R+1 inputs and forward outputs, oldest first; waiting, int64 [1], how many steps are still without an answer.
    Without a head the output is the forward and the backward output, [2 hidden].
    """

    kind = "bidirectional"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        look_ahead: int,
        net: str = "lstm",
        output_size: int | None = None,
        activation: str = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, output_size or 1) < 1:
            raise ValueError("input_size, hidden_size and output_size must be at least 1")
        if look_ahead < 0:
            raise ValueError(f"look_ahead {look_ahead} must be at least 0")
        if net not in _LAYERS:
            raise ValueError(f"net {net!r} is not one of {', '.join(_LAYERS)}")
        if activation not in HEADS:
            raise ValueError(f"activation {activation!r} is not one of {', '.join(HEADS)}")
        self.ahead, self.back = (_LAYERS[net](input_size, hidden_size, **options) for _ in range(2))
        self.head = None if output_size is None else nn.Linear(2 * hidden_size, output_size)
        self.activate = HEADS[activation]
        config = {
            "input_size": input_size, "hidden_size": hidden_size, "look_ahead": look_ahead, "net": net,
            "activation": activation, **options,
        }  # fmt: skip
        self.declare(
            TensorSpec("input", "float32", (input_size,)),
            TensorSpec("output", "float32", (output_size or 2 * hidden_size,)),
            (
                *(TensorSpec(name, "float32", (hidden_size,), "recurrent") for name in self.ahead.states),
                TensorSpec("inputs", "float32", (look_ahead + 1, input_size), "window"),
                TensorSpec("outputs", "float32", (look_ahead + 1, hidden_size), "window"),
                TensorSpec("waiting", "int64", (1,), "counter", look_ahead),
            ),
            config if output_size is None else {**config, "output_size": output_size},
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        *before, inputs, outputs, waiting = state
        after = self.ahead(x, tuple(before))
        inputs = torch.cat((inputs[:, 1:], x.unsqueeze(1)), 1)
        outputs = torch.cat((outputs[:, 1:], after[0].unsqueeze(1)), 1)
        y = self._joined(outputs[:, 0], self._backwards(inputs)[-1]).masked_fill(waiting > 0, 0)
        return y, self.state_type(*after, inputs, outputs, (waiting - 1).clamp(min=0))

    def whole(self, xs: Tensor) -> Tensor:
        """The deck's many-to-many after waiting: both nets run over all of it. xs [batch, time, input] -> ys alike.

        What torch.nn's modules give with bidirectional=True. Output t here belongs to input t.
        """
        state = self._rest(self.ahead, xs[:, 0])
        forward = []
        for x in xs.unbind(1):
            state = self.ahead(x, state)
            forward.append(state[0])
        backward = reversed(self._backwards(xs))
        return torch.stack([self._joined(*pair) for pair in zip(forward, backward, strict=True)], 1)

    def _backwards(self, xs: Tensor) -> list[Tensor]:
        """The backward net's outputs from the last input [batch, time, input] to the first, in that order."""
        state = self._rest(self.back, xs[:, 0])
        outputs = []
        for x in reversed(xs.unbind(1)):
            state = self.back(x, state)
            outputs.append(state[0])
        return outputs

    def _rest(self, layer: Layer, like: Tensor) -> State:
        """A layer's state before its first input, for as many rows as `like` has."""
        zeros = torch.zeros_like(like[:, :1]).expand(-1, layer.hidden_size)
        return tuple(zeros for _ in layer.states)

    def _joined(self, forward: Tensor, backward: Tensor) -> Tensor:
        joined = torch.cat((forward, backward), 1)
        return self.activate(joined if self.head is None else affine(joined, self.head.weight, self.head.bias))


KINDS: tuple[type[Cell], ...] = (Bidirectional,)
