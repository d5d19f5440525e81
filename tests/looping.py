"""A model that is its graph and takes as long as it is told to, for ever too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from engram_models.bundle_writing import write_graph_bundle
from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
from engram_models.spec import Schema, TensorSpec


def write_looping(directory: Path, name: str, recorded: float = 1.0) -> None:
    """y = h' = h + 1, after as many rounds of nothing as the first input says; `recorded` of them in its check."""
    schema = Schema(
        (TensorSpec("rounds", "float32", ()),),
        (TensorSpec("y", "float32", ()),),
        (TensorSpec("h", "float32", (), "recurrent"),),
    )
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Tanh", ["v"], ["w"])], "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("ReduceMax", ["rounds"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["count"], to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "", "h"], ["looped"], body=body),
        helper.make_node("Mul", ["looped", "nought"], ["none"]),
        helper.make_node("Add", ["h", "one"], ["more"]),
        helper.make_node("Add", ["more", "none"], ["y"]),
        helper.make_node("Identity", ["y"], ["next_h"]),
    ]
    rows = [value(name, TensorProto.FLOAT, ["batch"]) for name in ("rounds", "h", "y", "next_h")]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, [], [number]) for name, number in (("nought", 0), ("one", 1))
    ]
    made = helper.make_graph(nodes, name, rows[:2], rows[2:], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    inputs, before = np.full((CHECK_STEPS, CHECK_ROWS), recorded, np.float32), np.zeros(CHECK_ROWS, np.float32)
    outputs = np.repeat(np.arange(1, CHECK_STEPS + 1, dtype=np.float32)[:, None], CHECK_ROWS, 1)
    check = CheckVector([inputs], [before], [outputs], [outputs[-1]])
    write_graph_bundle(directory, name, "1", model, schema, check)
