"""What a graph takes and gives as its file says it: names, types, dimensions. Read by roles.py and the normal form."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from engram_models.importing.errors import ImportRefusedError, shown

Dim = int | str  # a size, or the name of a dynamic dimension; "?" and a place where the file gives no name

DTYPES: dict[int, str] = {
    TensorProto.FLOAT16: "float16", TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8", TensorProto.INT16: "int16", TensorProto.INT32: "int32", TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8", TensorProto.BOOL: "bool",
}  # fmt: skip
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "bool")
RANK_MAX = 16
TENSORS_MAX = 4096
_FX_NODE = "pkg.torch.onnx.fx_node"  # an entry of a node's metadata: "%sum_1 : [num_users=1] = call_function[...]"
_PART = re.compile(r"getitem(_\d+)?")  # of what gives several tensors


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """An input or output of the graph. `dims` is None where the file does not say its rank."""

    name: str
    dtype: str
    dims: tuple[Dim, ...] | None
    default: bool = False  # an initializer of the same name gives its value where nothing else does
    mute: bool = False  # torch's exporter has named it after an operator: `sum_1` is no next value of `sum`

    @property
    def whole(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def one_element(self) -> bool:
        return self.dims is not None and all(dim == 1 for dim in self.dims)

    @property
    def shape_words(self) -> str:
        return "unknown" if self.dims is None else "x".join(dim_words(dim) for dim in self.dims) or "scalar"


@dataclass(frozen=True, slots=True)
class Interface:
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]

    @staticmethod
    def of(model: onnx.ModelProto) -> Interface:
        """Raises ImportRefusedError for what no session can have: tensors of strings, sequences, names that are not printable."""
        initializers = {tensor.name for tensor in model.graph.initializer}
        inputs = tuple(_tensor(value, "input", value.name in initializers) for value in model.graph.input)
        mute = _named_after_operators(model.graph)
        outputs = tuple(_tensor(value, "output", False, value.name in mute) for value in model.graph.output)
        if len(inputs) - len(initializers) > TENSORS_MAX or len(outputs) > TENSORS_MAX:
            raise ImportRefusedError(
                f"it has {len(inputs)} inputs and {len(outputs)} outputs; at most {TENSORS_MAX} can be served"
            )
        return Interface(inputs, outputs)


def dim_words(dim: Dim) -> str:
    return "?" if isinstance(dim, str) and dim.startswith("?") else str(dim)


def unnamed(dim: Dim) -> bool:
    return isinstance(dim, str) and dim.startswith("?")


def _named_after_operators(graph: onnx.GraphProto) -> set[str]:
    found: set[str] = set()
    for node in graph.node:
        said = next((entry.value for entry in node.metadata_props if entry.key == _FX_NODE), "")
        if said:
            own = str(said).partition(" ")[0].removeprefix("%")  # what is not UTF-8 comes as bytes
            found.update(name for name in node.output if name == own or _PART.fullmatch(name))
    return found


def _tensor(value: onnx.ValueInfoProto, kind: str, default: bool, mute: bool = False) -> GraphTensor:
    name = value.name
    if not name or not name.isprintable() or len(name) > 200:
        raise ImportRefusedError(
            f"the {kind} {shown(name)}: a name has 1 to 200 printable characters; rename it (onnx.compose.add_prefix)"
        )
    which = value.type.WhichOneof("value")
    if which != "tensor_type":
        raise ImportRefusedError(
            f"the {kind} {shown(name)} is a {(which or 'nothing').removesuffix('_type')}; a session has tensors alone"
        )
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if dtype is None:
        kinds = TensorProto.DataType.items()
        found = next((word.lower() for word, number in kinds if number == tensor.elem_type), f"type {tensor.elem_type}")
        raise ImportRefusedError(f"the {kind} {shown(name)} is of {found}; served are {', '.join(DTYPES.values())}")
    if not tensor.HasField("shape"):
        return GraphTensor(name, dtype, None, default, mute)
    if len(tensor.shape.dim) > RANK_MAX:
        raise ImportRefusedError(
            f"the {kind} {shown(name)} has {len(tensor.shape.dim)} dimensions; at most {RANK_MAX} are served"
        )
    dims = tuple(_dim(dim, name, place) for place, dim in enumerate(tensor.shape.dim))
    return GraphTensor(name, dtype, dims, default, mute)


def _dim(dim: onnx.TensorShapeProto.Dimension, name: str, place: int) -> Dim:
    which = dim.WhichOneof("value")
    if which == "dim_param" and dim.dim_param and not dim.dim_param.startswith("?"):
        if not dim.dim_param.isprintable():
            raise ImportRefusedError(f"dimension {place} of {shown(name)} has a name that is not printable")
        return str(dim.dim_param[:80])
    if which == "dim_value" and dim.dim_value > 0:  # exporters write -1 and 0 where they mean any size
        return int(dim.dim_value)
    return f"?{name}.{place}"
