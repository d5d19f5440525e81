"""What a model takes, gives and keeps: names, types and shapes of its tensors. Without torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

assert sys.byteorder == "little", "rows and states are little-endian, and are used as they are"

NP_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(np.uint16),  # NumPy has none: its bits
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
FLOATS = ("float16", "float32", "float64", "bfloat16")
ROLES = ("", "recurrent", "window", "memory", "addressing", "tokens", "counter", "constant")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor without its batch dimension. `role`, `initial` and `shared` matter for state tensors alone.

    A tensor of role constant is set when a session is made, and no step changes it. A `shared` one is given to the model
    without a batch dimension (a sample rate, a scalar counter): only sessions that have equal values may be in one call.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str = ""
    initial: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in NP_DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(NP_DTYPES)}")
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role {self.role!r} is not one of {', '.join(filter(None, ROLES))}")

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def np_dtype(self) -> np.dtype[Any]:
        return NP_DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.size * self.np_dtype.itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Schema:
    """A row of inputs, of outputs, or of state is its tensors' bytes, one after the other in this order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]

    @cached_property
    def input_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.inputs)

    @cached_property
    def output_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)

    @cached_property
    def state_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.state)

    @cached_property
    def generates(self) -> bool:
        """Whether outputs can be fed back as inputs."""
        return [(spec.dtype, spec.shape) for spec in self.inputs] == [(s.dtype, s.shape) for s in self.outputs]

    @cached_property
    def changing(self) -> tuple[TensorSpec, ...]:
        """The state tensors that a step gives anew: all but constants."""
        return tuple(spec for spec in self.state if spec.role != "constant")

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """Places in `state` of what rows of one call must have in common."""
        return tuple(place for place, spec in enumerate(self.state) if spec.shared)
