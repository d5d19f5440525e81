"""Tasks against answers written by hand: what a batch asks for, and what the evaluation makes of a cell that is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engram_models import Cell, State, TensorSpec
from engram_models.training.gradients import GradientFlow
from engram_models.training.recipe import load_recipe, parsed
from engram_models.training.tasks.counting import Counting, strings


class Counter(Cell):
    """Counts in one number: +1 for an a, -(1 + drift) for a b; exact where drift is 0."""

    kind = "counter"

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.drift = drift
        tensors = TensorSpec("input", "float32", (3,)), TensorSpec("output", "float32", (3,))
        self.declare(*tensors, (TensorSpec("count", "float32", (1,), "recurrent"),), {})

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        start, a, b = x.unsqueeze(2).unbind(1)
        count = state[0] + a - (1 + self.drift) * b
        left = (count > 0.5).float()
        y = torch.cat((start + a, a + b * left, start + b * (1 - left)), 1)
        return 0.1 + 0.8 * y, self.state_type(count)


def spelt(targets: Tensor, weights: Tensor) -> list[str]:
    """The symbols that may follow after each step that counts."""
    return ["".join(c for c, on in zip("abT", step, strict=True) if on) for step in targets[weights > 0]]


def test_strings_ask_for_every_symbol_that_may_follow() -> None:
    batch = strings(torch.tensor([1, 3]))
    assert batch.inputs.argmax(2).tolist() == [[0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 2, 2, 2]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
    assert spelt(batch.targets[0], batch.weights[0]) == ["aT", "ab", "T"]
    assert spelt(batch.targets[1], batch.weights[1]) == ["aT", "ab", "ab", "ab", "b", "b", "T"]


def test_training_never_sees_a_longer_string_than_it_says() -> None:
    task = Counting(train_max=4, noise=0.3)
    batch = task.batch(7, 10, seed=1)
    assert batch.weights.sum(1).tolist() == [3, 5, 7, 9, 3, 5, 7, 9, 3, 5]
    clean = strings(1 + torch.arange(10) % 4)
    assert torch.equal(batch.targets, clean.targets)
    assert 0.25 < (batch.inputs - clean.inputs).std() < 0.35
    assert torch.equal(task.batch(7, 10, seed=1).inputs, batch.inputs)
    assert not torch.equal(task.batch(8, 10, seed=1).inputs, batch.inputs)
    assert torch.equal(Counting(train_max=4).batch(7, 10, seed=1).inputs, clean.inputs)


def test_a_counter_is_followed_to_where_it_loses_count() -> None:
    task = Counting(validate_max=20, test_max=60)
    exact = task.evaluate(Counter(), 1, thorough=True)
    assert (exact["contiguous"], exact["accepted"], exact["tried_to"]) == (60, 60, 60)
    assert exact["margin"] == pytest.approx(0.4)
    # With n - 1 of n read, 1 - (n - 1) drift are left, which is no longer taken for one where it is below a half.
    drifting = task.evaluate(Counter(drift=0.0101), 1, thorough=True)
    assert (drifting["contiguous"], drifting["accepted"]) == (50, 50)
    assert drifting["margin"] == pytest.approx(-0.4)
    assert task.evaluate(Counter(drift=0.0101), 1, thorough=False)["contiguous"] == 20


@pytest.mark.parametrize(
    "sizes", [{"train_max": 0}, {"train_max": 20, "validate_max": 10}, {"validate_max": 50, "test_max": 40}]
)
def test_sizes_of_counting_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="in ascending order"):
        Counting(**sizes)


def test_gradient_flow_goes_on_where_it_was_put_down() -> None:
    recipe = load_recipe("gradient-flow", quick=True)
    options = parsed(GradientFlow.Options, {"time": 5, "hidden_size": 3, "draws": 1}, str(Path("here")))
    whole, first, second = (GradientFlow(recipe, options, 2) for _ in range(3))
    while whole.done < whole.total:
        whole.advance()
    for _ in range(7):
        first.advance()
    torch.manual_seed(1234)
    second.restore(first.tensors())
    assert second.done == 7
    while second.done < second.total:
        second.advance()
    assert second.finish().metrics == whole.finish().metrics
