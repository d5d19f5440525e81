"""Batches are cut and padded so that no row feels the others, whatever the cell."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from cells import CELLS

from engram_models import cell_floor, load_bundle, write_bundle
from engram_models.cell import State
from engram_models.examination import TILE_ROWS
from engram_models.recurrent import LSTM
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.torch_cells import Shapes, TorchCells, bytes_of
from engram_service.runtimes.torch_cuda import CudaArena


@pytest.mark.parametrize("shapes", [Shapes(4), Shapes(None), Shapes.of_tiles(1), Shapes.of_tiles(16, 64)])
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 200])
def test_cuts_cover_every_row_once(shapes: Shapes, rows: int) -> None:
    cuts = list(shapes.cut(rows))
    assert [start for start, _, _ in cuts] == [0, *(stop for _, stop, _ in cuts[:-1])] and cuts[-1][1] == rows
    assert all(stop - start <= padded for start, stop, padded in cuts)


class Placed(LSTM):
    """Rounds by the place in the batch, as some products of matrices do."""

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        y, after = super().forward(x, state)
        return y + torch.arange(len(x)).view(-1, 1) * 1e-6, after


def test_a_cell_without_a_floor_gives_a_row_the_same_bits_alone_and_among_others(tmp_path: pathlib.Path) -> None:
    cell = Placed(5, 8)
    assert cell_floor(cell, 256) is None and cell_floor(cell, TILE_ROWS, [TILE_ROWS]) is None
    arena = Arena(load_bundle(write_bundle(tmp_path, "m", "1", LSTM(5, 8))), 64, 8)
    inputs = np.random.default_rng(0).standard_normal((40, 5), np.float32).view(np.uint8).reshape(40, -1)

    def outputs(rows: list[int], tile: int) -> np.ndarray:
        arena.reset(np.arange(64))
        return (
            TorchCells(arena, cell.eval(), Shapes.of_tiles(tile))
            .step(np.array(rows, np.int32), inputs[rows], None)
            .outputs
        )

    everyone = list(range(40))
    assert np.array_equal(outputs([17], 1)[0], outputs(everyone, 1)[17])
    assert not np.array_equal(outputs([17], TILE_ROWS)[0], outputs(everyone, TILE_ROWS)[17]), "a tile would not do"


@pytest.mark.parametrize("name", ["lstm-two-layers", "lstm-generates", "ntm", "rbm"])
def test_an_arena_on_a_device_holds_what_one_in_host_memory_does(name: str, tmp_path: pathlib.Path) -> None:
    bundle = load_bundle(write_bundle(tmp_path, "m", "1", CELLS[name]()))
    here, there = Arena(bundle, 20, 8), CudaArena(bundle, 20, 8, torch.device("cpu"))
    slots, seqs, counts = np.array([19, 2, 7], np.int32), np.array([3, 0, 9], np.uint64), np.array([3, 0, 8])
    generator = np.random.default_rng(3)
    states = generator.standard_normal((3, here.state_nbytes // 4), np.float32).view(np.uint8).reshape(3, -1)
    outputs = generator.standard_normal((3, 8, here.output_nbytes // 4), np.float32).view(np.uint8).reshape(3, 8, -1)
    everyone = np.arange(20, dtype=np.int32)
    for arena in (here, there):
        arena.reset(everyone)
        arena.load(slots, states)
        arena.load_outputs(slots, seqs, outputs, counts)
    assert np.array_equal(there.packed(everyone), here.packed(everyone)) and np.array_equal(there.packed(slots), states)
    assert np.array_equal(there.kept(slots[2:], seqs[2:]), here.kept(slots[2:], seqs[2:]))
    assert (here.last is not None) == (there.last_tensor is not None) == bundle.schema.generates
    if here.last is not None and there.last_tensor is not None:
        assert np.array_equal(here.last[19], outputs[0, 2]) and np.array_equal(here.last[7], outputs[2, 7])
        assert np.array_equal(bytes_of(there.last_tensor), here.last), "what a session that comes back feeds on"
        for arena in (here, there):
            arena.reset(slots)
        assert not there.last_tensor.any() and not here.last.any()
