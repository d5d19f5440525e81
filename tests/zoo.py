"""ONNX files of the shapes that people bring, small and with seeded weights, each with the loop that its owner would write around it.

`Case.model` is the file; `Case.run` is the owner's loop: one row at a time on plain ONNX Runtime, states passed by hand, nothing
of ours. `Case.flags` are what `engram models import` has to be told beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
ELEMENTS = {
    "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16, "int8": TensorProto.INT8,
    "int16": TensorProto.INT16, "int32": TensorProto.INT32, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL, "float64": TensorProto.DOUBLE,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A tensor as a session has it: without the batch, whose axis in the file is `axis` (None: it has none)."""

    dtype: str
    shape: tuple[int, ...]
    axis: int | None = 0


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, Row]
    outputs: Mapping[str, Row]
    states: Mapping[str, str]
    """Input: the output that is its next value."""
    initial: Mapping[str, Array]
    """Of every state, as the file takes it for one row."""
    constants: Mapping[str, Array] = field(default_factory=dict)
    context: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    batch: str = "any"
    integers: Mapping[str, int] = field(default_factory=dict)
    """Integer inputs are below this; 4 where it is not said."""

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.onnx"
        path.write_bytes(self.model.SerializeToString())
        return path

    def draw(self, steps: int, rows: int, seed: int = 0) -> dict[str, Array]:
        """Inputs [steps, rows, *shape]."""
        generator = np.random.default_rng(seed)
        found = {}
        for name, row in self.inputs.items():
            shape = (steps, rows, *row.shape)
            if row.dtype == "bool":
                found[name] = generator.integers(0, 2, shape).astype(np.bool_)
            elif "int" in row.dtype:
                found[name] = generator.integers(0, self.integers.get(name, 4), shape).astype(row.dtype)
            else:
                found[name] = (generator.standard_normal(shape) * 0.3).astype(row.dtype)
        return found

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs [steps, rows, *shape] of inputs [steps, rows, *shape]."""
        session = onnxruntime.InferenceSession(
            self.model.SerializeToString(), _options(), providers=["CPUExecutionProvider"]
        )
        steps, rows = next(iter(inputs.values())).shape[:2]
        found: dict[str, list[list[Array]]] = {name: [[] for _ in range(steps)] for name in self.outputs}
        for row in range(rows):
            loop = _Loop(self, session)
            for step in range(steps):
                for name, value in loop.step({name: array[step, row] for name, array in inputs.items()}).items():
                    found[name][step].append(value)
        return {name: np.array(several) for name, several in found.items()}


class _Loop:
    """One session of somebody who has no server."""

    def __init__(self, case: Case, session: onnxruntime.InferenceSession) -> None:
        self._case, self._session = case, session
        self._names = [output.name for output in session.get_outputs()]
        bits = {name for name, value in case.initial.items() if value.dtype == np.uint16}
        self._states: dict[str, Any] = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, TensorProto.BFLOAT16)
            if name in bits else onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in case.initial.items()
        }  # fmt: skip
        self._past = {name: np.zeros(size, np.float32) for name, size in case.context.items()}

    def step(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds: dict[str, Any] = dict(self._states)
        for name, value in inputs.items():
            if name in self._past:
                value = np.concatenate([self._past[name], value])
                self._past[name] = value[-len(self._past[name]) :]
            axis = self._case.inputs[name].axis
            value = value if axis is None else np.expand_dims(value, axis)
            feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        for name, value in self._case.constants.items():
            feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(value))
        given = dict(zip(self._names, self._session.run_with_ort_values(self._names, feeds), strict=True))
        self._states = {name: given[output] for name, output in self._case.states.items()}
        found = {}
        for name, row in self._case.outputs.items():
            value = given[name].numpy()
            found[name] = value if row.axis is None else np.squeeze(value, row.axis)
        return found


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


class Net:
    """Writes a graph node by node; weights are drawn as they are asked for."""

    def __init__(self, seed: int = 0, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._generator = np.random.default_rng(seed)
        self._count, self._prefix = 0, prefix

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        return self.ops(kind, *inputs, outs=[out or self._name(kind)], **attributes)[0]

    def ops(self, kind: str, *inputs: str, outs: Sequence[str], **attributes: Any) -> Sequence[str]:
        self.nodes.append(helper.make_node(kind, list(inputs), list(outs), **attributes))
        return outs

    def const(self, value: Any, dtype: Any = None) -> str:
        array = np.array(
            value, dtype if dtype is not None else (np.int64 if np.array(value).dtype.kind == "i" else np.float32)
        )
        name = self._name("const")
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int, scale: float = 0.0, dtype: Any = np.float32) -> str:
        values = self._generator.standard_normal(shape) * (scale or shape[0] ** -0.5)
        return self.const(values.astype(dtype), dtype)

    def linear(self, x: str, width: int, to: int, out: str = "") -> str:
        """[..., width] -> [..., to]"""
        return self.op("Add", self.op("MatMul", x, self.weight(width, to)), self.weight(to, scale=0.1), out=out)

    def tail(self, old: str, new: str, keep: int, axis: int, out: str = "") -> str:
        """The last `keep` of `old` and then `new` along an axis."""
        whole = self.op("Concat", old, new, axis=axis)
        return self.op("Slice", whole, self.const([-keep]), self.const([1 << 40]), self.const([axis]), out=out)

    def lstm(self, x: str, h: str, c: str, width: int, size: int, h_out: str = "", c_out: str = "") -> tuple[str, str]:
        """x [B, width]; h and c [B, size]"""
        gates = self.op("Add", self.linear(x, width, 4 * size), self.op("MatMul", h, self.weight(size, 4 * size)))
        parts = self.ops("Split", gates, outs=[self._name("gate") for _ in range(4)], axis=1, num_outputs=4)
        i, f, o = (self.op("Sigmoid", part) for part in parts[:3])
        cell = self.op("Add", self.op("Mul", f, c), self.op("Mul", i, self.op("Tanh", parts[3])), out=c_out)
        return self.op("Mul", o, self.op("Tanh", cell), out=h_out), cell

    def model(
        self, inputs: Mapping[str, tuple[str, Sequence[Any] | None]], outputs: Mapping[str, tuple[str, Sequence[Any] | None]],
        opset: int = 18, metadata: Mapping[str, str] | None = None,
    ) -> onnx.ModelProto:  # fmt: skip
        graph = helper.make_graph(self.nodes, "main", _values(inputs), _values(outputs), self.weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="a-trainer"
        )
        for key, value in (metadata or {}).items():
            model.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(model)
        return model

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self._prefix}/{kind}_{self._count}"


def _values(values: Mapping[str, tuple[str, Sequence[Any] | None]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, ELEMENTS[dtype], shape) for name, (dtype, shape) in values.items()]


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


def speech_activity() -> Case:
    """One state [2, B, 128], a scalar sample rate that an If asks for, and 64 samples that the caller puts before each frame."""
    net = Net(1)

    def branch(seed: int, name: str) -> onnx.GraphProto:
        inner = Net(seed, name)
        frames = inner.op("Reshape", "input", inner.const([0, -1, 64]))
        features = inner.op("ReduceMean", inner.op("Relu", inner.linear(frames, 64, 32)), inner.const([1]), keepdims=0)
        h = inner.op("Gather", "state", inner.const(0), axis=0)
        c = inner.op("Gather", "state", inner.const(1), axis=0)
        h, c = inner.lstm(features, h, c, 32, 128)
        y = inner.op("Sigmoid", inner.linear(inner.op("Relu", h), 128, 1))
        both = [inner.op("Unsqueeze", one, inner.const([0])) for one in (h, c)]
        state = inner.op("Concat", *both, axis=0)
        return helper.make_graph(
            inner.nodes, name, [], _values({y: ("float32", None), state: ("float32", None)}), inner.weights
        )

    fast = net.op("Equal", "sr", net.const(16000))
    net.ops("If", fast, outs=["output", "stateN"], then_branch=branch(2, "fast"), else_branch=branch(3, "slow"))
    model = net.model(
        {"input": ("float32", [None, None]), "state": ("float32", [2, None, 128]), "sr": ("int64", [])},
        {"output": ("float32", [None, 1]), "stateN": ("float32", [None, None, None])}, opset=16 + 2,
    )  # fmt: skip
    return Case(
        "speech_activity", model, {"input": Row("float32", (512,))}, {"output": Row("float32", (1,))}, {"state": "stateN"},
        {"state": zeros(2, 1, 128)}, {"sr": np.array(16000)}, {"input": 64},
        ("--constant", "sr=16000", "--context", "input=64", "--shape", "input=512"),
    )  # fmt: skip


def two_states() -> Case:
    """h and c [2, B, 64] of equal shape: a pairing by sorted order or by shape can swap them without any error."""
    net = Net(4)
    x = net.op("Relu", net.linear("input", 256, 32))
    hs, cs = [], []
    for layer, width in enumerate((32, 64)):
        h = net.op("Gather", "h", net.const(layer), axis=0)
        c = net.op("Gather", "c", net.const(layer), axis=0)
        x, cell = net.lstm(x, h, c, width, 64)
        hs.append(net.op("Unsqueeze", x, net.const([0])))
        cs.append(net.op("Unsqueeze", cell, net.const([0])))
    net.op("Sigmoid", net.linear(x, 64, 1), out="output")
    net.op("Concat", *cs, axis=0, out="cn")
    net.op("Concat", *hs, axis=0, out="hn")
    state = ("float32", [2, "batch", 64])
    model = net.model(
        {"input": ("float32", ["batch", 256]), "h": state, "c": state},
        {"output": ("float32", ["batch", 1]), "cn": state, "hn": state},
    )
    return Case(
        "two_states", model, {"input": Row("float32", (256,))}, {"output": Row("float32", (1,))}, {"h": "hn", "c": "cn"},
        {"h": zeros(2, 1, 64), "c": zeros(2, 1, 64)},
    )  # fmt: skip


def streaming_transformer(layers: int = 16, width: int = 16, left: int = 16) -> Case:
    """98 states: batch axes 1, 1, 1, 1, 0, 0 in each layer, 2 in one more, and one counter [B]."""
    net = Net(5)
    shapes: dict[str, list[Any]] = {"cached_embed": [1, 3, "N", 12]}
    joined = net.op("Concat", "cached_embed", _unsqueezed(net, "x"), axis=1)  # [1, 3 + 4, N, 12]
    net.op("Slice", joined, net.const([-3]), net.const([1 << 40]), net.const([1]), out="new_cached_embed")
    x = net.op("Transpose", net.op("Squeeze", joined, net.const([0])), perm=[1, 0, 2])  # [N, 7, 12]
    x = net.linear(net.op("Slice", x, net.const([-4]), net.const([1 << 40]), net.const([1])), 12, width)
    seen = net.op("Cast", "processed_lens", to=TensorProto.FLOAT)
    age = net.op("Unsqueeze", net.op("Sin", seen), net.const([1, 2]))
    x = net.op("Add", x, age)
    for layer in range(layers):
        x = _transformer_layer(net, x, layer, width, left, shapes)
    net.op("Add", "processed_lens", net.const(4), out="new_processed_lens")
    net.linear(x, width, 8, out="encoder_out")
    states = {name: f"new_{name}" for name in (*shapes, "processed_lens")}
    kinds: dict[str, tuple[str, Sequence[Any]]] = {name: ("float32", shape) for name, shape in shapes.items()}
    kinds["processed_lens"] = ("int64", ["N"])
    model = net.model(
        {"x": ("float32", ["N", 4, 12]), **kinds},
        {"encoder_out": ("float32", ["N", 4, 8]), **{states[name]: kind for name, kind in kinds.items()}},
    )
    initial = {name: zeros(*_for_one(shape), dtype=kind) for name, (kind, shape) in kinds.items()}
    return Case(
        "streaming_transformer", model, {"x": Row("float32", (4, 12))}, {"encoder_out": Row("float32", (4, 8))}, states, initial
    )  # fmt: skip


def _transformer_layer(net: Net, x: str, layer: int, width: int, left: int, shapes: dict[str, list[Any]]) -> str:
    def cached(kind: str, shape: list[Any]) -> str:
        shapes[f"cached_{kind}_{layer}"] = shape
        return f"cached_{kind}_{layer}"

    for kind in ("key", "val1", "val2"):
        name = cached(kind, [left, "N", width])
        rows = net.op("Transpose", net.linear(x, width, width), perm=[1, 0, 2])
        kept = net.tail(name, rows, left, 0, out=f"new_{name}")
        seen = net.op("ReduceMean", net.op("Tanh", kept), net.const([0]), keepdims=1)
        x = net.op("Add", x, net.op("Transpose", seen, perm=[1, 0, 2]))
    name = cached("nonlin_attn", [1, "N", left, width])
    kept = net.tail(name, net.op("Unsqueeze", net.op("Tanh", x), net.const([0])), left, 2, out=f"new_{name}")
    x = net.op("Add", x, net.op("Squeeze", net.op("ReduceMax", kept, net.const([2]), keepdims=1), net.const([0])))
    for kind in ("conv1", "conv2"):
        name = cached(kind, ["N", width, 5])
        columns = net.op("Transpose", x, perm=[0, 2, 1])
        whole = net.op("Concat", name, columns, axis=2)  # causal: 5 of before and 4 new ones
        net.op("Slice", whole, net.const([-5]), net.const([1 << 40]), net.const([2]), out=f"new_{name}")
        rolled = net.op("Conv", whole, net.weight(width, 1, 6, scale=0.2), group=width)
        x = net.op("Add", net.linear(x, width, width), net.op("Transpose", net.op("Tanh", rolled), perm=[0, 2, 1]))
    return net.op("Tanh", x)


def grouped_caches(groups: int = 5, width: int = 8, left: int = 6) -> Case:
    """35 states, seven of a kind for each encoder: batch axes 1, 1, 2, 2, 2, 1, 1."""
    net = Net(6)
    kinds: dict[str, tuple[str, list[Any]]] = {}
    for group in range(groups):
        kinds |= {
            f"cached_len_{group}": ("int64", [2, "N"]),
            f"cached_avg_{group}": ("float32", [2, "N", width]),
            **{f"cached_{kind}_{group}": ("float32", [2, left, "N", width]) for kind in ("key", "val", "val2")},
            **{f"cached_conv{kind}_{group}": ("float32", [2, "N", width, 3]) for kind in (1, 2)},
        }
    x = net.linear("x", 10, width)
    for group in range(groups):
        x = _group(net, x, group, width, left)
    net.linear(x, width, 5, out="encoder_out")
    states = {name: f"new_{name}" for name in kinds}
    model = net.model(
        {"x": ("float32", ["N", 10]), **kinds},
        {"encoder_out": ("float32", ["N", 5]), **{states[name]: kind for name, kind in kinds.items()}},
    )
    initial = {name: zeros(*_for_one(shape), dtype=kind) for name, (kind, shape) in kinds.items()}
    return Case(
        "grouped_caches", model, {"x": Row("float32", (10,))}, {"encoder_out": Row("float32", (5,))}, states, initial
    )


def _group(net: Net, x: str, group: int, width: int, left: int) -> str:
    count = net.op("Add", f"cached_len_{group}", net.const(1), out=f"new_cached_len_{group}")
    share = net.op("Unsqueeze", net.op("Reciprocal", net.op("Cast", count, to=TensorProto.FLOAT)), net.const([2]))
    change = net.op("Mul", net.op("Sub", net.op("Unsqueeze", x, net.const([0])), f"cached_avg_{group}"), share)
    mean = net.op("Add", f"cached_avg_{group}", change, out=f"new_cached_avg_{group}")
    x = net.op("Add", x, net.op("ReduceSum", mean, net.const([0]), keepdims=0))
    for kind in ("key", "val", "val2"):
        name = f"cached_{kind}_{group}"
        rows = net.op("Unsqueeze", net.linear(x, width, width), net.const([0, 1]))  # [1, 1, N, width]
        both = net.op("Concat", rows, net.op("Tanh", rows), axis=0)
        kept = net.tail(name, both, left, 1, out=f"new_{name}")
        x = net.op("Add", x, net.op("ReduceMean", kept, net.const([0, 1]), keepdims=0))
    for kind in (1, 2):
        name = f"cached_conv{kind}_{group}"
        column = net.op("Unsqueeze", x, net.const([0, 3]))  # [1, N, width, 1]
        kept = net.tail(name, net.op("Concat", column, net.op("Neg", column), axis=0), 3, 3, out=f"new_{name}")
        x = net.op("Tanh", net.op("Add", x, net.op("ReduceSum", kept, net.const([0, 3]), keepdims=0)))
    return x


def encoder_cache() -> Case:
    """Caches (L, B, T, d), a `length` that every call brings, and a length of the cache that is a state [B]."""
    net = Net(7)
    x = net.linear(net.op("Transpose", "audio_signal", perm=[0, 2, 1]), 10, 8)  # [B, 6, 8]
    places = net.op("Unsqueeze", net.const(np.arange(6)), net.const([0]))
    inside = net.op("Less", places, net.op("Unsqueeze", "length", net.const([1])))
    x = net.op("Mul", x, net.op("Unsqueeze", net.op("Cast", inside, to=TensorProto.FLOAT), net.const([2])))
    layers, times = [], []
    for layer in range(3):
        cache = net.op("Gather", "cache_last_channel", net.const(layer), axis=0)  # [B, 9, 8]
        kept = net.tail(cache, x, 9, 1)
        scores = net.op(
            "Softmax", net.op("MatMul", net.linear(x, 8, 8), net.op("Transpose", kept, perm=[0, 2, 1])), axis=2
        )
        x = net.op("Add", x, net.op("MatMul", scores, kept))
        layers.append(net.op("Unsqueeze", kept, net.const([0])))
        time = net.op("Gather", "cache_last_time", net.const(layer), axis=0)  # [B, 8, 4]
        kept = net.tail(time, net.op("Transpose", x, perm=[0, 2, 1]), 4, 2)
        x = net.op(
            "Tanh",
            net.op(
                "Add", x, net.op("Transpose", net.op("ReduceMean", kept, net.const([2]), keepdims=1), perm=[0, 2, 1])
            ),
        )
        times.append(net.op("Unsqueeze", kept, net.const([0])))
    net.op("Concat", *layers, axis=0, out="cache_last_channel_next")
    net.op("Concat", *times, axis=0, out="cache_last_time_next")
    net.op("Min", net.op("Add", "cache_last_channel_len", "length"), net.const(9), out="cache_last_channel_next_len")
    net.op("Transpose", net.linear(x, 8, 5), perm=[0, 2, 1], out="outputs")
    net.op("Identity", "length", out="encoded_lengths")
    channel, time, count = ("float32", [3, "batch", 9, 8]), ("float32", [3, "batch", 8, 4]), ("int64", ["batch"])
    model = net.model(
        {"audio_signal": ("float32", ["batch", 10, 6]), "length": count, "cache_last_channel": channel, "cache_last_time": time,
         "cache_last_channel_len": count},
        {"outputs": ("float32", ["batch", 5, 6]), "encoded_lengths": count, "cache_last_channel_next": channel,
         "cache_last_time_next": time, "cache_last_channel_next_len": count},
    )  # fmt: skip
    return Case(
        "encoder_cache", model, {"audio_signal": Row("float32", (10, 6)), "length": Row("int64", ())},
        {"outputs": Row("float32", (5, 6)), "encoded_lengths": Row("int64", ())},
        {"cache_last_channel": "cache_last_channel_next", "cache_last_time": "cache_last_time_next",
         "cache_last_channel_len": "cache_last_channel_next_len"},
        {"cache_last_channel": zeros(3, 1, 9, 8), "cache_last_time": zeros(3, 1, 8, 4), "cache_last_channel_len": zeros(1, dtype=np.int64)},
        flags=("--input", "length"), integers={"length": 7},
    )  # fmt: skip


def large_half_state(size: int = 219_729) -> Case:
    """A float16 state (B, 219729)."""
    net = Net(8)
    new = net.op("Cast", net.linear("features", 16, 33), to=TensorProto.FLOAT16)
    kept = net.tail("state", new, size, 1, out="new_state")
    past = net.op("Slice", kept, net.const([-99]), net.const([1 << 40]), net.const([1]))
    net.linear(net.op("Tanh", net.op("Cast", past, to=TensorProto.FLOAT)), 99, 4, out="scores")
    state = ("float16", ["batch", size])
    model = net.model(
        {"features": ("float32", ["batch", 16]), "state": state},
        {"scores": ("float32", ["batch", 4]), "new_state": state},
    )
    return Case(
        "large_half_state", model, {"features": Row("float32", (16,))}, {"scores": Row("float32", (4,))},
        {"state": "new_state"}, {"state": zeros(1, size, dtype=np.float16)},
    )  # fmt: skip


def noise_suppression(fixed: bool = False) -> Case:
    """Static batch 1. `fixed`: a Reshape says so too, and there is no other way to run it than one row at a time."""
    net = Net(9)
    size = 33
    x = net.op("Reshape", "mix", net.const([1, 2 * size] if fixed else [-1, 2 * size]))
    x = net.op("Tanh", net.linear(x, 2 * size, 8))
    conv = net.tail("conv_cache", _stacked(net, x, [0, 2, 4]), 3, 3, out="conv_cache_out")  # [2, 1, 4, 3, 8]
    x = net.op("Add", x, net.op("ReduceMean", conv, net.const([0, 2, 3]), keepdims=0))
    old = net.op("Mul", "tra_cache", net.const(0.5))  # [2, 3, 1, 1, 8]
    tra = net.op("Add", old, net.op("Unsqueeze", net.linear(x, 8, 8), net.const([0, 1, 3])), out="tra_cache_out")
    x = net.op("Add", x, net.op("Squeeze", net.op("ReduceSum", tra, net.const([0, 1]), keepdims=0), net.const([1])))
    inter = net.op(
        "Tanh", net.op("Add", "inter_cache", net.op("Unsqueeze", x, net.const([0, 2]))), out="inter_cache_out"
    )
    x = net.op("Add", x, net.op("ReduceMean", inter, net.const([0, 2]), keepdims=0))
    mask = net.op("Sigmoid", net.linear(x, 8, 2 * size))
    net.op("Mul", "mix", net.op("Reshape", mask, net.const([1 if fixed else -1, size, 1, 2])), out="enh")
    caches: dict[str, tuple[str, Sequence[Any]]] = {
        "conv_cache": ("float32", [2, 1, 4, 3, 8]), "tra_cache": ("float32", [2, 3, 1, 1, 8]), "inter_cache": ("float32", [2, 1, 5, 8]),
    }  # fmt: skip
    model = net.model(
        {"mix": ("float32", [1, size, 1, 2]), **caches},
        {"enh": ("float32", [1, size, 1, 2]), **{f"{name}_out": kind for name, kind in caches.items()}},
    )
    row = Row("float32", (size, 1, 2))
    return Case(
        "noise_suppression_fixed" if fixed else "noise_suppression", model, {"mix": row}, {"enh": row},
        {name: f"{name}_out" for name in caches}, {name: zeros(*shape) for name, (_, shape) in caches.items()},
        flags=("--batch-axis", "mix=0", "--batch-axis", "conv_cache=1", "--batch-axis", "tra_cache=2", "--batch-axis", "inter_cache=1"),
        batch="one-by-one" if fixed else "any",
    )  # fmt: skip


def _stacked(net: Net, x: str, axes: list[int]) -> str:
    """[B, 8] -> [2, B, 4, 1, 8], for a cache of two layers and four channels."""
    one = net.op("Unsqueeze", x, net.const([0, 2, 3]))
    two = net.op("Concat", one, net.op("Neg", one), axis=0)
    return net.op("Concat", two, net.op("Sin", two), two, net.op("Cos", two), axis=2)


def chain() -> tuple[Case, Case]:
    """Two graphs, the second of which takes what the first gives; names of states say nothing."""
    first, second = Net(10), Net(11)
    h = first.op("Gather", "input_3", first.const(0), axis=3)
    c = first.op("Gather", "input_3", first.const(1), axis=3)
    h, c = (first.op("Reshape", one, first.const([-1, 24])) for one in (h, c))
    h, c = first.lstm(first.op("Reshape", "input_2", first.const([-1, 17])), h, c, 17, 24)
    mask = first.op("Sigmoid", first.linear(h, 24, 17))
    first.op("Reshape", mask, first.const([-1, 1, 17]), out="activation_2")
    both = [first.op("Reshape", one, first.const([-1, 1, 24, 1])) for one in (h, c)]
    first.op("Concat", *both, axis=3, out="tf_op_layer_stack_2")
    shape = ("float32", [1, 1, 24, 2])
    model = first.model(
        {"input_2": ("float32", [1, 1, 17]), "input_3": shape},
        {"activation_2": ("float32", [1, 1, 17]), "tf_op_layer_stack_2": shape},
    )
    one = Case(
        "chain_first", model, {"input_2": Row("float32", (1, 17))}, {"activation_2": Row("float32", (1, 17))},
        {"input_3": "tf_op_layer_stack_2"}, {"input_3": zeros(1, 1, 24, 2)},
        flags=("--state", "input_3=tf_op_layer_stack_2", "--batch-axis", "input_3=0", "--batch-axis", "input_2=0"),
    )  # fmt: skip
    x = second.op("Tanh", second.linear(second.op("Reshape", "input_4", second.const([-1, 17])), 17, 12))
    kept = second.op("Add", second.op("Mul", "past", second.const(0.9)), x, out="PartitionedCall_1")
    second.linear(kept, 12, 3, out="PartitionedCall_0")
    model = second.model(
        {"input_4": ("float32", [1, 1, 17]), "past": ("float32", [1, 12])},
        {"PartitionedCall_0": ("float32", [1, 3]), "PartitionedCall_1": ("float32", [1, 12])},
    )
    two = Case(
        "chain_second", model, {"input_4": Row("float32", (1, 17))}, {"PartitionedCall_0": Row("float32", (3,))},
        {"past": "PartitionedCall_1"}, {"past": zeros(1, 12)},
        flags=("--state", "past=PartitionedCall_1", "--batch-axis", "input_4=0"),
    )  # fmt: skip
    return one, two


def flat_state(size: int = 451) -> Case:
    """No batch axis anywhere, one flat state, and its initial value, which is not zero, in the file's metadata."""
    net = Net(12)
    new = net.op(
        "Tanh",
        net.op("Squeeze", net.linear(net.op("Unsqueeze", "input_frame", net.const([0])), 48, 48), net.const([0])),
    )
    kept = net.tail("states", new, size, 0, out="new_states")
    gain = net.op("Sigmoid", net.op("ReduceMean", kept, net.const([0]), keepdims=1))
    net.op("Mul", "input_frame", gain, out="enhanced_audio_frame")
    net.op("ReduceMean", net.op("Mul", kept, kept), net.const([0]), keepdims=1, out="lsnr")
    initial = np.linspace(-1.5, -0.5, size).astype(np.float32)
    state = ("float32", [size])
    model = net.model(
        {"input_frame": ("float32", [48]), "states": state},
        {"enhanced_audio_frame": ("float32", [48]), "new_states": state, "lsnr": ("float32", [1])},
        metadata={"initial_states": json.dumps([float(value) for value in initial]), "sample_rate": "48000"},
    )
    return Case(
        "flat_state", model, {"input_frame": Row("float32", (48,), None)},
        {"enhanced_audio_frame": Row("float32", (48,), None), "lsnr": Row("float32", (1,), None)},
        {"states": "new_states"}, {"states": initial}, batch="one-by-one",
    )  # fmt: skip


