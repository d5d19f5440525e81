"""The cell contract: what every model is, whatever its kind. The service knows models through this alone."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from engram_models.spec import Schema, TensorSpec

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
State = tuple[Tensor, ...]
"""A named tuple of batch-first tensors, in the order of the schema; `Cell.state_type` makes one."""


class Cell(nn.Module):
    """A function (input row, state) -> (output row, state), batch first. The base class of every kind of model, also of yours.

    A subclass has

    - `kind`: a name of its own, lower case with hyphens; bundles carry it, and never change it.
    - a constructor of plain values (numbers, strings, lists), which makes its submodules and calls `declare` once. The last
      argument is those values again: `from_config(config)` makes the cell anew, with weights that are then replaced.
    - `forward(x, state)`: x [batch, *input.shape], state a named tuple of tensors [batch, *shape] in the order of the schema;
      gives y [batch, *output.shape] and `self.state_type(...)` of new states.

    `forward` is pure: it changes neither its arguments nor the module, draws no random numbers, and computes each row from that
    row alone. It follows the dtype of what it is given: gradient checks run in float64. `initial_state` makes the schema's
    initial values; override nothing else but, for inputs of special ranges, `inputs_like`.

    `engram models check --cell package.module:Class --config '{...}'` tells whether a cell keeps to this. To serve it, write a
    bundle (`write_bundle`), install its package where the server is, and name it there: `cells = ["package.module:Class"]`.
    docs/examples/my-cell is one, whole.
    """

    kind: ClassVar[str]
    input: TensorSpec
    output: TensorSpec
    state_schema: tuple[TensorSpec, ...]
    config: Mapping[str, Any]
    state_type: Any

    def declare(
        self, input: TensorSpec, output: TensorSpec, state: tuple[TensorSpec, ...], config: Mapping[str, Any]
    ) -> None:
        """Called once by a subclass's constructor, with all that the contract asks for.

        Shapes in the TensorSpecs have no batch dimension. `config` is what the constructor was called with, by name.
        """
        self.input, self.output, self.state_schema, self.config = input, output, state, dict(config)
        self.state_type = _state_type([spec.name for spec in state])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Cell:
        """The cell with untrained weights. Raises TypeError or ValueError where the config does not fit."""
        return cls(**config)

    @property
    def schema(self) -> Schema:
        return Schema((self.input,), (self.output,), self.state_schema)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The schema's initial values, [batch, *shape] each; `dtype` replaces float32 (gradient checks use float64)."""
        tensors = (
            torch.full(
                (batch, *spec.shape), spec.initial, device=device,
                dtype=dtype if dtype is not None and spec.dtype == "float32" else torch_dtype(spec),
            )
            for spec in self.state_schema
        )  # fmt: skip
        return cast(State, self.state_type(*tensors))

    def inputs_like(self, noise: Tensor) -> Tensor:
        """Inputs of the size that the cell is made for, from random numbers [batch, *input.shape]: what a check runs on.

        Floats are of N(0, 1); a cell whose inputs are no floats has them as they are.
        """
        return noise

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step. x [batch, *input.shape] -> y [batch, *output.shape], new state."""
        raise NotImplementedError

    def sequence(self, xs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Steps through a whole sequence. xs [batch, time, *input.shape] -> ys [batch, time, *output.shape], last state."""
        if state is None:
            state = self.initial_state(len(xs), xs.device, xs.dtype if xs.is_floating_point() else None)
        outputs = []
        for x in xs.unbind(1):
            y, state = self(x, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    return TORCH_DTYPES[spec.dtype]


def _state_type(names: Sequence[str]) -> Any:
    return namedtuple("State", names)
