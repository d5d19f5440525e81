"""Somebody's .onnx file may be broken, or made to break whoever reads it: one line, in bounded memory and time, no other file read."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from zoo import Net, scalar_counter, speech_activity, state_space

from engram_models.importing.errors import LINE_MAX, ImportRefusedError
from engram_models.importing.proof import prove
from engram_models.importing.reading import parse_model, read_model
from engram_models.spec import Schema, TensorSpec

SECONDS_MAX = 20.0  # of one refusal, on a machine that others use too
SCHEMA = Schema(
    (TensorSpec("x", "float32", (6,)),), (TensorSpec("y", "float32", (12,)),), (TensorSpec("h", "float32", (12,), "recurrent"),)
)  # fmt: skip


def model() -> ModelProto:
    """As small as one can be served."""
    net = Net(1)
    new = net.op("Tanh", net.op("Add", net.linear("x", 6, 12), "h"), out="h_next")
    net.op("Relu", new, out="y")
    state = ("float32", ["batch", 12])
    return net.model({"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 12]), "h_next": state})


def refused(data: bytes | ModelProto) -> str:
    """Why it is refused, after it was seen that this is one line and took no time."""
    started = time.monotonic()
    with pytest.raises(ImportRefusedError) as caught:
        parse_model(data if isinstance(data, bytes) else data.SerializeToString())
    assert time.monotonic() - started < SECONDS_MAX
    return one_line(caught.value)


def one_line(error: ImportRefusedError) -> str:
    text = str(error)
    assert text.isprintable()
    assert len(text) <= LINE_MAX + 3
    return text


@pytest.mark.parametrize("make", [speech_activity, state_space])
def test_a_file_that_is_cut_off_anywhere_is_refused(make: Callable[[], object]) -> None:
    data = make().model.SerializeToString()  # type: ignore[attr-defined]
    parse_model(data)
    for length in {*range(64), *range(0, len(data), len(data) // 150), *range(len(data) - 32, len(data))}:
        # A cut between two fields may leave a model that is whole but for the fields after it: that must then be a good one.
        try:
            found = parse_model(data[:length])
        except ImportRefusedError as error:
            one_line(error)
        else:
            onnx.checker.check_model(found)


def test_flipped_bytes_are_refused_or_leave_what_can_be_read() -> None:
    data = scalar_counter().model.SerializeToString()
    generator = np.random.default_rng(7)
    for _ in range(1500):
        spoilt = bytearray(data)
        for place in generator.integers(0, len(data), generator.integers(1, 4)):
            spoilt[place] = generator.integers(0, 256)
        try:
            parse_model(bytes(spoilt))
        except ImportRefusedError as error:
            one_line(error)


def test_what_is_no_model_at_all_is_refused(tmp_path: Path) -> None:
    for data in (
        b"",
        b"\0",
        b"hello, I am text\n" * 40,
        b"PK\x03\x04" + bytes(100),
        os.urandom(4096),
        b"\x08\x08",
        b"\xff" * 64,
    ):
        assert "not an ONNX model" in refused(data) or "IR version" in refused(data)
    os.mkfifo(tmp_path / "pipe.onnx")
    for path, message in (
        (tmp_path, "a directory"), (tmp_path / "none.onnx", "No such file"), (tmp_path / "pipe.onnx", "a named pipe"),
    ):  # fmt: skip
        with pytest.raises(ImportRefusedError, match=message):
            read_model(path)
    (tmp_path / "large.onnx").write_bytes(bytes(100))
    with pytest.raises(ImportRefusedError, match="100 bytes; at most 99 are read"):
        read_model(tmp_path / "large.onnx", 99)


def _initialiser(change: Callable[[TensorProto], object]) -> Callable[[ModelProto], None]:
    return lambda model: (change(model.graph.initializer[0]), None)[1]


def _external(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _ten_gigabytes(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.dims[:] = [50_000, 50_000]


def _constant(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "c")
    _external(tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _branch(model: ModelProto) -> None:
    """Weights of another file, in a graph in the graph."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "c")
    _external(tensor)
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("c", 1, [4])], [tensor])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))


def _circle(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["round", "x"], ["and_round"]))
    model.graph.node.append(helper.make_node("Tanh", ["and_round"], ["round"]))


def _circle_through_a_branch(model: ModelProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("Tanh", ["outside"], ["inside"])],
        "inner",
        [],
        [helper.make_tensor_value_info("inside", 1, None)],
    )
    model.graph.node.append(helper.make_node("If", ["x"], ["outside"], then_branch=inner, else_branch=inner))


def _function(model: ModelProto) -> None:
    model.functions.append(
        helper.make_function("own", "Mine", ["a"], ["b"], [helper.make_node("Tanh", ["a"], ["b"])], model.opset_import)
    )


def _input(dtype: int) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info("more", dtype, ["batch"]))


def _sequence(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_sequence_value_info("more", TensorProto.FLOAT, None))


def _optional(model: ModelProto) -> None:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1]))
    model.graph.input.append(helper.make_value_info("more", kind))


def _sparse(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "indices"), [1 << 40])
    )