def robot_policy() -> Case:
    """obs, command, h_in, c_in -> actions, h_out, c_out; an LSTM operator, no dynamic axes."""
    net = Net(13)
    x = net.op("Concat", "obs", "command", axis=1)
    x = net.op("Unsqueeze", net.op("Elu", net.linear(x, 14, 16)), net.const([0]))
    w, r, b = (
        net.weight(1, 4 * 24, 16, scale=0.2),
        net.weight(1, 4 * 24, 24, scale=0.2),
        net.weight(1, 8 * 24, scale=0.1),
    )
    y, _, _ = net.ops("LSTM", x, w, r, b, "", "h_in", "c_in", outs=["hidden", "h_out", "c_out"], hidden_size=24)
    net.linear(net.op("Squeeze", y, net.const([0, 1])), 24, 3, out="actions")
    state = ("float32", [1, 1, 24])
    model = net.model(
        {"obs": ("float32", [1, 11]), "command": ("float32", [1, 3]), "h_in": state, "c_in": state},
        {"actions": ("float32", [1, 3]), "h_out": state, "c_out": state},
    )
    return Case(
        "robot_policy", model, {"obs": Row("float32", (11,)), "command": Row("float32", (3,))}, {"actions": Row("float32", (3,))},
        {"h_in": "h_out", "c_in": "c_out"}, {"h_in": zeros(1, 1, 24), "c_in": zeros(1, 1, 24)},
    )  # fmt: skip


