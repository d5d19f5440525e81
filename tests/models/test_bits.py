"""Promise 5, for the cell alone: a row's bits do not depend on its batch, its place or its neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engram_models import (
    GRU,
    LSTM,
    NTM,
    Bidirectional,
    Cell,
    GRUResetAfter,
    PeepholeLSTM,
    State,
    TensorSpec,
    VanillaRNN,
    cell_floor,
)
from engram_models.recurrent import sigma_

BATCH_MAX = 128
STEPS = 4
TRIALS = 24


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(cell: Cell, xs: Tensor, state: State) -> list[Tensor]:
    seen: list[Tensor] = []
    for x in xs:
        y, state = cell(x, state)
        seen += [y, *state]
    return seen


def random_tensor(rows: int, spec: TensorSpec) -> Tensor:
    if spec.is_float:
        return torch.randn(rows, *spec.shape)
    return torch.randint(0, 2, (rows, *spec.shape))


def assert_same_bits(cell: Cell, trials: int, batch_max: int) -> None:
    """Random rows in random batches of multiples of the floor, against the same rows in one batch of their own."""
    floor = cell_floor(cell, batch_max)
    assert floor is not None
    xs = torch.randn(STEPS, batch_max, *cell.input.shape)
    before = [random_tensor(batch_max, spec) for spec in cell.state_schema]
    with torch.inference_mode():
        expected = run(cell, xs, cell.state_type(*before))
        for _ in range(trials):
            size = floor * int(torch.randint(1, batch_max // floor + 1, ()))
            rows = torch.randint(0, batch_max, (size,))
            got = run(cell, xs[:, rows], cell.state_type(*(tensor[rows] for tensor in before)))
            assert all(torch.equal(a, b[rows]) for a, b in zip(got, expected, strict=True)), (size, floor)


@pytest.mark.promise(5)
def test_same_bits_in_any_batch(any_cell: Cell, threads: int) -> None:
    assert_same_bits(any_cell, TRIALS // threads, BATCH_MAX)


@pytest.mark.parametrize("kind", [VanillaRNN, GRU, GRUResetAfter, LSTM, PeepholeLSTM])
@pytest.mark.parametrize("hidden", [1, 16, 33, 100, 256])
def test_same_bits_at_any_width(kind: type[Cell], hidden: int) -> None:
    torch.manual_seed(hidden)
    assert_same_bits(
        kind.from_config({"input_size": 64, "hidden_size": hidden, "output_size": 16}).eval(), 8, BATCH_MAX
    )


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize(("slots", "width"), [(14, 1), (56, 8), (128, 20), (206, 33), (129, 21), (100, 6)])
def test_a_memory_has_the_same_bits_at_any_size(controller: str, slots: int, width: int) -> None:
    torch.manual_seed(width)
    cell = NTM(9, 8, 100, controller, slots=slots, width=width, read_heads=2)
    assert_same_bits(cell.eval(), 8, BATCH_MAX)


@pytest.mark.parametrize("look_ahead", [1, 8])
@pytest.mark.parametrize("net", ["rnn", "gru-reset-after", "lstm"])
def test_a_window_has_the_same_bits_at_any_length(net: str, look_ahead: int) -> None:
    torch.manual_seed(look_ahead)
    assert_same_bits(Bidirectional(20, 33, look_ahead, net, output_size=5).eval(), 8, BATCH_MAX)


def test_the_yardstick_may_run_in_small_batches() -> None:
    """W has floor 4: a session alone costs four rows, not sixteen."""
    torch.manual_seed(0)
    cell = LSTM(64, 256, output_size=16).eval()
    assert_same_bits(cell, 5, 1024)
    floor = cell_floor(cell, 1024)
    assert floor is not None
    assert floor <= 16


class Shifty(Cell):
    """A cell whose rows feel their neighbours, as a batch norm would."""

    def __init__(self) -> None:
        super().__init__()
        inner = LSTM(3, 4)
        self.declare(inner.input, inner.output, inner.state_schema, {})

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return state[0] + x.mean(), state


def test_no_floor_is_claimed_where_there_is_none() -> None:
    assert cell_floor(Shifty(), 64) is None


def test_given_sizes_alone_are_tried() -> None:
    cell = LSTM(3, 4).eval()
    assert cell_floor(cell, 64, sizes=[32, 64]) == 1
    assert cell_floor(cell, 64, sizes=[]) is None


def test_sigma_has_no_place() -> None:
    """Its bits for a number are the same at the end of a tensor as in the middle, which torch.sigmoid does not promise."""
    x = torch.randn(4096) * 5
    with torch.inference_mode():
        whole = sigma_(x.clone())
        parts = [(sigma_(x[start : start + 13].clone()), whole[start : start + 13]) for start in range(0, 4000, 7)]
        assert sigma_(torch.tensor([-1e30, 1e30])).tolist() == [0, 1]
    assert all(torch.equal(part, expected) for part, expected in parts)
    torch.testing.assert_close(whole, torch.sigmoid(x), atol=2e-7, rtol=1e-6)
