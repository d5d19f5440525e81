"""A recorded step is the cell to the bit, and a cell that cannot be recorded runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engram_models import DBN, NTM, RBM, Bidirectional, Cell, load_bundle, write_bundle
from engram_models.cell import State
from engram_models.recurrent import KINDS, LSTM
from engram_service.engine.arena import Arena
from engram_service.engine.runner import Runner, Shapes
from engram_service.engine.step import step_of
from engram_service.engine.traced import traced


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arena_of(cell: Cell, tmp_path) -> Arena:
    bundle = load_bundle(write_bundle(tmp_path, "m", "1", cell))
    return Arena(bundle, 64, 8, torch.device("cpu"))


def run(arena: Arena, recorded: bool, steps: int = 3) -> list[NDArray[np.uint8]]:
    """Outputs of steps of 37 sessions, from the initial state."""
    step = traced(step_of(arena), arena) if recorded else step_of(arena)
    runner = Runner(arena, Shapes(4), step)
    slots = np.arange(37, dtype=np.int32)
    arena.reset(slots)
    rng = np.random.default_rng(5)
    inputs = (
        rng.standard_normal((steps, 37, *arena.bundle.input.shape), np.float32).view(np.uint8).reshape(steps, 37, -1)
    )
    feedback = np.zeros(37, np.bool_)
    feedback[::3] = arena.bundle.generates
    return [runner.step(slots, x, feedback).outputs for x in inputs]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.kind))
@pytest.mark.parametrize("size", [{"layers": 2, "output_size": 3, "activation": "softmax"}, {"output_size": 5}])
def test_recorded_steps_give_the_cells_bits(kind: type[Cell], size: dict[str, object], tmp_path) -> None:
    torch.manual_seed(0)
    arena = arena_of(kind.from_config({"input_size": 5, "hidden_size": 33, **size}), tmp_path)
    step = step_of(arena)
    assert traced(step, arena) is not step, "recorded"
    assert all(np.array_equal(one, other) for one, other in zip(run(arena, True), run(arena, False), strict=True))


@pytest.mark.parametrize(
    "cell",
    [
        lambda: NTM(5, 5, slots=128, width=20),
        lambda: NTM(5, 3, 33, "feedforward", slots=17, width=7, read_heads=2, write_heads=2, activation="softmax"),
        lambda: Bidirectional(5, 33, 4, output_size=5),
        lambda: Bidirectional(5, 33, 0, "gru", output_size=3, activation="sigmoid"),
        lambda: RBM(5, 33),
        lambda: DBN([5, 33, 20], 3),
    ],
    ids=["ntm", "ntm-heads", "bidirectional", "bidirectional-gru", "rbm", "dbn"],
)
def test_steps_with_a_memory_a_window_or_no_state_are_recorded(cell: Callable[[], Cell], tmp_path) -> None:
    torch.manual_seed(0)
    arena = arena_of(cell(), tmp_path)
    step = step_of(arena)
    assert traced(step, arena) is not step, "recorded"
    assert all(np.array_equal(one, other) for one, other in zip(run(arena, True, 8), run(arena, False, 8), strict=True))


class Moody(LSTM):
    """Branches on its data, which a recording cannot know."""

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        y, after = super().forward(x, state)
        return (y if float(x.sum()) > 0 else -y), after


def test_a_cell_that_branches_on_data_runs_as_it_is(tmp_path) -> None:
    torch.manual_seed(0)
    arena = arena_of(LSTM(5, 8), tmp_path)
    object.__setattr__(arena.bundle, "cell", Moody(5, 8))
    step = step_of(arena)
    assert traced(step, arena) is step


class Counting(LSTM):
    """Bakes the batch size into its operations."""

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        y, after = super().forward(x, state)
        return y + torch.arange(len(x)).float().view(-1, 1) * 0, after


def test_a_cell_that_depends_on_the_batch_size_runs_as_it_is(tmp_path) -> None:
    arena = arena_of(LSTM(5, 8), tmp_path)
    object.__setattr__(arena.bundle, "cell", Counting(5, 8))
    step = step_of(arena)
    assert traced(step, arena) is step
