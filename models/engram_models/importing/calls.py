"""Calls of a stranger's graph, in the sandbox: what goes wrong in one is told apart. Used by trials.py and replay.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from engram_models.batching import ALONE, Batching
from engram_models.graph_step import GraphError, GraphStep
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.numbers import Array, of_floats
from engram_models.spec import Schema, TensorSpec

_LINE_MAX = 200


class RunFailedError(Exception):
    """ONNX Runtime gave up in a run, or gave other shapes than the schema's. One line."""


def loaded(graph: bytes, schema: Schema, one_by_one: bool = False) -> GraphStep:
    """Raises ImportRefusedError, or MemoryError."""
    try:
        return GraphStep(graph, schema, ALONE if one_by_one else Batching())
    except GraphError as error:
        if "bad_alloc" in str(error) or "llocate" in str(error):
            raise MemoryError from error
        raise ImportRefusedError(str(error)) from error


def checked_call(
    step: GraphStep, schema: Schema, inputs: Sequence[Array], states: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """Raises RunFailedError."""
    try:
        outputs, after = step(inputs, states)
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's kinds have no common root
        text = str(error)
        if "bad_alloc" in text or "llocate" in text:
            raise MemoryError from error
        raise RunFailedError(_line(text)) from error
    rows = len(inputs[0])
    for spec, array in zip((*schema.outputs, *schema.state), (*outputs, *after), strict=True):
        if array.shape != (rows, *spec.shape) or array.dtype != spec.np_dtype:
            found = f"{array.dtype} {list(array.shape)}"
            raise RunFailedError(f"{shown(spec.name)} comes out as {found}, not {spec.dtype} {[rows, *spec.shape]}")
    return outputs, after


def initial_rows(spec: TensorSpec, initial: Mapping[str, Array], rows: int) -> Array:
    """[rows, *shape]"""
    one = initial.get(spec.name)
    if one is None:
        full = np.full(spec.shape, spec.initial)
        one = of_floats(full, spec) if spec.is_float else full.astype(spec.np_dtype)
    return np.repeat(np.ascontiguousarray(one, spec.np_dtype).reshape(1, *spec.shape), rows, 0)


def _line(text: str) -> str:
    """What ONNX Runtime says, without the paths and signatures of its sources."""
    text = " ".join(text.split())
    operator = re.search(r"while running (\w+) node", text)
    text = text.rpartition("Status Message: ")[2].rpartition("] : ")[2]
    text = re.sub(r"^/\S+:\d+ .*?\) (\[with .*?\] )?", "", text)[:_LINE_MAX]
    return f"in operator {operator.group(1)}: {text}" if operator else text
