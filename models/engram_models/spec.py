"""Shapes and types of a model's tensors. The schema of a cell is a tuple of these."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}
ROLES = ("", "recurrent", "window", "memory", "addressing", "tokens", "counter")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor without its batch dimension. `role` and `initial` matter for state tensors alone."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str = ""
    initial: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in TORCH_DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role {self.role!r} is not one of {', '.join(filter(None, ROLES))}")

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]
