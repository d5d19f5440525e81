"""What is proved of a graph before it is served, and a recorded run that is held against it: each thing that goes wrong is found."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from numpy.typing import NDArray
from onnx import TensorProto
from zoo import Case, Net

from engram_models.batching import ALONE, Batching
from engram_models.check import CHECK_ROWS, CHECK_STEPS
from engram_models.graph_step import GraphStep
from engram_models.importing.arrays import read_arrays
from engram_models.importing.errors import ImportRefusedError
from engram_models.importing.proof import Proof, prove, verify
from engram_models.spec import Schema, TensorSpec

SECONDS = 60.0
DTYPES = {element: dtype for dtype, element in zoo.ELEMENTS.items()}
SCHEMA = Schema(
    (TensorSpec("x", "float32", (6,)),), (TensorSpec("y", "float32", (12,)),), (TensorSpec("h", "float32", (12,), "recurrent"),)
)  # fmt: skip

NORMAL = ("state_space", "large_half_state", "scalar_counter", "brain_float", "small_types", "quantised")
"""Files that are in the normal form as they are."""


def schema_of(case: Case) -> Schema:
    given = {value.name: value.type.tensor_type for value in case.model.graph.input}
    states = []
    for name in case.states:
        dims = [dim.dim_value for dim in given[name].shape.dim]
        role = "counter" if given[name].elem_type == TensorProto.INT64 else "recurrent"
        states.append(TensorSpec(name, DTYPES[given[name].elem_type], tuple(dims[1:]), role, 0.0, not dims))
    rows = [
        tuple(TensorSpec(name, row.dtype, row.shape) for name, row in part.items())
        for part in (case.inputs, case.outputs)
    ]
    return Schema(rows[0], rows[1], tuple(states))


def graph(y: Callable[[Net, str], str], **attributes: Any) -> bytes:
    """h' = tanh(W x + U h), and an output that `y` writes of it."""
    net = Net(3)
    new = net.op("Add", net.linear("x", 6, 12), net.op("MatMul", "h", net.weight(12, 12)))
    y(net, net.op("Tanh", new, out="h_next"))
    state = ("float32", ["batch", 12])
    return net.model(
        {"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 12]), "h_next": state}, **attributes
    ).SerializeToString()


def proof_of(y: Callable[[Net, str], str]) -> Proof:
    return prove(graph(y), SCHEMA, {}, seconds=SECONDS)


def plain(net: Net, h: str) -> str:
    return net.op("Relu", h, out="y")


@pytest.mark.parametrize("name", NORMAL)
def test_files_of_every_kind_are_proved_and_give_their_owners_outputs(name: str) -> None:
    case = zoo.large_half_state(30_000) if name == "large_half_state" else zoo.CASES[name]()
    schema, model = schema_of(case), case.model.SerializeToString()
    initial = {
        spec.name: value if spec.shared else value[0]
        for spec, value in zip(schema.state, case.initial.values(), strict=True)
    }
    proof = prove(model, schema, initial, seconds=SECONDS)
    assert proof.one_by_one == (case.batch == "one-by-one")
    assert proof.one_by_one or proof.sizes == (1, 2, 3, 4, 8, 16, 17, 32)
    assert proof.finite
    proof.check.verify(schema, GraphStep(model, schema, ALONE if proof.one_by_one else Batching()))
    assert proof.check.inputs[0].shape[:2] == (CHECK_STEPS, CHECK_ROWS)
    inputs = case.draw(7, 3)
    found = verify(model, schema, initial, {**inputs, **case.run(inputs)}, seconds=SECONDS)
    assert (found.steps, found.rows) == (7, 3)
    assert found.largest < 1e-6


def test_what_is_alike_in_every_batch_has_the_same_bits() -> None:
    proof = proof_of(plain)
    assert (proof.same_bits, proof.tolerance, proof.one_by_one, proof.why, proof.notes) == (True, 0.0, False, "", ())


def test_a_difference_that_is_rounding_is_measured_and_allowed() -> None:
    """A row among others is a hundred-thousandth larger than alone."""

    def rounded(net: Net, h: str) -> str:
        rows = net.op("Cast", net.op("Shape", h, start=0, end=1), to=TensorProto.FLOAT)
        several = net.op("Cast", net.op("Greater", rows, net.const([1.0])), to=TensorProto.FLOAT)
        return net.op("Add", h, net.op("Mul", several, net.const([1e-5])), out="y")

    proof = proof_of(rounded)
    assert not proof.one_by_one
    assert not proof.same_bits
    assert 0.5e-5 < proof.tolerance < 2e-5


def test_a_difference_that_is_no_rounding_goes_one_by_one() -> None:
    def grown(net: Net, h: str) -> str:
        rows = net.op("Cast", net.op("Shape", h, start=0, end=1), to=TensorProto.FLOAT)
        return net.op("Mul", h, net.op("Log", net.op("Add", rows, net.const([1.0]))), out="y")

    proof = proof_of(grown)
    assert proof.one_by_one
    assert "outputs may depend on the batch: 'y' of a row in a batch of 2 differs by" in proof.why
    assert (proof.same_bits, proof.tolerance) == (True, 0.0)


def _mean(net: Net, h: str) -> str:
    return net.op("Sub", h, net.op("ReduceMean", h, net.const([0]), keepdims=1), out="y")


def _attention(net: Net, h: str) -> str:
    scores = net.op("Softmax", net.op("MatMul", h, net.op("Transpose", h, perm=[1, 0])), axis=1)
    return net.op("MatMul", scores, h, out="y")


def _maximum(net: Net, h: str) -> str:
    """A leak of large values alone: on ordinary inputs it is not there."""
    largest = net.op("ReduceMax", net.op("Abs", net.op("MatMul", "x", net.weight(6, 12))), keepdims=0)
    return net.op("Add", h, net.op("Relu", net.op("Sub", largest, net.const(50.0))), out="y")


def _neighbour(net: Net, h: str) -> str:
    """Of the row before it."""
    last = net.op("Slice", h, net.const([-1]), net.const([1 << 40]), net.const([0]))
    rest = net.op("Slice", h, net.const([0]), net.const([-1]), net.const([0]))
    return net.op("Concat", last, rest, axis=0, out="y")


def _later(net: Net, h: str) -> str:
    """Of the row after it; the last one has none."""
    rest = net.op("Slice", h, net.const([1]), net.const([1 << 40]), net.const([0]))
    last = net.op("Slice", h, net.const([-1]), net.const([1 << 40]), net.const([0]))
    return net.op("Concat", rest, last, axis=0, out="y")


@pytest.mark.parametrize("leak", [_mean, _attention, _maximum, _neighbour, _later])
def test_a_leak_between_rows_is_found_and_named(leak: Callable[[Net, str], str]) -> None:
    proof = proof_of(leak)
    assert proof.one_by_one
    assert "'y' of one row changes" in proof.why
    assert "when 'x' of another is" in proof.why


def test_a_leak_of_quantisation_says_so() -> None:
    case = zoo.quantised()
    proof = prove(case.model.SerializeToString(), schema_of(case), {}, seconds=SECONDS)
    assert proof.one_by_one
    assert "DynamicQuantizeLinear takes its scale from the whole batch" in proof.why


def test_a_graph_that_has_one_row_in_its_shape_goes_one_by_one() -> None:
    proof = proof_of(lambda net, h: net.op("Identity", net.op("Reshape", h, net.const([1, 12])), out="y"))
    assert proof.one_by_one
    assert "does not run with 3 rows: in operator Reshape" in proof.why
    assert "/" not in proof.why  # of ONNX Runtime's sources
    told = prove(graph(plain), SCHEMA, {}, one_by_one="its batch is static", seconds=SECONDS)
    assert (told.one_by_one, told.why, told.sizes) == (True, "its batch is static", ())


def test_what_is_random_is_refused() -> None:
    with pytest.raises(ImportRefusedError, match=r"'y' differs by .* when the model is called again .* it is random"):
        proof_of(lambda net, h: net.op("Add", h, net.op("RandomNormalLike", h), out="y"))


def test_notes_say_what_its_owner_may_not_know() -> None:
    """An output that is infinite, and a state that stays."""

    def odd(net: Net, h: str) -> str:
        return net.op("Div", h, net.const([0.0]), out="y")

    proof = proof_of(odd)
    assert not proof.finite
    assert proof.notes == ("'y' is not finite on ordinary inputs",)
    net = Net(1)
    net.op("Add", net.linear("x", 6, 12), "h", out="y")
    net.op("Identity", "h", out="h_next")
    state = ("float32", ["batch", 12])
    model = net.model({"x": ("float32", ["batch", 6]), "h": state}, {"y": ("float32", ["batch", 12]), "h_next": state})
    proof = prove(model.SerializeToString(), SCHEMA, {}, seconds=SECONDS)
    assert proof.notes == ("state 'h' did not change in 4 steps: is it a constant?",)


def test_a_loop_without_an_end_is_stopped() -> None:
    case = zoo.endless()
    with pytest.raises(ImportRefusedError, match="ran for more than 5 s and was stopped"):
        prove(case.model.SerializeToString(), schema_of(case), {}, seconds=5)


def test_integers_that_are_made_up_fit_or_a_real_run_is_asked_for() -> None:
    """Tokens of a vocabulary of three; and indices from a hundred on, of which nobody knows."""

    def embedding(first: int) -> tuple[bytes, Schema]:
        net = Net(5)
        token = net.op("Sub", "token", net.const(first))
        new = net.op("Add", net.op("Gather", net.weight(3, 12), token, axis=0), "h")
        net.op("Tanh", new, out="h_next")
        net.op("Relu", "h_next", out="y")
        state = ("float32", ["batch", 12])
        model = net.model({"token": ("int64", ["batch"]), "h": state}, {"y": state, "h_next": state})
        return model.SerializeToString(), Schema((TensorSpec("token", "int64", ()),), SCHEMA.outputs, SCHEMA.state)

    assert not prove(*embedding(0), {}, seconds=SECONDS).one_by_one
    model, schema = embedding(100)
    with pytest.raises(
        ImportRefusedError, match=r"does not run on inputs made up for it: in operator Gather.*--verify"
    ):
        prove(model, schema, {}, seconds=SECONDS)
    tokens = np.random.default_rng(0).integers(100, 103, (20,))
    assert not prove(model, schema, {}, examples={"token": tokens}, seconds=SECONDS).one_by_one


def recorded(steps: int = 12) -> tuple[bytes, Schema, dict[str, NDArray[Any]]]:
    """An LSTM of two layers in the normal form, whose states h and c have one shape, and a run of it."""
    net = Net(6)
    h, _ = net.lstm("x", "h", "c", 6, 12, h_out="h_next", c_out="c_next")
    net.linear(h, 12, 12, out="y")
    state = ("float32", ["batch", 12])
    model = net.model(
        {"x": ("float32", ["batch", 6]), "h": state, "c": state},
        {"y": ("float32", ["batch", 12]), "h_next": state, "c_next": state},
    )
    specs = tuple(TensorSpec(name, "float32", (12,), "recurrent") for name in "hc")
    schema = Schema(SCHEMA.inputs, SCHEMA.outputs, specs)
    case = Case(
        "lstm", model, {"x": zoo.Row("float32", (6,))}, {"y": zoo.Row("float32", (12,))}, {"h": "h_next", "c": "c_next"},
        {name: zoo.zeros(1, 12) for name in "hc"},
    )  # fmt: skip
    inputs = case.draw(steps, 2, seed=4)
    return model.SerializeToString(), schema, {**inputs, **case.run(inputs)}


def swapped(model: bytes) -> bytes:
    """The same graph with its two new states in each other's place: every shape fits."""
    import onnx

    found = onnx.load_from_string(model)
    y, first, second = found.graph.output
    names = first.name, second.name
    second.name, first.name = names
    assert y.name == "y"
    return found.SerializeToString()


def test_swapped_states_are_refused_with_the_first_step_that_differs() -> None:
    model, schema, vector = recorded()
    assert verify(model, schema, {}, vector, seconds=SECONDS).steps == 12
    with pytest.raises(ImportRefusedError, match=r"'y' first differs .* at step 1 of 12 .* row 0.*--state") as caught:
        verify(swapped(model), schema, {}, vector, seconds=SECONDS)
    assert str(caught.value).isprintable()


def test_a_wrong_initial_value_differs_at_the_first_step() -> None:
    model, schema, vector = recorded()
    with pytest.raises(ImportRefusedError, match=r"at step 0 of 12 .*--initial"):
        verify(model, schema, {"c": np.ones(12, np.float32)}, vector, seconds=SECONDS)


def test_one_number_of_one_row_is_enough() -> None:
    model, schema, vector = recorded()
    vector["y"][5, 1, 3] += 1e-3
    with pytest.raises(
        ImportRefusedError, match=r"at step 5 of 12 \(the first is 0\), row 1: value 3 is .*0.001 .* 0.0001 is allowed"
    ):
        verify(model, schema, {}, vector, seconds=SECONDS)
    assert verify(model, schema, {}, vector, allowed=1e-2, seconds=SECONDS).largest == pytest.approx(1e-3, rel=0.1)
    vector["y"][5, 1, 3] = np.nan
    with pytest.raises(ImportRefusedError, match="recorded nan"):
        verify(model, schema, {}, vector, allowed=1e-2, seconds=SECONDS)


def test_a_run_of_one_row_and_of_another_float_type_is_taken() -> None:
    model, schema, vector = recorded()
    one = {name: array[:, 0].astype(np.float64) for name, array in vector.items()}
    assert verify(model, schema, {}, one, seconds=SECONDS).rows == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("x"), "lacks input 'x'"),
        (lambda v: v.pop("y"), "has no output; add one of 'y'"),
        (lambda v: v.update(z=v["y"]), "has 'z', which is no input or output; there are 'x', 'y'"),
        (lambda v: v.update(x=v["x"][..., :5]), r"recorded 'x' is \[12, 2, 5\]; give \[steps, \*shape\] or"),
        (lambda v: v.update(x=v["x"][:4]), "has 4 steps of 2 rows of 'x' and 12 steps of 2 rows of 'y'"),
        (lambda v: v.update(x=v["x"][:0], y=v["y"][:0]), "recorded 'x' has no step"),
        (lambda v: v.update(x=v["x"].astype(np.int64)), "recorded 'x' is int64; the model's is float32"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_runs(change: Callable[[Any], Any], message: str) -> None:
    model, schema, vector = recorded()
    change(vector)
    with pytest.raises(ImportRefusedError, match=message):
        verify(b"not even a graph", schema, {}, vector, seconds=SECONDS)
    assert model


def test_progress_is_told() -> None:
    said: list[str] = []
    prove(graph(plain), SCHEMA, {}, seconds=SECONDS, progress=said.append)
    assert any("batches of 17" in line for line in said)
    assert any("NaN" in line for line in said)


def test_arrays_are_read_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram_models.importing.arrays.CONTENT_BYTES_MAX", 1 << 22)
    path = tmp_path / "v.npz"
    np.savez(path, a=np.arange(6).reshape(2, 3), **{"b/../c": np.float16(2)})
    found = read_arrays(path)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b/../c"].shape == ()
    np.savez(path, a=np.asfortranarray(np.arange(6).reshape(2, 3)), big=np.arange(3).astype(">i4"))
    assert read_arrays(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_arrays(path)["big"].tolist() == [0, 1, 2]
    np.savez(path, a=np.array([object()]))
    for data, message in (
        (path.read_bytes(), "numbers are read and nothing else"), (b"", "not an .npz"), (b"PK\3\4" + bytes(90), "not an .npz"),
        (_npz(b"\x93NUMPY\1\0\x16\0{'descr': '<f4', 'fortr"), "not an .npz"),
        (_npz(_npy((1 << 40,))), "asks for another number"), (_npz(_npy((-1,))), "asks for another number"),
        (_bomb(), "more than 4 MB"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(ImportRefusedError, match=message):
            read_arrays(path)
    with pytest.raises(ImportRefusedError, match="No such file"):
        read_arrays(tmp_path / "none.npz")


def _npy(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _npz(*entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, data in enumerate(entries):
            archive.writestr(f"a{number}.npy", data)
    return stream.getvalue()


def _bomb() -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(5):
            file.write(bytes(1 << 20))
    return stream.getvalue()