def _node(*arguments: object, **attributes: object) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.node.append(helper.make_node(*arguments, **attributes))  # type: ignore[arg-type]


def _twice(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Tanh", ["x"], ["y"]))


def _renamed(name: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.input[0].name = name
        for node in model.graph.node:
            node.input[:] = [name if one == "x" else one for one in node.input]

    return change


REFUSED: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "external data": (_initialiser(_external), "is in another file, which is not opened; put the weights inline: torch.onnx.export(..., external_data=False), or onnx.save("),
    "external data of a constant": (_constant, "is in another file, which is not opened"),
    "external data in a branch": (_branch, "is in another file, which is not opened"),
    "10 GB that are not there": (_initialiser(_ten_gigabytes), "has 0 numbers; its dimensions 50000x50000 ask for 2500000000"),
    "too few bytes": (_initialiser(lambda t: setattr(t, "raw_data", t.raw_data[:-1])), "bytes; its dimensions 6x12 ask for 288"),
    "too many bytes": (_initialiser(lambda t: setattr(t, "raw_data", t.raw_data * 2)), "bytes; its dimensions 6x12 ask for 288"),
    "a negative size": (_initialiser(lambda t: t.dims.append(-1)), "impossible dimensions"),
    "sizes whose product overflows": (_initialiser(lambda t: t.dims.extend([1 << 30] * 6)), "ask for"),
    "sizes without end": (_initialiser(lambda t: t.dims.extend([1] * 100)), "impossible dimensions"),
    "numbers twice": (_initialiser(lambda t: t.float_data.extend([0.0] * 72)), "numbers in raw_data and in float_data"),
    "strings as weights": (_initialiser(lambda t: setattr(t, "data_type", TensorProto.STRING)), "of type STRING"),
    "an unknown type": (_initialiser(lambda t: setattr(t, "data_type", 99)), "of type UNDEFINED"),
    "a part of a tensor": (_initialiser(lambda t: t.segment.SetInParent()), "which is not served"),
    "sparse weights": (_sparse, "sparse initialisers"),
    "a custom operator": (_node("Steal", ["x"], ["z"], domain="evil.ops"), "'Steal' is of domain 'evil.ops': custom operators"),
    "an operator that reads files": (_node("EPContext", ["x"], ["z"], domain="com.microsoft"), "'EPContext' may read files"),
    "an operator that is none": (_node("Tnah", ["x"], ["z"]), "'Tnah' is not in ONNX's operator set 18"),
    "a function": (_function, "functions of its own ('Mine'); inline them"),
    "an attribute of a function": (
        lambda m: m.graph.node[0].attribute.add(name="a", ref_attr_name="b", type=1), "attribute of a function",
    ),
    "training": (lambda m: m.training_info.add(), "export it for inference"),
    "a circle": (_circle, "runs in a circle: operator 'Add' waits"),
    "a circle through a branch": (_circle_through_a_branch, "runs in a circle: operator 'If' waits"),
    "a name made twice": (_twice, "'y' is made twice"),
    "two inputs of one name": (lambda m: m.graph.input.append(m.graph.input[0]), "two inputs have the name 'x'"),
    "two initialisers of one name": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two initialisers have the name"),
    "a name that nobody makes": (_node("Tanh", ["nowhere"], ["z"]), "'Tanh' takes 'nowhere', which nothing makes"),
    "an output that nobody makes": (lambda m: m.graph.output.add(name="z"), "output 'z'"),
    "no output": (lambda m: m.graph.ClearField("output"), "gives no output"),
    "control characters": (_renamed("x\x1b[2J"), r"control characters: 'x\x1b[2J'"),
    "letters that turn the line round": (_renamed("x\u202eonnx"), "control characters"),
    "a name of a megabyte": (_renamed("x" * (1 << 20)), "has 1048576 characters; at most 1024 are read"),
    "an empty name": (_renamed(""), "an input without a name"),
    "strings": (_input(TensorProto.STRING), "input 'more' is of type string"),
    "a type that is not served": (_input(TensorProto.COMPLEX64), "input 'more' is of type complex64; one of float16"),
    "a sequence": (_sequence, "input 'more' is no tensor but sequence"),
    "an optional input": (_optional, "input 'more' is no tensor but optional"),
    "a newer operator set": (lambda m: setattr(m.opset_import[0], "version", 99), "operator set is 99; 1 to"),
    "no operator set": (lambda m: m.ClearField("opset_import"), "which ONNX operator set"),
    "two operator sets": (
        lambda m: m.opset_import.add(domain="", version=17), "two versions of the operator set '', 18 and 17",
    ),
    "a newer file format": (lambda m: setattr(m, "ir_version", 99), "IR version is 99; 3 to"),
    "too many inputs": (
        lambda m: m.graph.input.extend(helper.make_tensor_value_info(f"i{n}", 1, [1]) for n in range(3000)), "3002 inputs; at most 2048",
    ),
    "too many nodes": (
        lambda m: m.graph.node.extend(helper.make_node("Tanh", ["x"], [f"n{n}"]) for n in range(100_001)), "more than 100000 nodes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_each_of_these_is_refused_in_words(case: str) -> None:
    spoil, message = REFUSED[case]
    spoilt = model()
    parse_model(spoilt.SerializeToString())
    spoil(spoilt)
    assert message in refused(spoilt)


def test_names_that_are_not_utf_8() -> None:
    data = model().SerializeToString()
    assert "is not UTF-8" in refused(data.replace(b"h_next", b"h_\xff\xfext"))
    assert "is not UTF-8" in refused(data.replace(b"a-trainer", b"a-\xff\xfeainer"))


def test_nodes_in_any_order_are_sorted_and_not_refused() -> None:
    mixed = model()
    nodes = list(mixed.graph.node)[::-1]
    del mixed.graph.node[:]
    mixed.graph.node.extend(nodes)
    assert [node.op_type for node in parse_model(mixed.SerializeToString()).graph.node] == [
        "MatMul",
        "Add",
        "Add",
        "Tanh",
        "Relu",
    ]


def field(number: int, content: bytes) -> bytes:
    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth: int) -> bytes:
    """Graphs in graphs."""
    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "two million empty nodes": (lambda: field(7, field(1, b"") * 2_000_000), "more than 1000000 fields"),
    "two million fields of nobody": (lambda: field(99, b"") * 2_000_000, "more than 1000000 fields"),
    "a thousand graphs in graphs": (lambda: nested(1_000), "nested more than 20 deep"),
    "packed numbers": (lambda: field(7, field(5, field(7, b"\1" * (80 << 20)))), "more than 64 MB of packed numbers"),
    "a number without an end": (lambda: b"\x08" + b"\xff" * 1_000_000, "not an ONNX model"),
    "a length of 2^63": (lambda: b"\x3a" + b"\xff" * 9 + b"\x01" + bytes(100), "are announced and"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_small_files_do_not_become_large_ones(case: str, tmp_path: Path) -> None:
    """In a process of its own, which may take little memory beside the file."""
    make, message = BOMBS[case]
    (tmp_path / "bomb.onnx").write_bytes(make())
    script = (
        "import resource, sys, pathlib\n"
        "from engram_models.importing.reading import read_model\n"
        "from engram_models.importing.errors import ImportRefusedError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_model(pathlib.Path(sys.argv[1]))\n"
        "except ImportRefusedError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb.onnx")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said, kilobytes = done.stdout.splitlines()
    assert message in said, done.stderr
    assert int(kilobytes) < 200_000


def test_no_file_is_read_outside(tmp_path: Path) -> None:
    """Wherever a file names another one: it is refused, and the other one was never opened."""
    (tmp_path / "inside").mkdir()
    canary = tmp_path / "canary.bin"
    canary.write_bytes(np.ones(72, np.float32).tobytes())
    os.utime(canary, (1, 1))
    for location in ("../canary.bin", str(canary), "canary.bin"):
        spoilt = model()
        _external(spoilt.graph.initializer[0])
        spoilt.graph.initializer[0].external_data[0].value = location
        path = tmp_path / "inside" / "model.onnx"
        path.write_bytes(spoilt.SerializeToString())
        with pytest.raises(ImportRefusedError, match="in another file"):
            read_model(path)
        with pytest.raises(ImportRefusedError) as caught:  # by whoever did not read it with read_model
            prove(spoilt.SerializeToString(), SCHEMA, {}, seconds=30)
        one_line(caught.value)
    assert canary.stat().st_atime == 1
    assert sorted(os.listdir(tmp_path)) == ["canary.bin", "inside"]


def _expanded(net: Net, x: str) -> str:
    """y plus the sum of a terabyte of ones."""
    ones = net.op(
        "ConstantOfShape", net.const([1 << 18, 1 << 20]), value=numpy_helper.from_array(np.ones(1, np.float32))
    )
    return net.op("Add", x, net.op("ReduceSum", ones, keepdims=0), out="y")


def _tiled(net: Net, x: str) -> str:
    tiled = net.op("Tile", x, net.const([1, 1 << 36]))
    return net.op("Slice", tiled, net.const([0]), net.const([12]), net.const([1]), out="y")


def _ranged(net: Net, x: str) -> str:
    total = net.op("ReduceSum", net.op("Range", net.const(0), net.const(1 << 40), net.const(1)), keepdims=0)
    return net.op("Add", x, net.op("Cast", total, to=TensorProto.FLOAT), out="y")


@pytest.mark.parametrize("grow", [_expanded, _tiled, _ranged])
def test_a_graph_that_grows_is_stopped_where_it_runs(grow: Callable[[Net, str], str]) -> None:
    net = Net(1)
    grow(net, net.op("Tanh", net.op("Add", net.linear("x", 6, 12), "h"), out="h_next"))
    state = ("float32", ["batch", 12])
    made = net.model({"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 12]), "h_next": state})
    data = parse_model(made.SerializeToString()).SerializeToString()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(ImportRefusedError, match=r"MB of memory|would require more than") as caught:
        prove(data, SCHEMA, {}, seconds=60)
    one_line(caught.value)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 4_000_000)
