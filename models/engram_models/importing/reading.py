"""Reads a stranger's ONNX file in bounded memory and time, and refuses what cannot be served. For the import command.

Nothing of the graph runs here and no other file is opened: weights are in the file itself, or it is refused. What only a run
can show (a small constant that is expanded to terabytes, a loop without an end) is left to sandbox.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from engram_models.files import read_file
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.interface import DTYPES
from engram_models.importing.tensors import DIM_MAX, RANK_MAX, check_name, check_tensor
from engram_models.importing.topology import check_topology, subgraphs
from engram_models.importing.wire import check_wire

FILE_BYTES_MAX = (1 << 31) - 1  # what protobuf takes
NODES_MAX = 100_000
TENSORS_MAX = 100_000
VALUES_MAX = 2_048  # inputs, and outputs
IR_MIN = 3

ORT_DOMAIN = "com.microsoft"
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", ORT_DOMAIN)
_REACH_FILES = ("EPContext", "Snpe")


def read_model(path: Path, bytes_max: int = FILE_BYTES_MAX) -> ModelProto:
    """The model in the file, checked, its nodes in an order in which they can run. Raises ImportRefusedError."""
    try:
        return parse_model(read_file(path, bytes_max))
    except OSError as error:
        raise ImportRefusedError(f"{path}: cannot be read: {error.strerror}") from error
    except ImportRefusedError as error:
        raise ImportRefusedError(f"{path}: {error}") from error


def parse_model(data: bytes) -> ModelProto:
    """As read_model, of a file's content."""
    check_wire(data, ModelProto.DESCRIPTOR)  # type: ignore[arg-type]
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ImportRefusedError("it is not an ONNX model, or it is truncated") from None
    check_graph(model)
    return model


def check_graph(model: ModelProto) -> None:
    """Raises ImportRefusedError for whatever cannot be served safely. Sorts the main graph's nodes."""
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ImportRefusedError("it has no graph: it is not an ONNX model, or it is truncated")
    _check_versions(model)
    for text in (model.producer_name, model.producer_version, model.domain, model.graph.name):
        check_name(text, "the model's own name or producer")
    for entry in model.metadata_props:
        check_name(entry.key, "an entry of metadata")
        if not isinstance(entry.value, str):
            raise ImportRefusedError(f"the metadata entry {shown(entry.key)} is not UTF-8")
    if model.functions:
        raise ImportRefusedError(
            f"it has functions of its own ({shown(model.functions[0].name)}); inline them: onnx.inliner.inline_local_functions"
        )
    if model.training_info:
        raise ImportRefusedError("it carries training information; export it for inference")
    graphs = list(_graphs(model.graph))
    if sum(len(graph.node) for graph in graphs) > NODES_MAX:
        raise ImportRefusedError(f"it has more than {NODES_MAX} nodes")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    for graph in graphs:
        _check_nodes(graph, opset)
        _check_tensors(graph)
    _check_values(model.graph)
    check_topology(model.graph)


