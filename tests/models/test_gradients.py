"""The gradient's way through time: measured norms against differences, products, bounds, and what gates do for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engram_models import GRU, LSTM, NTM, Bidirectional, Cell, GRUResetAfter, PeepholeLSTM, VanillaRNN
from engram_models.training.errors import TrainingError
from engram_models.training.gradients import bound, jacobian_norms, scale_recurrent, step_jacobians
from engram_models.training.recipe import load_recipe
from engram_models.training.run import run

TIME = 8
KINDS: dict[str, Callable[[], Cell]] = {
    "rnn": lambda: VanillaRNN(3, 5),
    "rnn-relu": lambda: VanillaRNN(3, 5, nonlinearity="relu"),
    "gru": lambda: GRU(3, 5),
    "gru-reset-after": lambda: GRUResetAfter(3, 5),
    "lstm": lambda: LSTM(3, 5, layers=2, output_size=2),
    "lstm-peephole": lambda: PeepholeLSTM(3, 5),
    "ntm": lambda: NTM(3, 2, 4, slots=4, width=3),
}


def end_by_difference(cell: Cell, xs: torch.Tensor, k: int) -> torch.Tensor:
    """ds_T/ds_k by central differences in float64."""
    sizes = [spec.size for spec in cell.state_schema]

    def onward(flat: torch.Tensor) -> torch.Tensor:
        parts = [p.view(-1, *spec.shape) for p, spec in zip(flat.split(sizes, 1), cell.state_schema, strict=True)]
        state = cell.state_type(*parts)
        for x in xs[k:]:
            state = cell(x.expand(len(flat), -1), state)[1]
        return torch.cat([tensor.flatten(1) for tensor in state], 1)

    with torch.no_grad():
        state = cell.initial_state(1, dtype=torch.float64)
        for x in xs[:k]:
            state = cell(x.unsqueeze(0), state)[1]
        flat = torch.cat([tensor.flatten(1) for tensor in state], 1)
        nudges = 1e-6 * torch.eye(flat.shape[1], dtype=torch.float64)
        return ((onward(flat + nudges) - onward(flat - nudges)) / 2e-6).t()


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_states_differences(kind: str) -> None:
    torch.manual_seed(2)
    cell, xs = KINDS[kind]().double(), torch.randn(TIME, 3, dtype=torch.float64)
    norms = jacobian_norms(cell, xs)
    assert norms.shape == (TIME + 1, TIME + 1)
    assert torch.equal(norms.diagonal(), torch.ones(TIME + 1, dtype=torch.float64))
    assert not norms.triu(1).any()
    for k in (TIME - 5, TIME - 1):
        expected = torch.linalg.matrix_norm(end_by_difference(cell, xs, k), 2)
        assert norms[TIME, k].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_given_state_is_where_it_starts_and_the_cell_stays_as_it_is() -> None:
    torch.manual_seed(2)
    cell, xs = LSTM(3, 5), torch.randn(TIME, 3)
    _, state = cell.sequence(xs[None, :4])
    later = step_jacobians(cell, xs[4:], state)
    assert torch.allclose(later, step_jacobians(cell, xs)[4:], atol=1e-6)
    assert cell.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.9, 1.3, 2.5])
def test_every_pair_of_a_vanilla_net_keeps_the_bound(nonlinearity: str, gamma: float) -> None:
    torch.manual_seed(6)
    cell = VanillaRNN(3, 6, nonlinearity=nonlinearity)
    scale_recurrent(cell.layers[0], gamma)
    limit = bound(cell.layers[0])
    assert limit == pytest.approx(gamma / 4 if nonlinearity == "sigmoid" else gamma, rel=1e-6)
    norms = jacobian_norms(cell, torch.randn(30, 3))
    lags = (torch.arange(31).unsqueeze(1) - torch.arange(31)).double()
    pairs = lags > 0
    assert pairs.sum() == 30 * 31 / 2
    assert ((norms / limit**lags)[pairs] <= 1 + 1e-9).all()
    assert norms.diagonal(-1).median() > 0.2 * limit  # and is measured, not 0


def test_the_identity_net_meets_its_bound() -> None:
    cell = VanillaRNN(2, 4, nonlinearity="relu")
    with torch.no_grad():
        cell.layers[0].weight.copy_(torch.cat((torch.ones(4, 2), torch.eye(4)), 1))
        cell.layers[0].bias.zero_()
    assert bound(cell.layers[0]) == 1
    assert torch.equal(jacobian_norms(cell, torch.rand(12, 2) + 0.1), torch.ones(13, 13, dtype=torch.float64).tril())


def test_states_that_are_no_real_numbers_are_refused() -> None:
    with pytest.raises(TrainingError, match="bidirectional"):
        jacobian_norms(Bidirectional(3, 4, 1), torch.randn(5, 3))


def test_the_experiment_finds_every_bound_kept(tmp_path: Path) -> None:
    recipe = load_recipe("gradient-flow", quick=True)
    result = run(recipe, 1, tmp_path)
    assert result["passed"], result["missed"]
    assert 0.9 < result["metrics"]["worst_ratio"] <= 1 + 1e-9  # the identity net meets its own
    norms = {name: lags["10"] for name, lags in result["metrics"]["norms"].items()}
    assert norms["rnn relu 2.5"] > 1 > norms["lstm"] > norms["rnn tanh 0.9"] > norms["rnn sigmoid 0.9"]
    assert (tmp_path / "gradient-flow.png").read_bytes().startswith(b"\x89PNG")
