"""Puts a graph together: tensors have names, nodes are appended in order. The modules of the families write through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from engram_models.spec import Schema, TensorSpec

OPSET = 17  # the oldest that has every operator used here
IR_VERSION = 8  # the one of that opset's time


class Graph:
    """A step's graph while it is written. Its floats are all of `dtype`, float32 or float64.

    `inputs` and `states` are the names of the graph's inputs, as the schema has them.
    """

    def __init__(self, schema: Schema, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.element = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.schema = schema
        self.inputs = [spec.name for spec in schema.inputs]
        self.states = [spec.name for spec in schema.state]
        self._nodes: list[onnx.NodeProto] = []
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def weight(self, value: Tensor | NDArray[Any] | float) -> str:
        """A constant of the graph's floats."""
        return self._constant(np.asarray(array(value), self.dtype))

    def double(self, value: NDArray[np.float64]) -> str:
        """A constant of float64, whatever the graph's floats are."""
        return self._constant(np.asarray(value, np.float64))

    def integers(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The output of a node that has one; "" stands for an input that is left out."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """The outputs of a node. All have names: onnx's evaluator takes the value of an output called "" for an input that is."""
        base = self._name(kind.lower())
        names = [f"{base}_{place}" for place in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=base, **attributes))
        return names

    def cast(self, value: str, to: np.dtype[Any] | type[Any]) -> str:
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(to)))

    def slice(self, value: str, axis: int, start: int, stop: int) -> str:
        """value[..., start:stop] along an axis."""
        return self.op("Slice", value, self.integers(start), self.integers(stop), self.integers(axis))

    def zero(self) -> onnx.TensorProto:
        return numpy_helper.from_array(np.zeros(1, self.dtype))

    def scan(
        self,
        step: Callable[[str, Sequence[str]], Sequence[str]],
        xs: tuple[str, int],
        states: Sequence[tuple[str, int]],
    ) -> list[str]:
        """A loop over xs [time, batch, width]; the names stand with their widths.

        `step` writes the nodes of one turn: (x, states) -> new states, all [batch, width]. -> the states after all turns.
        """
        outer, self._nodes = self._nodes, []
        befores, x = [self._name("state") for _ in states], self._name("x")
        afters = [self.op("Identity", after) for after in step(x, befores)]
        widths = [width for _, width in states]
        body = helper.make_graph(
            self._nodes,
            self._name("turn"),
            [self._flat(name, width) for name, width in zip([*befores, x], [*widths, xs[1]], strict=True)],
            [self._flat(name, width) for name, width in zip(afters, widths, strict=True)],
        )
        self._nodes = outer
        before = [name for name, _ in states]
        return self.ops("Scan", *before, xs[0], outputs=len(states), body=body, num_scan_inputs=1)

    def reversed(self, value: str) -> str:
        """value[::-1]"""
        last, before_first = self.integers(-1), self.integers(np.iinfo(np.int64).min)
        return self.op("Slice", value, last, before_first, self.integers(0), last)

    def model(self, outputs: Sequence[str], states: Sequence[str]) -> onnx.ModelProto:
        """The finished model. `outputs` and `states`: which tensors are the schema's outputs and changing states."""
        changing = self.schema.changing
        names = [spec.name for spec in self.schema.outputs] + [f"next_{spec.name}" for spec in changing]
        self._name_outputs([*outputs, *states], names)
        graph = helper.make_graph(
            self._nodes,
            "step",
            [self._described(spec.name, spec) for spec in (*self.schema.inputs, *self.schema.state)],
            [
                self._described(name, spec)
                for name, spec in zip(names, (*self.schema.outputs, *changing), strict=True)
            ],
            list(self._constants.values()),
        )  # fmt: skip
        model = helper.make_model(graph, producer_name="engram", opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        return model

    def _name_outputs(self, tensors: Sequence[str], names: Sequence[str]) -> None:
        """Calls each tensor by its name as an output; one that has a name already, or comes from outside, is copied."""
        renamed = {name: name for name in (*self.inputs, *self.states)}
        for tensor, name in zip(tensors, names, strict=True):
            if tensor in renamed:
                self._nodes.append(helper.make_node("Identity", [tensor], [name]))
            else:
                renamed[tensor] = name
        for node in self._nodes:
            for tensors_of_node in (node.input, node.output):
                for place, tensor in enumerate(tensors_of_node):
                    tensors_of_node[place] = renamed.get(tensor, tensor)

    def _name(self, base: str) -> str:
        self._count += 1
        return f"{base}_{self._count}"

    def _flat(self, name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.element, ["batch", width])

    def _constant(self, value: NDArray[Any]) -> str:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(
                np.ascontiguousarray(value), f"weight_{len(self._constants)}"
            )
        return self._constants[key].name

    def _described(self, name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
        element = self.element if spec.is_float else helper.np_dtype_to_tensor_dtype(spec.np_dtype)
        shape: list[str | int | None] = [*spec.shape] if spec.shared else ["batch", *spec.shape]
        return helper.make_tensor_value_info(name, element, shape)


def array(value: Tensor | NDArray[Any] | float) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