def _check_versions(model: ModelProto) -> None:
    if not IR_MIN <= model.ir_version <= onnx.IR_VERSION:
        raise ImportRefusedError(
            f"its IR version is {model.ir_version}; {IR_MIN} to {onnx.IR_VERSION} are read: export it with another version of onnx"
        )
    seen: dict[str, int] = {}
    for entry in model.opset_import:
        domain = entry.domain if entry.domain != "ai.onnx" else ""
        if seen.setdefault(domain, entry.version) != entry.version:  # onnx.compose names one twice, with one version
            raise ImportRefusedError(
                f"it names two versions of the operator set {shown(entry.domain)}, {seen[domain]} and {entry.version}"
            )
        newest = onnx.defs.onnx_opset_version() if not domain else 1 << 31
        if not 1 <= entry.version <= newest:
            raise ImportRefusedError(
                f"its operator set is {entry.version}; 1 to {newest} are read: export it with opset_version={min(newest, 21)}"
            )
    if len(seen) < len(model.opset_import):
        del model.opset_import[:]
        model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in seen.items())
    if "" not in seen:
        raise ImportRefusedError("it does not say which ONNX operator set it uses (opset_import)")


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """This one and all in it."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        yield one
        for node in one.node:
            waiting += subgraphs(node.attribute)


def _check_nodes(graph: GraphProto, opset: int) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        check_name(value.name, "a value")
    for node in graph.node:
        check_name(node.name, "a node")
        check_name(node.op_type, "an operator")
        for name in (*node.input, *node.output):
            check_name(name, f"a tensor of operator {shown(node.op_type)}")
        _check_operator(node, opset)
        for attribute in node.attribute:
            check_name(attribute.name, f"an attribute of operator {shown(node.op_type)}")
            if attribute.ref_attr_name:
                raise ImportRefusedError(
                    f"operator {shown(node.op_type)} takes an attribute of a function, and is in none"
                )
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ImportRefusedError(f"operator {shown(node.op_type)} has a sparse tensor; save it dense")


def _check_operator(node: NodeProto, opset: int) -> None:
    op, domain = shown(node.op_type), node.domain
    if domain not in DOMAINS:
        raise ImportRefusedError(
            f"operator {op} is of domain {shown(domain)}: custom operators are not run; export the model with ONNX's own operators"
        )
    if node.op_type in _REACH_FILES:
        raise ImportRefusedError(f"operator {op} may read files; export the model with ONNX's own operators")
    if domain in ("", "ai.onnx"):
        try:
            known = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            raise ImportRefusedError(
                f"operator {op} is not in ONNX's operator set {opset}, which the file says it uses"
            ) from None
        if known.deprecated:
            raise ImportRefusedError(
                f"operator {op} is no longer in ONNX's operator set {opset}, which the file says it uses"
            )


def _check_tensors(graph: GraphProto) -> None:
    if graph.sparse_initializer:
        raise ImportRefusedError("it has sparse initialisers; save them dense")
    if len(graph.initializer) > TENSORS_MAX:
        raise ImportRefusedError(f"it has more than {TENSORS_MAX} initialisers")
    for tensor in graph.initializer:
        if not tensor.name:
            raise ImportRefusedError("it has an initialiser without a name")
        check_name(tensor.name, "an initialiser")
        check_tensor(tensor, f"initialiser {shown(tensor.name)}")
    for node in graph.node:
        for attribute in node.attribute:
            for tensor in ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors):
                check_tensor(
                    tensor, f"the constant of operator {shown(node.op_type)} that makes {shown(_first(node.output))}"
                )


def _check_values(graph: GraphProto) -> None:
    """Inputs and outputs of the main graph: what a session takes, gives and keeps. Initialisers may be among the inputs."""
    weights = {tensor.name for tensor in graph.initializer}
    for what, values in (("input", graph.input), ("output", graph.output)):
        free = [value for value in values if what == "output" or value.name not in weights]
        if len(free) > VALUES_MAX:
            raise ImportRefusedError(f"it has {len(free)} {what}s; at most {VALUES_MAX} are served")
        for value in free:
            _check_value(value, what)
    if not graph.output:
        raise ImportRefusedError("it gives no output")


def _check_value(value: ValueInfoProto, what: str) -> None:
    check_name(value.name, f"an {what}")
    name = f"{what} {shown(value.name)}"
    if not value.name:
        raise ImportRefusedError(f"it has an {what} without a name")
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ImportRefusedError(
            f"{name} is no tensor but {(kind or 'untyped').removesuffix('_type')}; a session takes and keeps tensors"
        )
    if value.type.tensor_type.elem_type not in DTYPES:
        number = value.type.tensor_type.elem_type
        found = next((key.lower() for key, one in TensorProto.DataType.items() if one == number), str(number))
        raise ImportRefusedError(f"{name} is of type {found}; one of {', '.join(DTYPES.values())} is served")
    shape = value.type.tensor_type.shape
    if len(shape.dim) > RANK_MAX or any(
        dim.HasField("dim_value") and not -1 <= dim.dim_value < DIM_MAX for dim in shape.dim
    ):
        raise ImportRefusedError(f"{name} has impossible dimensions")
    for dim in shape.dim:
        check_name(dim.dim_param, f"a dimension of {name}")


def _first(names: Sequence[str]) -> str:
    return names[0] if names else ""
