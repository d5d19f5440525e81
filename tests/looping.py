"""A model that is its graph and takes as long as it is told to, for ever too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from engram_models.bundle_writing import write_graph_bundle
from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
from engram_models.spec import Schema, TensorSpec

_KERNEL = 1 << 20


def write_looping(directory: Path, name: str, recorded: float = 1.0) -> None:
    """y = h' = h + 1, after as many rounds of nothing as the first input says; `recorded` of them in its check."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Tanh", ["v"], ["w"])], "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, None)],
    )  # fmt: skip
    _write(directory, name, recorded, [helper.make_node("Loop", ["count", "", "h"], ["idle"], body=body)])


def write_pooling(directory: Path, name: str) -> None:
    """The same, but that the rounds are of a single operator, about a millisecond each: it cannot be stopped."""
    nodes = [
        helper.make_node("Add", ["count", "kernel"], ["length"]),
        helper.make_node("Reshape", ["length", "flat"], ["wide"]),
        helper.make_node("Concat", ["flat", "flat", "wide"], ["shape"], axis=0),
        helper.make_node("Expand", ["one", "shape"], ["row"]),
        helper.make_node("AveragePool", ["row"], ["pooled"], kernel_shape=[_KERNEL]),
        helper.make_node("ReduceMax", ["pooled"], ["idle"], keepdims=0),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.INT64, shape, [number])
        for name, shape, number in (("kernel", [], _KERNEL), ("flat", [1], 1))
    ]
    _write(directory, name, 1.0, nodes, constants)


def _write(
    directory: Path, name: str, recorded: float, idling: list[NodeProto], more: Sequence[TensorProto] = ()
) -> None:
    """`idling`: from `count` to `idle`, which counts for nothing."""
    schema = Schema(
        (TensorSpec("rounds", "float32", ()),),
        (TensorSpec("y", "float32", ()),),
        (TensorSpec("h", "float32", (), "recurrent"),),
    )
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("ReduceMax", ["rounds"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["count"], to=TensorProto.INT64),
        *idling,
        helper.make_node("Mul", ["idle", "nought"], ["none"]),
        helper.make_node("Add", ["h", "one"], ["more"]),
        helper.make_node("Add", ["more", "none"], ["y"]),
        helper.make_node("Identity", ["y"], ["next_h"]),
    ]
    rows = [value(name, TensorProto.FLOAT, ["batch"]) for name in ("rounds", "h", "y", "next_h")]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, [], [number]) for name, number in (("nought", 0), ("one", 1))
    ]
    made = helper.make_graph(nodes, name, rows[:2], rows[2:], [*constants, *more])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    inputs, before = np.full((CHECK_STEPS, CHECK_ROWS), recorded, np.float32), np.zeros(CHECK_ROWS, np.float32)
    outputs = np.repeat(np.arange(1, CHECK_STEPS + 1, dtype=np.float32)[:, None], CHECK_ROWS, 1)
    check = CheckVector([inputs], [before], [outputs], [outputs[-1]])
    write_graph_bundle(directory, name, "1", model, schema, check)
