"""A recorded run of the user's own, done again by the imported graph; the first step that differs is named. Runs in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engram_models.importing.calls import RunFailedError, checked_call, initial_rows, loaded
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.numbers import Array, as_floats, difference, of_floats
from engram_models.importing.sandbox import report
from engram_models.spec import Schema, TensorSpec

_REPORT_EVERY = 500
_FIRST = (
    "inputs, initial values or constants are not those of the recorded run: look at --initial, --constant, --context"
)
_LATER = "states go on otherwise than in the recorded run: look at --state (pairs), --batch-axis, --context"


def arranged(schema: Schema, vector: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
    """Inputs in schema order, and the outputs that were recorded: [steps, rows, *shape] each. Raises ImportRefusedError."""
    inputs = [spec.name for spec in schema.inputs]
    outputs = [spec.name for spec in schema.outputs]
    named = ", ".join(map(shown, [*inputs, *outputs]))
    if unknown := sorted(set(vector) - {*inputs, *outputs}):
        raise ImportRefusedError(
            f"the recorded run has {shown(unknown[0])}, which is no input or output; there are {named}"
        )
    if missing := [name for name in inputs if name not in vector]:
        raise ImportRefusedError(f"the recorded run lacks input {shown(missing[0])}")
    if not any(name in vector for name in outputs):
        raise ImportRefusedError(f"the recorded run has no output; add one of {', '.join(map(shown, outputs))}")
    found = {
        spec.name: arranged_one(spec, vector[spec.name])
        for spec in (*schema.inputs, *schema.outputs)
        if spec.name in vector
    }
    sizes = {array.shape[:2] for array in found.values()}
    if len(sizes) > 1:
        first, *others = found
        other = next(name for name in others if found[name].shape[:2] != found[first].shape[:2])
        raise ImportRefusedError(
            f"the recorded run has {_size(found[first])} of {shown(first)} and {_size(found[other])} of {shown(other)}; give "
            "each as [steps, *shape] or [steps, rows, *shape]"
        )
    return [found[spec.name] for spec in schema.inputs], {
        name: array for name, array in found.items() if name in outputs
    }


def replay(
    graph: bytes, schema: Schema, initial: Mapping[str, Array], vector: Mapping[str, Array], allowed: float
) -> tuple[int, int, float]:
    """Steps, rows, and the largest difference. Raises ImportRefusedError."""
    step = loaded(graph, schema, one_by_one=True)
    inputs, outputs = arranged(schema, vector)
    steps, rows = inputs[0].shape[:2]
    states: Sequence[Array] = [initial_rows(spec, initial, rows) for spec in schema.state]
    largest = 0.0
    for number in range(steps):
        if number % _REPORT_EVERY == 0:
            report(f"recorded run: step {number} of {steps}")
        try:
            got, states = checked_call(step, schema, [array[number] for array in inputs], states)
        except RunFailedError as error:
            raise ImportRefusedError(f"the recorded run stops at step {number}: {error}") from None
        for spec, array in zip(schema.outputs, got, strict=True):
            if spec.name in outputs:
                largest = max(largest, _compared(spec, array, outputs[spec.name][number], number, steps, allowed))
    return steps, rows, largest


def _compared(spec: TensorSpec, got: Array, wanted: Array, number: int, steps: int, allowed: float) -> float:
    apart = difference(got, wanted, spec)
    if apart <= allowed:
        return apart
    row = next(row for row in range(len(got)) if difference(got[row], wanted[row], spec) > allowed)
    where = f"at step {number} of {steps} (the first is 0){f', row {row}' if len(got) > 1 else ''}"
    one, other = as_floats(got[row], spec).reshape(-1), as_floats(wanted[row], spec).reshape(-1)
    with np.errstate(all="ignore"):
        place = int(np.argmax(np.nan_to_num(np.abs(one - other), nan=np.inf)))
    how = f"{apart:.3g} of max(1, |y|)" if np.isfinite(apart) else "beyond measure"
    raise ImportRefusedError(
        f"{shown(spec.name)} first differs from the recorded run {where}: value {place} is {one[place]:.6g}, recorded "
        f"{other[place]:.6g} ({how}; {allowed:g} is allowed); {_LATER if number else _FIRST}"
    )


def arranged_one(spec: TensorSpec, array: Array) -> Array:
    """[steps, rows, *shape] of the schema's type; floats of any size are taken for floats, integers where none is lost."""
    if array.shape[1:] == spec.shape and array.ndim == len(spec.shape) + 1:
        array = array[:, None]
    elif array.shape[2:] != spec.shape or array.ndim != len(spec.shape) + 2:
        raise ImportRefusedError(
            f"the recorded {shown(spec.name)} is {list(array.shape)}; give [steps, *shape] or [steps, rows, *shape], shape being "
            f"{list(spec.shape)}"
        )
    if not array.shape[0] or not array.shape[1]:
        raise ImportRefusedError(f"the recorded {shown(spec.name)} has no step")
    return _typed(spec, array)


def _typed(spec: TensorSpec, array: Array) -> Array:
    if array.dtype == spec.np_dtype:
        return array
    if array.dtype.kind == "f" and spec.is_float:
        return of_floats(array.astype(np.float64), spec)
    if array.dtype.kind in "iub" and spec.dtype == "bool" and np.isin(array, (0, 1)).all():
        return array.astype(np.bool_)
    if array.dtype.kind in "iub" and not spec.is_float and spec.dtype != "bool":
        exact = array.astype(spec.np_dtype)
        if (exact == array).all():
            return exact
    raise ImportRefusedError(f"the recorded {shown(spec.name)} is {array.dtype}; the model's is {spec.dtype}")


def _size(array: Array) -> str:
    return f"{array.shape[0]} steps of {array.shape[1]} rows"