def state_space() -> Case:
    """conv and ssm states, and the time since the last input as a second input."""
    net = Net(14)
    width, depth = 16, 8
    x = net.linear("u", 5, width)
    kept = net.tail("conv_state", net.op("Unsqueeze", x, net.const([2])), 4, 2, out="conv_state_out")  # [B, 16, 4]
    x = net.op("ReduceSum", net.op("Mul", kept, net.weight(width, 4, scale=0.5)), net.const([2]), keepdims=0)
    x = net.op("Mul", x, net.op("Sigmoid", x))
    step = net.op("Mul", net.op("Softplus", net.linear(x, width, width)), net.op("Exp", "time_gap"))  # [B, 16]
    step = net.op("Unsqueeze", step, net.const([2]))
    decay = net.op("Exp", net.op("Neg", net.op("Mul", step, net.const(np.linspace(0.5, 2, depth)))))
    drive = net.op("Mul", step, net.op("Unsqueeze", net.linear(x, width, depth), net.const([1])))
    drive = net.op("Mul", drive, net.op("Unsqueeze", x, net.const([2])))
    state = net.op("Add", net.op("Mul", "ssm_state", decay), drive, out="ssm_state_out")  # [B, 16, 8]
    read = net.op("Unsqueeze", net.linear(x, width, depth), net.const([1]))
    net.linear(net.op("ReduceSum", net.op("Mul", state, read), net.const([2]), keepdims=0), width, 2, out="y")
    conv, ssm = ("float32", ["batch", width, 4]), ("float32", ["batch", width, depth])
    model = net.model(
        {"u": ("float32", ["batch", 5]), "time_gap": ("float32", ["batch", 1]), "conv_state": conv, "ssm_state": ssm},
        {"y": ("float32", ["batch", 2]), "conv_state_out": conv, "ssm_state_out": ssm},
    )
    return Case(
        "state_space", model, {"u": Row("float32", (5,)), "time_gap": Row("float32", (1,))}, {"y": Row("float32", (2,))},
        {"conv_state": "conv_state_out", "ssm_state": "ssm_state_out"},
        {"conv_state": zeros(1, width, 4), "ssm_state": zeros(1, width, depth)},
    )  # fmt: skip


