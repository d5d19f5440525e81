"""A cell behind the scales of its data: takes raw values, answers raw values. Training on tables writes its bundles with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engram_models.cell import Cell, State, torch_dtype
from engram_models.plain_kinds import PLAIN_KINDS


def _root(x: Tensor) -> Tensor:
    return x.abs().sqrt() * x.sign()


def _square(x: Tensor) -> Tensor:
    return x.abs() * x


TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, lambda x: x),
    "root": (_root, _square),
}
"""Functions of single numbers and their inverses, for any sign. The root evens out counts, whose spread grows with their size."""


class Normalised(Cell):
    """y = f^-1(inner((f(x) - input_mean) / input_scale) * output_scale + output_mean), f a transform; the inner cell's states.

    input_mean and input_scale float32 [*input], output_mean and output_scale float32 [*output], are buffers: they are served,
    not trained. `outputs_too` false: the inner cell's outputs (probabilities, say) are given as they are.
    `inputs` and `outputs` name the values, where they have names: columns of a table, classes.
    """

    kind = "normalised"
    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor
    output_scale: Tensor

    def __init__(
        self,
        inner: Cell,
        transform: str = "none",
        outputs_too: bool = True,
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
    ) -> None:
        """Raises ValueError where the transform is unknown or the inner cell does not fit."""
        super().__init__()
        if transform not in TRANSFORMS:
            raise ValueError(f"transform {transform!r} is not one of {', '.join(TRANSFORMS)}")
        if inner.kind == self.kind or not inner.input.is_float:
            raise ValueError(f"a cell of kind {inner.kind} with inputs {inner.input.dtype} cannot be normalised")
        self.inner, self.outputs_too = inner, outputs_too
        self._forth, self._back = TRANSFORMS[transform]
        for name, spec in (("input", inner.input), ("output", inner.output)):
            if name == "input" or outputs_too:
                self.register_buffer(f"{name}_mean", torch.zeros(spec.shape, dtype=torch_dtype(spec)))
                self.register_buffer(f"{name}_scale", torch.ones(spec.shape, dtype=torch_dtype(spec)))
        config = {
            "kind": inner.kind, "config": dict(inner.config), "transform": transform, "outputs_too": outputs_too,
            "inputs": list(inputs), "outputs": list(outputs),
        }  # fmt: skip
        self.declare(inner.input, inner.output, inner.state_schema, config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Cell:
        """`kind` and `config` are the inner cell's; the other keys are the constructor's."""
        rest = dict(config)
        kind, inner = PLAIN_KINDS.get(str(rest.pop("kind", None))), rest.pop("config", {})
        if kind is None:
            raise ValueError(f"kind {config.get('kind')!r} is not one that can be normalised")
        if not isinstance(inner, dict):
            raise TypeError("config must be a table")
        return cls(kind.from_config(inner), **rest)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, after = self.inner(self.normalise(x), state)
        return (self.raw(y) if self.outputs_too else y), after

    def normalise(self, x: Tensor) -> Tensor:
        """Raw inputs [..., *input] as the inner cell takes them."""
        return (self._forth(x) - self.input_mean) / self.input_scale

    def raw(self, y: Tensor) -> Tensor:
        """The inner cell's outputs [..., *output] in the data's own units."""
        return self._back(y * self.output_scale + self.output_mean)

    def inputs_like(self, noise: Tensor) -> Tensor:
        return self._back(noise * self.input_scale + self.input_mean)


KINDS: tuple[type[Cell], ...] = (Normalised,)
