"""The nodes of an ONNX graph of rows of float32, while they are put together. Called by keras_steps.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engram_models.importing.keras_file import Array

OPSET = 18
_IR_VERSION = 8  # of the time of that opset


class Nodes:
    """Values are [batch, width], and are known by their names; those made here have a slash in them, a layer's have none."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._arrays: list[Any] = []

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v/{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def split(self, value: str, parts: int) -> list[str]:
        names = [f"v/{len(self._nodes)}/{part}" for part in range(parts)]
        self._nodes.append(helper.make_node("Split", [value], names, axis=1, num_outputs=parts))
        return names

    def product(self, value: str, kernel: Array, bias: Array | None) -> str:
        return self.node("Gemm", value, self.array(kernel), *([] if bias is None else [self.array(bias)]))

    def array(self, array: Any) -> str:
        name = f"w/{len(self._arrays)}"
        self._arrays.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def named(self, value: str, name: str) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name]))

    def write(self, inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]], path: Path) -> None:
        """Inputs and outputs are names with widths."""
        graph = helper.make_graph(self._nodes, "step", list(map(_row, inputs)), list(map(_row, outputs)), self._arrays)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION), str(path)
        )


def _row(tensor: tuple[str, int]) -> Any:
    name, width = tensor
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
