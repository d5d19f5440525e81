"""Cells as ONNX graphs: the numbers of the cells, in both precisions; names and places; a row's bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from engram_models import (
    GRU,
    LSTM,
    NTM,
    Bidirectional,
    Cell,
    GRUResetAfter,
    Hopfield,
    PeepholeLSTM,
    Repository,
    VanillaRNN,
    load_cell,
    shipped_models_dir,
)
from engram_models.cell import torch_dtype
from engram_models.graphs import step_graph

Array = NDArray[Any]
Run = Callable[[Sequence[Array]], list[Array]]
STEPS = 4
BATCHES = (1, 2, 3, 5, 8, 13, 16, 31, 64, 97)
SHIPPED = {ref.name: ref.path for ref in Repository([shipped_models_dir()]).scan()[0]}


def recalling(rule: str) -> Hopfield:
    patterns = np.random.default_rng(4).choice([-1, 1], (4, 33))
    return Hopfield.of(patterns, ["a", "b", "c", "d"], rule)


MORE: dict[str, Callable[[], Cell]] = {
    "rnn-sigmoid": lambda: VanillaRNN(3, 9, layers=2, nonlinearity="sigmoid"),
    "one-unit": lambda: LSTM(1, 1, output_size=1),
    "one-unit-gru": lambda: GRU(1, 1, layers=2),
    "one-unit-peephole": lambda: PeepholeLSTM(1, 1),
    "wide-gru": lambda: GRUResetAfter(64, 100, output_size=16),
    "ahead-rnn": lambda: Bidirectional(20, 33, 8, "rnn", output_size=5, nonlinearity="relu"),
    "ahead-gru": lambda: Bidirectional(3, 5, 1, "gru-reset-after", output_size=2, activation="sigmoid"),
    "ahead-peephole": lambda: Bidirectional(1, 1, 4, "lstm-peephole"),
    "one-place": lambda: NTM(2, 3, 1, slots=1, width=1, shifts=0, read_heads=3, write_heads=2),
    "odd-places": lambda: NTM(9, 8, 33, slots=129, width=21, activation="softmax"),
    "far-shifts": lambda: NTM(3, 4, 5, "feedforward", slots=9, width=5, write_heads=3, shifts=4),
    "hebb": lambda: recalling("hebb"),
    "storkey": lambda: recalling("storkey"),
}


@pytest.fixture(params=MORE)
def odd_cell(request: pytest.FixtureRequest) -> Cell:
    torch.manual_seed(6)
    return MORE[request.param]().eval()


@pytest.fixture(params=SHIPPED)
def shipped_cell(request: pytest.FixtureRequest) -> Cell:
    torch.manual_seed(6)
    return load_cell(SHIPPED[request.param])


def runtime(cell: Cell) -> Run:
    """The graph in float32 on ONNX Runtime, as it is served."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = step_graph(cell).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    return lambda values: session.run(None, dict(zip(names, values, strict=True)))


def evaluator(cell: Cell) -> Run:
    """The graph in float64 on onnx's own evaluator."""
    model = step_graph(cell, "float64")
    reference = ReferenceEvaluator(model)
    names = [tensor.name for tensor in model.graph.input]
    return lambda values: list(reference.run(None, dict(zip(names, values, strict=True))))


def inputs(cell: Cell, rows: int, dtype: torch.dtype) -> Tensor:
    return cell.inputs_like(torch.randn(rows, *cell.input.shape)).to(dtype)


def random_state(cell: Cell, rows: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(rows, *spec.shape).to(dtype)
        if spec.is_float
        else torch.randint(0, 3, (rows, *spec.shape), dtype=torch_dtype(spec))
        for spec in cell.state_schema
    ]


def assert_alike(cell: Cell, run: Run, state: Sequence[Tensor], steps: int = STEPS) -> None:
    """In float32: the cell and its graph, step by step from the cell's states; differences relative to numbers above 1."""
    for _ in range(steps):
        before = list(state)
        x = inputs(cell, len(state[0]) if state else 3, torch.float32)
        with torch.no_grad():
            y, state = cell(x, cell.state_type(*before))
        for got, tensor in zip(run([tensor.numpy() for tensor in (x, *before)]), (y, *state), strict=True):
            want = tensor.numpy()
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert (np.abs(got - want) <= 1e-5 * np.maximum(1, np.abs(want))).all()


def assert_runs_along(cell: Cell, run: Run, state: Sequence[Tensor]) -> None:
    """In float64, each going on from its own states. In float32 a trained NTM makes any rounding ten times as large."""
    own = [tensor.numpy() for tensor in state]
    for _ in range(STEPS):
        x = inputs(cell, len(state[0]) if state else 3, torch.float64)
        with torch.no_grad():
            y, state = cell(x, cell.state_type(*state))
        answered, *own = run([x.numpy(), *own])
    for got, tensor in zip([answered, *own], (y, *state), strict=True):
        want = tensor.numpy()
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert (np.abs(got - want) <= 1e-9 * np.maximum(1, np.abs(want))).all()


