"""BPTT whole and truncated, clipping, optimisers and starting values, over every kind of cell."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engram_models import GRU, LSTM, NTM, Bidirectional, Cell, GRUResetAfter, PeepholeLSTM, VanillaRNN
from engram_models.training.bptt import LOSSES, Batch, backpropagate, truncated
from engram_models.training.errors import TrainingError
from engram_models.training.initialise import initialise
from engram_models.training.recipe import Recipe
from engram_models.training.sequence import SequenceOptions as Options
from engram_models.training.sequence import SequenceTraining

TIME, ROWS = 7, 3
KINDS: dict[str, Callable[[], Cell]] = {
    "rnn": lambda: VanillaRNN(2, 4, output_size=3),
    "rnn-relu": lambda: VanillaRNN(2, 4, layers=2, output_size=3, nonlinearity="relu"),
    "gru": lambda: GRU(2, 4, output_size=3),
    "gru-reset-after": lambda: GRUResetAfter(2, 4, output_size=3),
    "lstm": lambda: LSTM(2, 4, layers=2, output_size=3),
    "lstm-peephole": lambda: PeepholeLSTM(2, 4, output_size=3),
    "bidirectional": lambda: Bidirectional(2, 4, 1, output_size=3),
    "ntm": lambda: NTM(2, 3, hidden_size=4, slots=5, width=3),
}


@pytest.fixture(params=KINDS)
def cell(request: pytest.FixtureRequest) -> Cell:
    torch.manual_seed(3)
    return KINDS[request.param]()


def drawn(dtype: torch.dtype = torch.float32, weights: str = "ragged") -> Batch:
    source = torch.Generator().manual_seed(8)
    inputs = torch.randn(ROWS, TIME, 2, generator=source).to(dtype)
    targets = torch.randn(ROWS, TIME, 3, generator=source).to(dtype)
    weighed = torch.ones(ROWS, TIME) if weights == "even" else torch.rand(ROWS, TIME, generator=source)
    if weights == "ragged":
        weighed[:, 2], weighed[0, 4:] = 0, 0  # a step that nobody looks at, and a shorter row
    if weights == "last":
        weighed[:, :-1] = 0
    return Batch(inputs, targets, weighed.to(dtype))


def gradients(cell: Cell, run: Callable[[], Any]) -> list[Tensor]:
    cell.zero_grad()
    run()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in cell.parameters()]


def plain_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """The batch's mean squared error, weighted, written out."""
    each = (outputs - batch.targets).square().mean(2)
    return (each * batch.weights).sum() / batch.weights.sum()


def slowly(cell: Cell, batch: Batch, k1: int, k2: int) -> float:
    """Truncated BPTT from its definition: for every block of k1 steps a graph of its own, over the last k2 steps."""
    total = 0.0
    for first in range(0, TIME, k1):
        stop = min(first + k1, TIME)
        state = cell.initial_state(ROWS, dtype=batch.inputs.dtype)
        start = max(0, min(first, stop - k2))
        for t in range(stop):
            if t == start:
                state = cell.state_type(*(tensor.detach() for tensor in state))
            y, state = cell(batch.inputs[:, t], state)
            if t >= first and batch.weights[:, t].any():
                each = (y - batch.targets[:, t]).square().mean(1) * batch.weights[:, t]
                part = each.sum() / batch.weights.sum()
                part.backward(retain_graph=True)
                total += part.item()
    return total


def test_full_bptt_is_autograd_over_the_whole_sequence(cell: Cell) -> None:
    cell, batch = cell.double(), drawn(torch.float64)
    got = gradients(cell, lambda: backpropagate(cell, batch, LOSSES["none"]))
    want = gradients(cell, lambda: plain_loss(cell.sequence(batch.inputs)[0], batch).backward())
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(got, want, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in got)
    loss = backpropagate(cell, batch, LOSSES["none"])
    assert loss == pytest.approx(plain_loss(cell.sequence(batch.inputs)[0], batch).item(), rel=1e-12)


