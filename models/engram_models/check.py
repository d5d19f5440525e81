"""The recorded check of a bundle: a short run that is done again wherever the bundle is loaded, whatever computes it there.

A bundle that computes something else on this machine is refused. The run's numbers are also what the probe takes for typical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.spec import Schema, TensorSpec
from engram_models.tensor_file import StoredTensor, Tensors

CHECK_ROWS = 4
CHECK_STEPS = 3
CHECK_TOLERANCE = 1e-5

Arrays = Sequence[NDArray[Any]]
Step = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]
"""(inputs, states) -> (outputs, new states), [n, *shape] each, in schema order."""


class CheckError(Exception):
    """What is wrong with a check vector, or with what a step makes of it."""


@dataclass(frozen=True, slots=True)
class CheckVector:
    """Inputs and outputs [CHECK_STEPS, CHECK_ROWS, *shape], states before and after [CHECK_ROWS, *shape], in schema order."""

    inputs: list[NDArray[Any]]
    before: list[NDArray[Any]]
    outputs: list[NDArray[Any]]
    after: list[NDArray[Any]]

    @classmethod
    def record(cls, schema: Schema, step: Step, inputs: Arrays, before: Arrays) -> CheckVector:
        """What a step makes of these inputs and states."""
        outputs, after = _run(step, inputs, before)
        wholes = [
            np.stack(several).astype(s.np_dtype, copy=False) for several, s in zip(outputs, schema.outputs, strict=True)
        ]
        return cls(list(inputs), list(before), wholes, list(after))

    def tensors(self, schema: Schema) -> dict[str, StoredTensor]:
        named = [
            *zip(_names("input", schema.inputs), schema.inputs, self.inputs, strict=True),
            *zip(_names("output", schema.outputs), schema.outputs, self.outputs, strict=True),
            *zip(_names("before", schema.state), schema.state, self.before, strict=True),
            *zip(_names("after", schema.state), schema.state, self.after, strict=True),
        ]
        return {name: StoredTensor(spec.dtype, np.ascontiguousarray(values)) for name, spec, values in named}

    @classmethod
    def read(cls, schema: Schema, tensors: Tensors) -> CheckVector:
        """Raises CheckError where something is missing or does not fit: a tensor of no bytes may say that it has any shape."""
        steps, rows = (CHECK_STEPS, CHECK_ROWS), (CHECK_ROWS,)
        return cls(
            _read(tensors, _names("input", schema.inputs), schema.inputs, steps),
            _read(tensors, _names("before", schema.state), schema.state, rows),
            _read(tensors, _names("output", schema.outputs), schema.outputs, steps),
            _read(tensors, _names("after", schema.state), schema.state, rows),
        )

    def verify(self, schema: Schema, step: Step, tolerance: float = 0.0) -> None:
        """Raises CheckError where the step does not run, or gives something else.

        `tolerance`: how far rows may be apart by the batch that they are in, as an import measured it.
        """
        try:
            outputs, after = _run(step, self.inputs, self.before)
        except Exception as error:  # of whatever computes it
            raise CheckError(f"the check vector does not run: {str(error).partition(chr(10))[0]}") from error
        pairs = [
            *zip(schema.outputs, [np.stack(several) for several in outputs], self.outputs, strict=True),
            *zip(schema.state, after, self.after, strict=True),
        ]
        for spec, got, want in pairs:
            if difference := _difference(got, want, spec, tolerance):
                raise CheckError(
                    f"the check vector fails: {spec.name} differs by {difference[0]:.2g}, at most {difference[1]:.2g} is allowed; "
                    "the weights are not those that were recorded, or this machine computes something else"
                )


def floats(values: NDArray[Any], spec: TensorSpec) -> NDArray[np.float64]:
    """The numbers of a tensor, which for bfloat16 are kept as bits."""
    if spec.dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def _difference(
    got: NDArray[Any], want: NDArray[Any], spec: TensorSpec, tolerance: float
) -> tuple[float, float] | None:
    """How far two tensors are apart and how far they may be; None: no further than that."""
    if got.shape != want.shape:
        return float("inf"), 0.0
    if not want.size:
        return None
    one, other = floats(got, spec), floats(want, spec)
    with np.errstate(invalid="ignore"):
        distance = np.abs(one - other)
    distance[(one == other) | (np.isnan(one) & np.isnan(other))] = (
        0  # infinities, and what is no number, may be recorded
    )
    # Relative where numbers are large: a normalised cell answers in the units of its data.
    largest = float(np.abs(np.nan_to_num(other, nan=0, posinf=0, neginf=0)).max())
    allowed = max(tolerance, _TOLERANCES.get(spec.dtype, CHECK_TOLERANCE)) * max(1.0, largest)
    greatest = float(distance.max())
    return None if greatest <= allowed else (greatest, allowed)


_TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2}  # two of their own roundings


def _run(step: Step, inputs: Arrays, states: Arrays) -> tuple[list[list[NDArray[Any]]], Arrays]:
    """The outputs of each tensor, one a step, and the last states."""
    outputs: list[Arrays] = []
    for number in range(len(inputs[0])):
        got, states = step([values[number] for values in inputs], states)
        outputs.append(got)
    return [list(several) for several in zip(*outputs, strict=True)], states


def _names(kind: str, specs: Sequence[TensorSpec]) -> list[str]:
    return [f"check.{kind}.{spec.name}" for spec in specs]


def _read(
    tensors: Mapping[str, StoredTensor], names: Sequence[str], specs: Sequence[TensorSpec], rows: tuple[int, ...]
) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = []
    for name, spec in zip(names, specs, strict=True):
        if name not in tensors:
            raise CheckError(f"the check vector lacks {name}")
        tensor, wanted = tensors[name], f"{spec.dtype} {(*rows, *spec.shape)}"
        if tensor.text != wanted:
            raise CheckError(f"the check vector fails: {name} is {tensor.text}, expected {wanted}")
        found.append(tensor.values)
    return found