def assert_same_bits(cell: Cell) -> None:
    """Rows in batches of many sizes, from several places, against the same rows in one large batch."""
    run, most = runtime(cell), max(BATCHES) + 19
    values = [
        tensor.numpy() for tensor in (inputs(cell, most, torch.float32), *random_state(cell, most, torch.float32))
    ]
    expected = run(values)
    for size in BATCHES:
        for start in (0, 1, 19):
            part = slice(start, start + size)
            got = run([np.ascontiguousarray(value[part]) for value in values])
            for one, other in zip(got, expected, strict=True):
                assert one.tobytes() == other[part].tobytes(), (size, start)


def check_all(cell: Cell) -> None:
    assert_alike(cell, runtime(cell), random_state(cell, 5, torch.float32))
    assert_same_bits(cell)
    assert_runs_along(cell.double(), evaluator(cell), random_state(cell, 3, torch.float64))


def test_a_graph_is_its_cell(any_cell: Cell) -> None:
    """In float32 to 1e-5, in float64 to 1e-9, and with the same bits for a row in any batch."""
    check_all(any_cell)


def test_a_graph_is_its_cell_of_odd_sizes(odd_cell: Cell) -> None:
    check_all(odd_cell)


def test_a_graph_is_its_shipped_model(shipped_cell: Cell) -> None:
    """From its initial state too, which an NTM's heads and a Hopfield network's units are special in."""
    assert_alike(shipped_cell, runtime(shipped_cell), shipped_cell.initial_state(3), steps=12)
    check_all(shipped_cell)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_graph_has_the_tensors_of_the_schema(any_cell: Cell, dtype: str) -> None:
    """In its order, batch first; of ONNX's own operators, and with all weights inside."""
    model = step_graph(any_cell, dtype)
    onnx.checker.check_model(model, full_check=True)
    states = any_cell.state_schema
    wanted_inputs = [(spec.name, spec) for spec in (any_cell.input, *states)]
    wanted_outputs = [("output", any_cell.output), *((f"next_{spec.name}", spec) for spec in states)]
    for got, wanted in ((model.graph.input, wanted_inputs), (model.graph.output, wanted_outputs)):
        for tensor, (name, spec) in zip(got, wanted, strict=True):
            kind = tensor.type.tensor_type
            assert tensor.name == name
            assert kind.elem_type == onnx.helper.np_dtype_to_tensor_dtype(
                np.dtype(dtype if spec.is_float else spec.dtype)
            )
            batch, *shape = kind.shape.dim
            assert batch.dim_param == "batch"
            assert tuple(dim.dim_value for dim in shape) == spec.shape
    assert [opset.domain for opset in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert model.ir_version <= 10
    assert all(weight.data_location == onnx.TensorProto.DEFAULT for weight in model.graph.initializer)


def test_the_same_cell_has_the_same_graph(any_cell: Cell) -> None:
    """A bundle names its graph by the hash of its bytes."""
    assert step_graph(any_cell).SerializeToString() == step_graph(any_cell).SerializeToString()


@pytest.mark.parametrize("below", [0.0, -0.5])
def test_a_weighting_of_nothing_is_a_head_at_location_0(below: float) -> None:
    """As before the first step; what is below 0, which only a state from elsewhere can be, is nothing too."""
    torch.manual_seed(3)
    cell = NTM(5, 3, 7, slots=9, width=4, read_heads=2).eval()
    state = dict(zip(cell.state_type._fields, random_state(cell, 4, torch.float32), strict=True))
    state["read_weighting1"][1:3] = below
    state["write_weighting0"][0] = 0
    assert_alike(cell, runtime(cell), [*state.values()])


def test_who_looks_ahead_waits() -> None:
    torch.manual_seed(3)
    cell = Bidirectional(3, 5, 2, "gru", output_size=4, activation="softmax").eval()
    run = runtime(cell)
    assert_alike(cell, run, cell.initial_state(3), steps=6)
    values = [tensor.numpy() for tensor in cell.initial_state(2)]
    for waiting in (1, 0, 0):
        y, *values = run([inputs(cell, 2, torch.float32).numpy(), *values])
        assert values[-1].tolist() == [[waiting]] * 2
    assert y.sum() == pytest.approx(2), "the first answer comes with the third input"


def test_a_unit_takes_the_sign_of_any_number() -> None:
    """The smallest and the largest, and of the unit before where the input is 0 of either sign."""
    run = runtime(Hopfield(6))
    x = np.array([[1e-45, -1e-45, 3e38, -3e38, 0.0, -0.0]], np.float32)
    y, units = run([x, np.array([[-1, 1, -1, 1, -1e-45, 3e38]], np.float32)])
    assert y.tolist() == [[1, -1, 1, -1, -1, 1]]
    assert units.tolist() == y.tolist()


def test_a_unit_that_feels_nothing_stays() -> None:
    """Two opposed patterns cancel for every unit of a cue that is as near to one as to the other."""
    cell = Hopfield.of(np.array([[1, 1, 1, 1], [-1, -1, -1, -1]]), ["up", "down"])
    cue = np.array([[1, -1, 1, -1]], np.float32)
    y, _ = runtime(cell)([cue, np.zeros_like(cue)])
    assert y.tolist() == cue.tolist()


def test_a_cell_of_another_kind_has_no_graph() -> None:
    class Own(Cell):
        kind = "own"

        def __init__(self) -> None:
            super().__init__()
            inner = LSTM(3, 4)
            self.declare(inner.input, inner.output, inner.state_schema, {})

    with pytest.raises(TypeError, match="no graph for a cell of kind 'own'"):
        step_graph(Own())