def quantised() -> Case:
    """int8 with a scale that DynamicQuantizeLinear takes from the whole batch: rows leak into each other."""
    net = Net(15)
    x = net.op("Concat", "x", "h", axis=1)
    whole, scale, zero = net.ops("DynamicQuantizeLinear", x, outs=["quantised", "scale", "zero"])
    weights = net.const(np.random.default_rng(15).integers(-90, 90, (22, 16)), np.int8)
    product = net.op("Cast", net.op("MatMulInteger", whole, weights, zero), to=TensorProto.FLOAT)
    net.op("Tanh", net.op("Mul", product, net.op("Mul", scale, net.const(0.01))), out="h_next")
    net.linear("h_next", 16, 3, out="y")
    state = ("float32", ["batch", 16])
    model = net.model({"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 3]), "h_next": state})
    return Case(
        "quantised", model, {"x": Row("float32", (6,))}, {"y": Row("float32", (3,))}, {"h": "h_next"}, {"h": zeros(1, 16)},
        batch="one-by-one",
    )  # fmt: skip


def scalar_counter() -> Case:
    """A counter without a batch axis, which rows of one call have in common, beside a state that has one."""
    net = Net(16)
    place = net.op("Sin", net.op("Cast", "pos", to=TensorProto.FLOAT))
    x = net.op("Add", net.linear("x", 6, 12), place)
    net.op("Tanh", net.op("Add", x, net.op("MatMul", "h", net.weight(12, 12))), out="h_next")
    net.op("Add", "pos", net.const(1), out="pos_next")
    net.linear("h_next", 12, 3, out="y")
    state = ("float32", ["batch", 12])
    model = net.model(
        {"x": ("float32", ["batch", 6]), "h": state, "pos": ("int64", [])},
        {"y": ("float32", ["batch", 3]), "h_next": state, "pos_next": ("int64", [])},
    )
    return Case(
        "scalar_counter", model, {"x": Row("float32", (6,))}, {"y": Row("float32", (3,))}, {"h": "h_next", "pos": "pos_next"},
        {"h": zeros(1, 12), "pos": np.array(0)},
    )  # fmt: skip


def brain_float() -> Case:
    """A bfloat16 state, which NumPy has only as bits."""
    net = Net(17)
    old = net.op("Cast", "h", to=TensorProto.FLOAT)
    new = net.op("Tanh", net.op("Add", net.linear("x", 6, 12), net.op("MatMul", old, net.weight(12, 12))))
    net.op("Cast", new, to=TensorProto.BFLOAT16, out="h_next")
    net.linear(new, 12, 3, out="y")
    state = ("bfloat16", ["batch", 12])
    model = net.model({"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 3]), "h_next": state})
    return Case(
        "brain_float", model, {"x": Row("float32", (6,))}, {"y": Row("float32", (3,))}, {"h": "h_next"},
        {"h": zeros(1, 12, dtype=np.uint16)},
    )  # fmt: skip


def small_types() -> Case:
    """bool, uint8 and int8 inputs, outputs of small types too, and an int16 state."""
    net = Net(18)
    parts = [net.op("Cast", name, to=TensorProto.FLOAT) for name in ("mask", "pixels", "offsets")]
    x = net.op(
        "Add",
        net.op("Mul", net.op("Mul", parts[1], net.const(1 / 255)), parts[0]),
        net.op("Mul", parts[2], net.const(0.1)),
    )
    old = net.op("Mul", net.op("Cast", "memory", to=TensorProto.FLOAT), net.const(1 / 1000))
    new = net.op("Tanh", net.op("Add", net.linear(x, 8, 8), net.op("MatMul", old, net.weight(8, 8))))
    net.op("Cast", net.op("Round", net.op("Mul", new, net.const(1000.0))), to=TensorProto.INT16, out="memory_next")
    net.op("Greater", new, net.const(0.0), out="active")
    net.op("Cast", net.op("Round", net.op("Mul", new, net.const(100.0))), to=TensorProto.INT8, out="level")
    net.op("ArgMax", new, axis=1, keepdims=0, out="best")
    state = ("int16", ["batch", 8])
    model = net.model(
        {"mask": ("bool", ["batch", 8]), "pixels": ("uint8", ["batch", 8]), "offsets": ("int8", ["batch", 8]), "memory": state},
        {"active": ("bool", ["batch", 8]), "level": ("int8", ["batch", 8]), "best": ("int64", ["batch"]), "memory_next": state},
    )  # fmt: skip
    return Case(
        "small_types", model,
        {"mask": Row("bool", (8,)), "pixels": Row("uint8", (8,)), "offsets": Row("int8", (8,))},
        {"active": Row("bool", (8,)), "level": Row("int8", (8,)), "best": Row("int64", ())},
        {"memory": "memory_next"}, {"memory": zeros(1, 8, dtype=np.int16)}, integers={"pixels": 256, "offsets": 20},
    )  # fmt: skip


def time_first() -> Case:
    """[T, N, 6]: the first dimension is time, and as free as the batch is."""
    net = Net(19)
    w, r, b = (
        net.weight(1, 3 * 12, 6, scale=0.3),
        net.weight(1, 3 * 12, 12, scale=0.3),
        net.weight(1, 6 * 12, scale=0.1),
    )
    y, _ = net.ops("GRU", "frames", w, r, b, "", "h0", outs=["all", "hn"], hidden_size=12)
    net.linear(net.op("Squeeze", y, net.const([1])), 12, 3, out="scores")
    state = ("float32", [1, "N", 12])
    model = net.model(
        {"frames": ("float32", ["T", "N", 6]), "h0": state}, {"scores": ("float32", ["T", "N", 3]), "hn": state}
    )
    return Case(
        "time_first", model, {"frames": Row("float32", (4, 6), 1)}, {"scores": Row("float32", (4, 3), 1)},
        {"h0": "hn"}, {"h0": zeros(1, 1, 12)}, flags=("--shape", "T=4"),
    )  # fmt: skip


def endless() -> Case:
    """A loop of 2^62 rounds."""
    net = Net(20)
    body = Net(21, "body")
    body.op("Identity", "go", out="go_on")
    body.op("Tanh", "value", out="value_next")
    ins = _values({"round": ("int64", []), "go": ("bool", []), "value": ("float32", None)})
    graph = helper.make_graph(
        body.nodes, "body", ins, _values({"go_on": ("bool", []), "value_next": ("float32", None)})
    )
    new = net.op("Tanh", net.op("Add", net.linear("x", 6, 12), "h"), out="h_next")
    net.op("Loop", net.const(1 << 62), "", new, body=graph, out="y")
    state = ("float32", ["batch", 12])
    model = net.model({"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 12]), "h_next": state})
    return Case(
        "endless",
        model,
        {"x": Row("float32", (6,))},
        {"y": Row("float32", (12,))},
        {"h": "h_next"},
        {"h": zeros(1, 12)},
    )


def _unsqueezed(net: Net, x: str) -> str:
    """[N, 4, 12] -> [1, 4, N, 12]"""
    return net.op("Unsqueeze", net.op("Transpose", x, perm=[1, 0, 2]), net.const([0]))


def _for_one(shape: Sequence[Any]) -> tuple[int, ...]:
    return tuple(1 if isinstance(size, str) else size for size in shape)


CASES: dict[str, Callable[[], Case]] = {
    "speech_activity": speech_activity,
    "two_states": two_states,
    "streaming_transformer": streaming_transformer,
    "grouped_caches": grouped_caches,
    "encoder_cache": encoder_cache,
    "large_half_state": large_half_state,
    "noise_suppression": noise_suppression,
    "noise_suppression_fixed": lambda: noise_suppression(fixed=True),
    "chain_first": lambda: chain()[0],
    "chain_second": lambda: chain()[1],
    "flat_state": flat_state,
    "robot_policy": robot_policy,
    "state_space": state_space,
    "quantised": quantised,
    "scalar_counter": scalar_counter,
    "brain_float": brain_float,
    "small_types": small_types,
    "time_first": time_first,
}
"""All that can be served; `endless` cannot."""
