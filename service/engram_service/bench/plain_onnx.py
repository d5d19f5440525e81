"""A model in plain ONNX Runtime: its graph, run on whole batches of arrays. What a server without torch is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engram_models.spec import Schema

Arrays = list[NDArray[Any]]

_OPSET, _IR_VERSION = 17, 8
_ERROR = 3  # of ONNX Runtime's levels of logging


class PlainOnnx:
    """A graph in the normal form of bundles: inputs, then states, bound by position. See bench.types.Plain."""

    name = "ONNX Runtime"

    def __init__(self, graph: bytes, schema: Schema, initial: Callable[[int], Arrays]) -> None:
        """`initial`: the states of so many new sessions, [rows, *shape] each, in schema order."""
        self._graph, self._schema, self._initial = graph, schema, initial
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self._use(1)

    @contextmanager
    def running(self, threads: int) -> Iterator[None]:
        self._use(threads)
        yield
        self._use(1)

    def inputs(self, pool: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
        return list(pool)

    def initial(self, rows: int) -> Arrays:
        pairs = zip(self._initial(rows), self._schema.state, strict=True)
        return [values[0] if spec.shared else values for values, spec in pairs]

    def step(self, x: NDArray[np.float32], state: Arrays) -> tuple[NDArray[Any], Arrays]:
        y, *changed = self._session.run(None, dict(zip(self._names, (x, *state), strict=True)))
        if self._constant:
            new = iter(changed)
            changed = [
                old if spec.role == "constant" else next(new)
                for old, spec in zip(state, self._schema.state, strict=True)
            ]
        return y, changed

    def values(self, y: NDArray[Any]) -> NDArray[np.float32]:
        return y.astype(np.float32, copy=False)

    def _use(self, threads: int) -> None:
        if threads not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.log_severity_level = _ERROR
            self._sessions[threads] = onnxruntime.InferenceSession(self._graph, options, ["CPUExecutionProvider"])
        self._session = self._sessions[threads]
        self._names = [node.name for node in self._session.get_inputs()]
        self._constant = len(self._schema.changing) < len(self._schema.state)


def lstm_graph(weights: Mapping[str, NDArray[np.float32]], schema: Schema) -> bytes:
    """One LSTM with a linear head as the operators that ONNX has for it, from weights named as torch names them."""
    from onnx import TensorProto, helper, numpy_helper

    hidden = weights["weight_hh"].shape[1]
    bias = np.concatenate([_iofc(weights["bias_ih"]), _iofc(weights["bias_hh"])])
    constants = {
        "W": _iofc(weights["weight_ih"])[None], "R": _iofc(weights["weight_hh"])[None], "B": bias[None],
        "head": weights["head.weight"], "head_bias": weights["head.bias"], "axis": np.array([0]),
    }  # fmt: skip
    x, h, c = (spec.name for spec in (*schema.inputs, *schema.state))
    nodes = [helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_1"]) for name in (x, h, c)]
    taken = [f"{x}_1", "W", "R", "B", "", f"{h}_1", f"{c}_1"]
    nodes.append(helper.make_node("LSTM", taken, ["", "after_h", "after_c"], hidden_size=hidden))
    nodes += [helper.make_node("Squeeze", [f"after_{n}", "axis"], [f"next_{old}"]) for n, old in (("h", h), ("c", c))]
    nodes.append(helper.make_node("Gemm", [f"next_{h}", "head", "head_bias"], [schema.outputs[0].name], transB=1))

    def described(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])

    graph = helper.make_graph(
        nodes, "lstm",
        [described(spec.name, *spec.shape) for spec in (*schema.inputs, *schema.state)],
        [*(described(s.name, *s.shape) for s in schema.outputs), *(described(f"next_{s.name}", hidden) for s in schema.state)],
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    written: bytes = model.SerializeToString()
    return written


def _iofc(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gates in ONNX's order; torch has them as i f g o."""
    i, f, g, o = np.split(values, 4)
    return np.concatenate([i, o, f, g])