@pytest.mark.parametrize("weights", ["even", "ragged", "last"])
def test_truncation_that_reaches_back_to_the_beginning_is_full_bptt_to_the_bit(cell: Cell, weights: str) -> None:
    batch = drawn(weights=weights)
    full = gradients(cell, lambda: backpropagate(cell, batch, LOSSES["none"]))
    for k1, k2 in ((1, TIME), (3, TIME + 5), (TIME, TIME), (TIME + 3, 1000)):
        got = gradients(cell, lambda k1=k1, k2=k2: truncated(cell, batch, LOSSES["none"], k1, k2))
        assert all(torch.equal(a, b) for a, b in zip(got, full, strict=True)), (k1, k2)


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 3), (2, 2), (2, 5), (3, 4), (4, 2), (5, 6)])
def test_truncated_windows_have_the_gradient_of_their_definition(k1: int, k2: int) -> None:
    batch = drawn(torch.float64)
    for kind in ("rnn", "lstm", "ntm"):
        torch.manual_seed(3)
        cell = KINDS[kind]().double()
        loss = truncated(cell, batch, LOSSES["none"], k1, k2)
        got = [parameter.grad for parameter in cell.parameters()]
        cell.zero_grad(set_to_none=True)
        assert loss == pytest.approx(slowly(cell, batch, k1, k2), rel=1e-12)
        for parameter, gradient in zip(cell.parameters(), got, strict=True):
            assert gradient is not None
            assert parameter.grad is not None
            assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-13), kind


def test_a_shorter_reach_gives_another_gradient() -> None:
    torch.manual_seed(3)
    cell, batch = LSTM(2, 4, output_size=3), drawn(weights="last")
    full = gradients(cell, lambda: backpropagate(cell, batch, LOSSES["none"]))
    short = gradients(cell, lambda: truncated(cell, batch, LOSSES["none"], 1, 2))
    assert not torch.allclose(full[0], short[0], rtol=1e-3)


def test_steps_count_by_their_weights() -> None:
    torch.manual_seed(3)
    cell, batch = GRU(2, 4, output_size=3).double(), drawn(torch.float64)
    spoilt = Batch(batch.inputs, torch.where(batch.weights.unsqueeze(2) == 0, 1e6, batch.targets), batch.weights)
    scaled = Batch(batch.inputs, batch.targets, 7 * batch.weights)
    once = gradients(cell, lambda: backpropagate(cell, batch, LOSSES["none"]))
    for other in (spoilt, scaled):
        again = gradients(cell, lambda other=other: backpropagate(cell, other, LOSSES["none"]))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(once, again, strict=True))
    nothing = Batch(batch.inputs, batch.targets, torch.zeros_like(batch.weights))
    assert backpropagate(cell, nothing, LOSSES["none"]) == 0


