"""A recorded step is the cell to the bit, and a cell that cannot be recorded runs as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cells import CELLS
from numpy.typing import NDArray

from engram_models import Cell, load_bundle, write_bundle
from engram_models.cell import State
from engram_models.recurrent import LSTM
from engram_service.runtimes import torch_cells
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.torch_cells import Shapes, TorchCells
from engram_service.runtimes.torch_step import step_of
from engram_service.runtimes.torch_traced import traced


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arena_of(cell: Cell, tmp_path) -> Arena:
    bundle = load_bundle(write_bundle(tmp_path, "m", "1", cell))
    return Arena(bundle, 64, 8)


def run(
    arena: Arena, cell: Cell, monkeypatch: pytest.MonkeyPatch, recorded: bool, steps: int = 8
) -> list[NDArray[np.uint8]]:
    """Outputs of steps of 37 sessions, from the initial state."""
    if not recorded:
        monkeypatch.setattr(torch_cells, "traced", lambda step, cell, reference: step)
    runtime = TorchCells(arena, cell, Shapes(4))
    slots = np.arange(37, dtype=np.int32)
    arena.reset(slots)
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((steps, 37, *cell.input.shape), np.float32).view(np.uint8).reshape(steps, 37, -1)
    feedback = np.zeros(37, np.bool_)
    feedback[::3] = arena.schema.generates
    return [runtime.step(slots, x, feedback).outputs for x in inputs]


@pytest.mark.promise(5)
@pytest.mark.parametrize("name", CELLS)
def test_recorded_steps_give_the_cells_bits(name: str, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]().eval()
    arena = arena_of(cell, tmp_path)
    step = step_of(cell, len(cell.state_schema))
    assert traced(step, cell, name) is not step, "recorded"
    several = [run(arena, cell, monkeypatch, recorded) for recorded in (True, False)]
    assert all(np.array_equal(one, other) for one, other in zip(*several, strict=True))


class Moody(LSTM):
    """Branches on its data, which a recording cannot know."""

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        y, after = super().forward(x, state)
        return (y if float(x.sum()) > 0 else -y), after


def test_a_cell_that_branches_on_data_runs_as_it_is(tmp_path) -> None:
    torch.manual_seed(0)
    cell = Moody(5, 8).eval()
    step = step_of(cell, 2)
    assert traced(step, cell, "a cell") is step


class Counting(LSTM):
    """Bakes the batch size into its operations."""

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        y, after = super().forward(x, state)
        return y + torch.arange(len(x)).float().view(-1, 1) * 0, after


def test_a_cell_that_depends_on_the_batch_size_runs_as_it_is(tmp_path) -> None:
    cell = Counting(5, 8).eval()
    step = step_of(cell, 2)
    assert traced(step, cell, "a cell") is step
