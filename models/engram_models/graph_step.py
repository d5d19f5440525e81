"""A bundle's step on ONNX Runtime: one thread, no spinning. For the runtime, the probe, the recorded check and the import."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engram_models.batching import Batching
from engram_models.spec import Schema, TensorSpec

Arrays = Sequence[NDArray[Any]]

_FATAL = 4  # of ONNX Runtime's levels of logging: what is wrong comes as an exception too
_BFLOAT16 = 16  # of onnx's numbers of types
_ONNX_TYPES = {"float32": "float", "float64": "double"}  # others are called alike


class GraphError(Exception):
    """A graph that ONNX Runtime does not take, or that is not what its schema says. One line."""


class GraphStep:
    """(inputs, states) -> (outputs, new states), batch first, any number of rows; the graph is in the bundles' normal form.

    Shared tensors have a row each here; rows whose values differ are given to the graph in calls of their own. Calls are filled
    up to what `batching` says with rows that are there already. Safe to be called by several threads at once.
    """

    def __init__(self, graph: bytes | str, schema: Schema, batching: Batching = Batching()) -> None:
        """`graph`: itself, or the path of its file. Raises GraphError."""
        self.schema = schema
        self.batching = batching
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = _FATAL
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has many, and no common root
            raise GraphError(f"ONNX Runtime does not take it: {_line(error)}") from error
        self._given = [*schema.inputs, *schema.state]
        self._outcomes = [*schema.outputs, *schema.changing]
        self._inputs = self._checked("inputs", self._session.get_inputs(), self._given)
        self._outputs = self._checked("outputs", self._session.get_outputs(), self._outcomes)
        # What `run` comes down to, without its checks of what a graph on another device was recorded with.
        self._call = getattr(self._session, "_sess", self._session).run
        self._shapes: tuple[int, list[tuple[int, ...]]] = (0, [])  # of outcomes, for the number of rows that came last
        self._constant = len(schema.changing) < len(schema.state)
        self._raw = any(spec.dtype == "bfloat16" for spec in [*self._given, *self._outcomes])
        self._whole = not schema.shared and batching.floor is not None

    def __call__(
        self, inputs: Arrays, states: Arrays, options: Any = None
    ) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        """inputs and states [n, *shape] each, contiguous, in schema order -> outputs, states alike; constants are those given.

        `options`: ONNX Runtime's RunOptions, through which another thread may stop the run. Raises what ONNX Runtime raises, and
        GraphError where the outcomes are not as many rows.
        """
        given, rows = [*inputs, *states], len(inputs[0])
        if self._whole and rows % (self.batching.floor or 1) == 0:
            outcomes = self._fitting(self._run(given, options), rows)
        else:
            outcomes = self._parted(given, rows, options)
        outputs, after = outcomes[: len(self.schema.outputs)], outcomes[len(self.schema.outputs) :]
        if not self._constant:
            return outputs, after
        changed = iter(after)
        specs = self.schema.state
        return outputs, [old if s.role == "constant" else next(changed) for old, s in zip(states, specs, strict=True)]

    def _parted(self, given: Arrays, rows: int, options: Any) -> list[NDArray[Any]]:
        """In several calls, of rows that may be in one."""
        wholes = [np.empty((rows, *spec.shape), spec.np_dtype) for spec in self._outcomes]
        for group in self._groups(given, rows):
            for start, stop, padded in self.batching.cut(len(group)):
                part = group[start:stop]
                index = np.concatenate((part, np.repeat(part[:1], padded - len(part)))) if padded > len(part) else part
                values = [
                    np.asarray(array[part[0]], order="C") if spec.shared else array[index]
                    for array, spec in zip(given, self._given, strict=True)
                ]
                results = self._fitting(self._run(values, options), len(index))
                for whole, spec, new in zip(wholes, self._outcomes, results, strict=True):
                    whole[part] = new if spec.shared else new[: len(part)]
        return wholes

    def _groups(self, given: Arrays, rows: int) -> Iterator[NDArray[np.intp]]:
        """Rows whose shared tensors are equal."""
        shared = [given[len(self.schema.inputs) + place].reshape(rows, -1) for place in self.schema.shared]
        words = np.concatenate([np.ascontiguousarray(one).view(np.uint8) for one in shared], 1) if shared else None
        if words is None or (words == words[0]).all():
            yield np.arange(rows)
            return
        _, which = np.unique(words, axis=0, return_inverse=True)
        which = which.reshape(-1)
        for number in range(int(which.max()) + 1):
            yield np.flatnonzero(which == number)

    def _run(self, values: Sequence[NDArray[Any]], options: Any) -> list[NDArray[Any]]:
        if self._raw:
            return self._run_raw(values, options)
        results: list[NDArray[Any]] = self._call(self._outputs, dict(zip(self._inputs, values, strict=True)), options)
        return results

    def _fitting(self, results: list[NDArray[Any]], rows: int) -> list[NDArray[Any]]:
        """The results, if they are of so many rows: a graph may have shapes that follow from numbers. Raises GraphError."""
        known, shapes = self._shapes
        if known != rows:
            shapes = [spec.shape if spec.shared else (rows, *spec.shape) for spec in self._outcomes]
            self._shapes = rows, shapes
        if [result.shape for result in results] == shapes:
            return results
        for result, spec, wanted in zip(results, self._outcomes, shapes, strict=True):
            if result.shape != wanted:
                raise GraphError(f"the graph's {spec.name} came out as {list(result.shape)}, not {list(wanted)}")
        return results

    def _run_raw(self, values: Sequence[NDArray[Any]], options: Any) -> list[NDArray[Any]]:
        """bfloat16, which NumPy has not, goes in and comes out as raw uint16."""
        given = {
            name: _ort_value(np.asarray(value, order="C"), spec)
            for name, value, spec in zip(self._inputs, values, self._given, strict=True)
        }
        results = self._session.run_with_ort_values(self._outputs, given, options)
        return [_bits(result, spec) for result, spec in zip(results, self._outcomes, strict=True)]

    def _checked(self, what: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> list[str]:
        """The graph's names, if types and ranks are those of the schema. Raises GraphError."""
        if len(found) != len(specs):
            raise GraphError(f"the graph has {len(found)} {what}, its schema asks for {len(specs)}")
        for node, spec in zip(found, specs, strict=True):
            wanted = f"tensor({_ONNX_TYPES.get(spec.dtype, spec.dtype)})"
            rank = len(spec.shape) + (not spec.shared)
            if node.type != wanted or (node.shape and len(node.shape) != rank):
                raise GraphError(
                    f"the graph's {node.name!r} is {node.type} of {len(node.shape)} dimensions, "
                    f"its schema asks for {wanted} of {rank}"
                )
        return [node.name for node in found]


def _ort_value(value: NDArray[Any], spec: TensorSpec) -> Any:
    if spec.dtype == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


def _bits(result: Any, spec: TensorSpec) -> NDArray[Any]:
    if spec.dtype != "bfloat16":
        values: NDArray[Any] = result.numpy()
        return values
    raw = ctypes.string_at(result.data_ptr(), result.tensor_size_in_bytes())  # a copy: its NumPy knows no such type
    return np.frombuffer(raw, spec.np_dtype).reshape(result.shape())


def _line(error: Exception) -> str:
    """Of what ONNX Runtime says, the first line, without its own sources' paths."""
    text = str(error).strip().partition("\n")[0]
    return text.rpartition("] : ")[2].strip() or type(error).__name__