def test_the_losses_are_those_of_numbers_classes_and_bits() -> None:
    outputs = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    classes, bits = torch.tensor([1, 0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    squared = LOSSES["none"](outputs, bits)
    assert squared.tolist() == pytest.approx([(0.25 + 1) / 2, (4 + 1) / 2])
    odds = outputs.double().softmax(1)
    assert LOSSES["softmax"](outputs, classes).tolist() == pytest.approx([-math.log(odds[0, 1]), -math.log(odds[1, 0])])
    on = outputs.double().sigmoid()
    assert LOSSES["sigmoid"](outputs, bits)[0].item() == pytest.approx(
        -(math.log(on[0, 0]) + math.log(1 - on[0, 1])) / 2
    )


@pytest.mark.parametrize(("k1", "k2"), [(0, 3), (3, 0), (-1, 2)])
def test_a_window_of_no_steps_is_refused(k1: int, k2: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        truncated(LSTM(2, 4, output_size=3), drawn(), LOSSES["none"], k1, k2)


def training(**options: Any) -> SequenceTraining:
    model = {"kind": "lstm", "hidden_size": 4}
    recipe = Recipe(
        "small", "", "sequence", (1,), {}, model, {"name": "adding", "length": 6}, {}, {}, Path("small.toml")
    )
    return SequenceTraining(recipe, Options(sequences=640, batch=32, **options), seed=1)


def largest_step(**options: Any) -> tuple[float, float]:
    """How far plain gradient descent moves the weights in one step: the largest number, and the norm."""
    made = training(optimizer="sgd", learning_rate=1.0, **options)
    before = copy.deepcopy(list(made.cell.parameters()))
    made.advance()
    moved = torch.cat([(a - b).flatten() for a, b in zip(made.cell.parameters(), before, strict=True)])
    return moved.abs().max().item(), moved.norm().item()


def test_gradients_are_clipped_by_value_and_by_norm() -> None:
    free_value, free_norm = largest_step()
    assert free_value > 0.02
    assert free_norm > 0.03
    assert largest_step(clip_value=0.01)[0] == pytest.approx(0.01, rel=1e-3)
    value, norm = largest_step(clip_norm=0.02)
    assert norm == pytest.approx(0.02, rel=1e-3)
    assert value / norm == pytest.approx(free_value / free_norm, rel=1e-3)  # the direction stays


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_every_optimizer_lowers_the_loss(optimizer: str) -> None:
    made = training(optimizer=optimizer, learning_rate=0.1 if optimizer == "sgd" else 0.01, momentum=0.5)
    while made.done < made.total:
        made.advance()
    losses = made.finish().curves["loss"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("std", [1e-3, 0.1])
def test_identity_initialisation(std: float) -> None:
    torch.manual_seed(4)
    cell = VanillaRNN(3, 50, layers=2, nonlinearity="relu")
    initialise(cell, "identity", input_std=std)
    for layer, inputs in zip(cell.layers, (3, 50), strict=True):
        assert torch.equal(layer.weight[:, inputs:], torch.eye(50))
        assert not layer.bias.any()
        assert 0.7 * std < layer.weight[:, :inputs].std() < 1.3 * std


def test_orthogonal_initialisation() -> None:
    cell = GRU(3, 8)
    initialise(cell, "orthogonal")
    for gate in cell.layers[0].weight[:, 3:].split(8):
        assert torch.allclose(gate @ gate.t(), torch.eye(8), atol=1e-5)


@pytest.mark.parametrize("kind", [LSTM, PeepholeLSTM])
def test_the_forget_gates_bias(kind: type[LSTM] | type[PeepholeLSTM]) -> None:
    cell = kind(3, 4)
    before = cell.layers[0].bias.detach().clone()
    initialise(cell, forget_bias=2.5)
    moved = (cell.layers[0].bias - before).detach()
    assert torch.allclose(moved, torch.tensor([0.0, 2.5, 0.0, 0.0]).repeat_interleave(4))
    state = cell.state_type(torch.zeros(1, 4), torch.ones(1, 4))
    with torch.no_grad():
        cell.layers[0].bias[4:8] = 50  # a forget gate that is open keeps its cell, whatever the others do
        cell.layers[0].bias[0:4] = -50
        assert torch.allclose(cell(torch.zeros(1, 3), state)[1][1], torch.ones(1, 4), atol=1e-5)


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_seek_finds_what_was_seen_before(controller: str) -> None:
    """Seen again, an input takes the read head to the location after the one that it was written to."""
    torch.manual_seed(5)
    cell = NTM(8, 8, 100, controller, slots=32)
    initialise(cell, "seek")
    shown = torch.eye(8)  # eight inputs that have nothing in common
    state, written = cell.initial_state(1), []
    with torch.no_grad():
        for x in shown:
            _, state = cell(x[None], state)
            written.append(int(state.write_weighting0.argmax()))  # type: ignore[attr-defined]
        everywhere = cell.state_type(*(part.expand(8, *part.shape[1:]) for part in state))
        _, found = cell(shown, everywhere)
    assert len(set(written)) == 8
    after = found.read_weighting0.argmax(1) == torch.tensor(written) + 1  # type: ignore[attr-defined]
    assert after.sum() >= 4  # a head that does not look finds none


@pytest.mark.parametrize(
    ("cell", "way", "word"),
    [
        (LSTM(2, 3), "seek", "Turing"),
        (LSTM(2, 3), "identity", "vanilla"),
        (LSTM(2, 3), "glorot", "glorot"),
        (NTM(2, 2, 3, "feedforward"), "orthogonal", "ntm"),
    ],
)
def test_initialisations_that_do_not_fit_are_refused(cell: Cell, way: str, word: str) -> None:
    with pytest.raises(TrainingError, match=word):
        initialise(cell, way)
