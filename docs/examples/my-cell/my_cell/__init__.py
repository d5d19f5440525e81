"""A minimal gated unit (Feng et al. 2024, "Were RNNs all we needed?"): z = sigma(W x), h' = (1 - z) h + z (U x), y = V h'."""

import torch
from torch import Tensor, nn

from engram_models import Cell, State, TensorSpec


class MinGRU(Cell):
    kind = "my-min-gru"

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        if min(input_size, hidden_size, output_size) < 1:
            raise ValueError("sizes are at least 1")
        self.gate = nn.Linear(input_size, hidden_size)
        self.candidate = nn.Linear(input_size, hidden_size)
        self.head = nn.Linear(hidden_size, output_size)
        self.declare(
            input=TensorSpec("x", "float32", (input_size,)),
            output=TensorSpec("y", "float32", (output_size,)),
            state=(TensorSpec("h", "float32", (hidden_size,), role="recurrent"),),
            config={"input_size": input_size, "hidden_size": hidden_size, "output_size": output_size},
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        z = torch.sigmoid(self.gate(x))
        h = (1 - z) * state[0] + z * self.candidate(x)
        return self.head(h), self.state_type(h)
