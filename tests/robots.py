"""A model that is its graph, with everything that a stranger's may have: several inputs and outputs of several types, and constants.

    place' = place + obs[0:2] * gain + gap * rate      place float32[2], from 0.5; gain float32[2], from 1; rate int64[], from 16000
    count' = count + 1                                 count int64[]
    action = place', seen = obs[2] > 0, steps = count'

All of its numbers in tests are exact, whatever the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engram_models.bundle_writing import write_graph_bundle
from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
from engram_models.spec import Schema, TensorSpec

SCHEMA = Schema(
    (TensorSpec("gap", "float16", ()), TensorSpec("obs", "float32", (3,))),
    (TensorSpec("seen", "bool", ()), TensorSpec("action", "float32", (2,)), TensorSpec("steps", "int64", ())),
    (
        TensorSpec("rate", "int64", (), "constant", 16000.0, shared=True), TensorSpec("place", "float32", (2,), "recurrent", 0.5),
        TensorSpec("gain", "float32", (2,), "constant", 1.0), TensorSpec("count", "int64", (), "counter"),
    ),
)  # fmt: skip
INPUT = np.dtype([("gap", "<f2"), ("obs", "<f4", 3)])
OUTPUT = np.dtype([("seen", "?"), ("action", "<f4", 2), ("steps", "<i8")])
STATE = np.dtype([("rate", "<i8"), ("place", "<f4", 2), ("gain", "<f4", 2), ("count", "<i8")])


def step(
    inputs: Sequence[NDArray[Any]], states: Sequence[NDArray[Any]]
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    (gap, obs), (rate, place, gain, count) = inputs, states
    moved = place + obs[:, :2] * gain + (gap.astype(np.float32) * rate.astype(np.float32))[:, None]
    return [obs[:, 2] > 0, moved, count + 1], [rate, moved, gain, count + 1]


def run(
    inputs: NDArray[Any], rate: int = 16000, gain: Sequence[float] = (1.0, 1.0)
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a session gives for inputs [steps] of INPUT from its beginning: outputs [steps] of OUTPUT, and its state, of STATE."""
    states = [np.array([rate]), np.full((1, 2), 0.5, np.float32), np.array([gain], np.float32), np.array([0])]
    outputs = np.empty(len(inputs), OUTPUT)
    for row, one in enumerate(inputs):
        made, states = step([one["gap"][None], one["obs"][None]], states)
        outputs[row] = tuple(value[0] for value in made)
    state = np.zeros((), STATE)
    for name, value in zip(STATE.names or (), states, strict=True):
        state[name] = value[0]
    return outputs, state


def some(steps: int, seed: int = 0) -> NDArray[Any]:
    """Inputs of so many steps: small binary fractions."""
    rng = np.random.default_rng(seed)
    inputs = np.empty(steps, INPUT)
    inputs["gap"] = rng.integers(-8, 8, steps) / 64
    inputs["obs"] = rng.integers(-16, 16, (steps, 3)) / 16
    return inputs


def write(directory: Path, name: str = "robot", version: str = "1") -> Path:
    rng = np.random.default_rng(5)
    shape = (CHECK_STEPS, CHECK_ROWS)
    inputs = [rng.integers(0, 4, shape).astype(np.float16), rng.integers(-4, 4, (*shape, 3)).astype(np.float32)]
    states = [
        np.full(CHECK_ROWS, 8000), rng.integers(-4, 4, (CHECK_ROWS, 2)).astype(np.float32),
        np.ones((CHECK_ROWS, 2), np.float32), np.arange(CHECK_ROWS),
    ]  # fmt: skip
    check = CheckVector.record(SCHEMA, step, inputs, states)
    return write_graph_bundle(directory, name, version, graph().SerializeToString(), SCHEMA, check)


def graph() -> onnx.ModelProto:
    """The step in the bundles' normal form."""
    types = {
        "float16": TensorProto.FLOAT16,
        "float32": TensorProto.FLOAT,
        "int64": TensorProto.INT64,
        "bool": TensorProto.BOOL,
    }

    def values(specs: Sequence[TensorSpec], prefix: str = "") -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                prefix + spec.name, types[spec.dtype], list(spec.shape) if spec.shared else ["batch", *spec.shape]
            )
            for spec in specs
        ]

    def constant(name: str, *numbers: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)

    node = helper.make_node
    nodes = [
        node("Slice", ["obs", "zero", "two", "one"], ["push"]),
        node("Mul", ["push", "gain"], ["gained"]),
        node("Cast", ["gap"], ["gap32"], to=TensorProto.FLOAT),
        node("Cast", ["rate"], ["rate32"], to=TensorProto.FLOAT),
        node("Mul", ["gap32", "rate32"], ["drift"]),
        node("Unsqueeze", ["drift", "one"], ["drifts"]),
        node("Add", ["place", "gained"], ["pushed"]),
        node("Add", ["pushed", "drifts"], ["action"]),
        node("Identity", ["action"], ["next_place"]),
        node("Gather", ["obs", "last"], ["sight"], axis=1),
        node("Greater", ["sight", "dark"], ["seen"]),
        node("Add", ["count", "unit"], ["steps"]),
        node("Identity", ["steps"], ["next_count"]),
    ]
    made = helper.make_graph(
        nodes, "robot", [*values(SCHEMA.inputs), *values(SCHEMA.state)],
        [*values(SCHEMA.outputs), *values(SCHEMA.changing, "next_")],
        [
            constant("zero", 0), constant("two", 2), constant("one", 1), helper.make_tensor("last", TensorProto.INT64, [], [2]),
            helper.make_tensor("dark", TensorProto.FLOAT, [], [0.0]), helper.make_tensor("unit", TensorProto.INT64, [], [1]),
        ],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
