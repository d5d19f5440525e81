"""Models of several inputs and outputs and with constants, small enough to be computed by hand. Written as graphs."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper

from engram_models import write_graph_bundle
from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
from engram_models.graph_step import GraphStep
from engram_models.spec import Schema, TensorSpec

FRAME = 160
_ONNX = {"float32": "FLOAT", "float64": "DOUBLE"}
RATE = 16000

ARM = Schema(
    inputs=(TensorSpec("obs", "float32", (3,)), TensorSpec("gap", "float32", ())),
    outputs=(TensorSpec("act", "float32", (3,)), TensorSpec("seen", "int64", ())),
    state=(
        TensorSpec("total", "float32", (3,), "recurrent"),
        TensorSpec("count", "int64", (), "counter"),
        TensorSpec("sr", "int64", (), "constant", initial=float(RATE)),
    ),
)
LOUD = Schema(
    inputs=(TensorSpec("audio", "float32", (FRAME,)),),
    outputs=(TensorSpec("peak", "float32", ()),),
    state=(TensorSpec("count", "int64", (), "counter"), TensorSpec("sr", "int64", (), "constant", initial=float(RATE))),
)
DTYPES = ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
MIRROR = Schema(
    inputs=tuple(TensorSpec(f"in_{dtype}", dtype, (2, 3)) for dtype in DTYPES),
    outputs=tuple(TensorSpec(f"out_{dtype}", dtype, (2, 3)) for dtype in DTYPES),
    state=(TensorSpec("count", "int64", (), "counter"),),
)


def write_mirror(directory: pathlib.Path, name: str = "mirror") -> None:
    """Gives each input as it came, one of each dtype."""
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes = [helper.make_node("Identity", [f"in_{dtype}"], [f"out_{dtype}"]) for dtype in DTYPES]
    nodes.append(helper.make_node("Add", ["count", "one"], ["next_count"]))
    _write(directory, name, MIRROR, nodes, [one])


def write_arm(directory: pathlib.Path, name: str = "arm") -> None:
    """act = total + sr, where total grows by obs x gap at each step; seen = how many steps there were."""
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("Unsqueeze", ["gap", "one"], ["gap_column"]),
        helper.make_node("Mul", ["obs", "gap_column"], ["more"]),
        helper.make_node("Add", ["total", "more"], ["next_total"]),
        helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["rate", "one"], ["rate_column"]),
        helper.make_node("Add", ["next_total", "rate_column"], ["act"]),
        helper.make_node("Add", ["count", "one"], ["next_count"]),
        helper.make_node("Identity", ["next_count"], ["seen"]),
    ]
    _write(directory, name, ARM, nodes, [one])


def write_loud(directory: pathlib.Path, name: str = "loud") -> None:
    """peak = the largest sample of the frame."""
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("ReduceMax", ["audio", "one"], ["peak"], keepdims=0),
        helper.make_node("Add", ["count", "one"], ["next_count"]),
    ]
    _write(directory, name, LOUD, nodes, [one])


def _write(
    directory: pathlib.Path,
    name: str,
    schema: Schema,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> None:
    def values(specs: tuple[TensorSpec, ...], prefix: str = "") -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                prefix + spec.name,
                getattr(TensorProto, _ONNX.get(spec.dtype, spec.dtype.upper())),
                ["batch", *spec.shape],
            )
            for spec in specs
        ]

    graph = helper.make_graph(
        nodes, name, [*values(schema.inputs), *values(schema.state)],
        [*values(schema.outputs), *values(schema.changing, "next_")], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    rng = np.random.default_rng(0)
    given = [
        rng.uniform(0, 2, size=(CHECK_STEPS, CHECK_ROWS, *spec.shape)).astype(spec.np_dtype) for spec in schema.inputs
    ]
    before = [np.full((CHECK_ROWS, *spec.shape), spec.initial, spec.np_dtype) for spec in schema.state]
    check = CheckVector.record(schema, GraphStep(data, schema), given, before)
    write_graph_bundle(directory, name, "1", data, schema, check)
