"""Cells against the deck's equations, torch.nn, numerical gradients, and themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numerical import assert_gradients
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_models import GRU, LSTM, Cell, GRUResetAfter, PeepholeLSTM, State, VanillaRNN, bundle_from_torch
from engram_models.cell import torch_dtype
from engram_models.cell_checks import CHECKS

Array = NDArray[np.float64]


# The deck's equations, written out in float64 with nothing of the package but the weights


def sigma(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def gate_sums(layer: nn.Module, x: Array, s: Array, gates: int) -> list[tuple[Array, Array]]:
    """(U x + b, W s) of each gate."""
    weight, bias = (getattr(layer, name).detach().double().numpy() for name in ("weight", "bias"))
    U, W = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
    size = len(bias) // gates
    parts = [slice(k * size, (k + 1) * size) for k in range(gates)]
    return [(x @ U[part].T + bias[part], s @ W[part].T) for part in parts]


def rnn(layer: nn.Module, x: Array, state: Sequence[Array], relu: bool) -> list[Array]:
    ((input_sum, state_sum),) = gate_sums(layer, x, state[0], 1)
    total = input_sum + state_sum
    return [np.maximum(total, 0) if relu else np.tanh(total)]


def gru(layer: nn.Module, x: Array, state: Sequence[Array]) -> list[Array]:
    (s,) = state
    (ur, wr), (uz, wz), _ = gate_sums(layer, x, s, 3)
    r, z = sigma(ur + wr), sigma(uz + wz)
    candidate = gate_sums(layer, x, r * s, 3)[2]
    return [z * s + (1 - z) * np.tanh(candidate[0] + candidate[1])]


def gru_reset_after(layer: nn.Module, x: Array, state: Sequence[Array]) -> list[Array]:
    (s,) = state
    (ur, wr), (uz, wz), (un, wn) = gate_sums(layer, x, s, 3)
    r, z = sigma(ur + wr), sigma(uz + wz)
    n = np.tanh(un + r * (wn + layer.bias_n.detach().double().numpy()))
    return [(1 - z) * n + z * s]


def lstm(layer: nn.Module, x: Array, state: Sequence[Array], peephole: bool) -> list[Array]:
    h, c = state
    i, f, g, o = (input_sum + state_sum for input_sum, state_sum in gate_sums(layer, x, h, 4))
    p_i, p_f, p_o = layer.peephole.detach().double().numpy() if peephole else np.zeros((3, 1))
    after = sigma(f + p_f * c) * c + sigma(i + p_i * c) * np.tanh(g)
    return [sigma(o + p_o * after) * np.tanh(after), after]


def deck(cell: Any, x: Array, state: Sequence[Array]) -> tuple[Array, list[Array]]:
    """One step of the whole cell."""
    after: list[Array] = []
    width = len(cell.layer_type.states)
    for number, layer in enumerate(cell.layers):
        before = state[number * width : (number + 1) * width]
        match cell:
            case VanillaRNN():
                new = rnn(layer, x, before, cell.config.get("nonlinearity") == "relu")
            case GRU():
                new = gru(layer, x, before)
            case GRUResetAfter():
                new = gru_reset_after(layer, x, before)
            case _:
                new = lstm(layer, x, before, isinstance(cell, PeepholeLSTM))
        after += new
        x = new[0]
    if cell.head is not None:
        x = x @ cell.head.weight.detach().double().numpy().T + cell.head.bias.detach().double().numpy()
    match cell.config["activation"]:
        case "softmax":
            e = np.exp(x - x.max(1, keepdims=True))
            x = e / e.sum(1, keepdims=True)
        case "sigmoid":
            x = sigma(x)
    return x, after


def random_state(cell: Cell, batch: int, dtype: torch.dtype = torch.float32) -> State:
    return cell.state_type(
        *(
            torch.randn(batch, *spec.shape, dtype=dtype)
            if spec.is_float
            else torch.randint(0, 2, (batch, *spec.shape), dtype=torch_dtype(spec))
            for spec in cell.state_schema
        )
    )


@pytest.mark.parametrize("grad", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["f64", "f32"])
def test_a_cell_computes_the_equations_of_the_deck(
    cell: Cell, dtype: torch.dtype, tolerance: float, grad: bool
) -> None:
    cell = cell.to(dtype)
    xs, state = torch.randn(20, 6, *cell.input.shape, dtype=dtype), random_state(cell, 6, dtype)
    reference = [tensor.double().numpy() for tensor in state]
    with torch.set_grad_enabled(grad):
        for x in xs:
            y, state = cell(x, state)
            expected, reference = deck(cell, x.double().numpy(), reference)
            np.testing.assert_allclose(y.detach().double().numpy(), expected, atol=tolerance, rtol=0)
            for got, want in zip(state, reference, strict=True):
                np.testing.assert_allclose(got.detach().double().numpy(), want, atol=tolerance, rtol=tolerance)


def test_gradients_equal_numerical_ones(cell: Cell) -> None:
    """Of outputs and states after two steps, by inputs, state and every weight, in float64, to 1e-8."""
    cell = cell.double()
    names, weights = zip(*cell.named_parameters(), strict=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, values = rest[: len(cell.state_schema)], rest[len(cell.state_schema) :]
        parameters = dict(zip(names, values, strict=True))
        y, after = torch.func.functional_call(cell, parameters, (x, cell.state_type(*state)))
        z, after = torch.func.functional_call(cell, parameters, (x * 0.5, after))
        return (y, z, *after)

    state = random_state(cell, 2, torch.float64)
    inputs = [torch.randn(2, *cell.input.shape, dtype=torch.float64), *state, *(w.detach() for w in weights)]
    assert_gradients(run, inputs)


def test_a_gradient_that_lacks_a_part_is_found() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_gradients(lambda x, y: (x * y, x.square()), [x, 3 * x])
    with pytest.raises(AssertionError, match="result 1 by input 0"):
        assert_gradients(lambda x, y: (x * y, x * x.detach()), [x, 3 * x])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("sort", ["tanh", "relu", "gru", "lstm"])
def test_a_cell_matches_torch_over_200_steps(sort: str, layers: int) -> None:
    """From a random state, float32, to 1e-6."""
    torch.manual_seed(7)
    torch_type = {"gru": nn.GRU, "lstm": nn.LSTM}.get(sort)
    module: Any = torch_type(6, 20, layers) if torch_type else nn.RNN(6, 20, layers, nonlinearity=sort)
    cell = bundle_from_torch(module)
    xs = torch.randn(200, 4, 6)
    before = [torch.randn(layers, 4, 20) for _ in cell.layer_type.states]
    state = cell.state_type(*(tensor[layer] for layer in range(layers) for tensor in before))
    with torch.no_grad():
        expected, last = module(xs, tuple(before) if sort == "lstm" else before[0])
        for x, want in zip(xs, expected, strict=True):
            y, state = cell(x, state)
            assert (y - want).abs().max() <= 1e-6
    lasts = last if sort == "lstm" else (last,)
    for got, want in zip(state, (tensor[layer] for layer in range(layers) for tensor in lasts), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("check", CHECKS)
def test_a_cell_keeps_the_contract(any_cell: Cell, check: str) -> None:
    """The checks that anybody's cell is held against."""
    CHECKS[check](any_cell)


def test_a_cell_learns() -> None:
    """A gradient reaches every weight, and a few steps of descent lower a loss."""
    torch.manual_seed(1)
    cell = LSTM(2, 16, output_size=1)
    xs = torch.randn(16, 10, 2)
    target = xs.sum((1, 2))
    optimizer = torch.optim.Adam(cell.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = (cell.sequence(xs)[0][:, -1, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in cell.parameters())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 0}, "at least 1"),
        ({"layers": 0}, "at least 1"),
        ({"activation": "gelu"}, "gelu"),
    ],
)
def test_wrong_sizes_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTM(**{"input_size": 3, "hidden_size": 4, **wrong})
