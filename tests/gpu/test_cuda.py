"""On a GPU: what the CPU answers, and the same bits whoever shares the batch and whatever dies. `make gpu` runs it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import CELLS
from numpy.typing import NDArray

import engram
from engram_models import Bundle, Repository, load_bundle, load_cell, shipped_models_dir, write_bundle
from engram_models.cell import torch_dtype
from engram_service.bench.workload import INPUT, W, workload_w, write_w
from engram_service.local import LocalServer
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.torch_cells import Shapes, TorchCells
from engram_service.runtimes.torch_cuda import CudaArena, CudaGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

STEPS = 8
SLOTS = 1500
SHIPPED = {ref.name: ref.path for ref in Repository([shipped_models_dir()]).scan()[0]}


def _steps(
    runner: TorchCells, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Outputs [STEPS, n, bytes] and last states [n, bytes] of these slots from the initial state."""
    runner.arena.reset(slots)
    advanced = [runner.step(slots, x, feedback) for x in inputs]
    return np.stack([one.outputs for one in advanced]), np.concatenate(
        [np.empty((len(slots), 0), np.uint8), *advanced[-1].states], 1
    )


def _bundle(name: str, directory: Path) -> Bundle:
    torch.manual_seed(0)
    return load_bundle(SHIPPED.get(name) or write_bundle(directory, "m", "1", CELLS[name]()))


def _inputs(bundle: Bundle, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Inputs [STEPS, SLOTS, bytes], and which slots take their last output instead, where the model can."""
    spec = bundle.schema.inputs[0]
    noise = torch.from_numpy(rng.standard_normal((STEPS, SLOTS, *spec.shape), np.float32))
    x = load_cell(bundle).inputs_like(noise.to(torch_dtype(spec)))
    inputs = x.contiguous().view(STEPS, SLOTS, -1).view(torch.uint8).numpy()
    return inputs, np.arange(SLOTS) % 3 == 0 if bundle.schema.generates else None


def _runner(bundle: Bundle) -> CudaGraphs:
    arena = CudaArena(bundle, SLOTS, 8, torch.device("cuda:0"))
    return CudaGraphs(arena, load_cell(bundle, "cuda:0"), Shapes.of_tiles(256, 1024))


@pytest.mark.parametrize("name", [*CELLS, *SHIPPED])
def test_a_row_has_the_cpus_numbers_and_the_same_bits_in_every_batch(name: str, tmp_path: Path) -> None:
    bundle, rng = _bundle(name, tmp_path), np.random.default_rng(5)
    inputs, feedback = _inputs(bundle, rng)
    slots = np.arange(SLOTS, dtype=np.int32)
    runner = _runner(bundle)
    many, states = _steps(runner, slots, inputs, feedback)
    for rows in (1, 3, 255, 256, 300, 1025):
        some = rng.choice(SLOTS, rows, replace=False)
        fed = None if feedback is None else feedback[some]
        few, left = _steps(runner, rng.choice(slots, rows, replace=False), np.ascontiguousarray(inputs[:, some]), fed)
        assert np.array_equal(few, many[:, some]) and np.array_equal(left, states[some]), rows
    plain = TorchCells(Arena(bundle, SLOTS, 8), load_cell(bundle), Shapes(32))
    expected, _ = _steps(plain, slots, inputs, feedback)
    assert np.allclose(many.view(np.float32), expected.view(np.float32), atol=1e-4)


@pytest.mark.parametrize("name", [*CELLS, *SHIPPED])
def test_a_session_that_went_and_came_back_goes_on_in_the_same_bits(name: str, tmp_path: Path) -> None:
    bundle = _bundle(name, tmp_path)
    inputs, feedback = _inputs(bundle, np.random.default_rng(6))
    runner, slots = _runner(bundle), np.arange(SLOTS, dtype=np.int32)
    before, _ = _steps(runner, slots, inputs, feedback)
    some, others, count = slots[:300], slots[1100:1400], 300
    fed = None if feedback is None else feedback[some]
    gone = runner.arena.packed(some)
    stayed = runner.step(some, inputs[0, some], fed)

    runner.arena.load(others, gone)
    newest = np.ascontiguousarray(before[-2:, some].swapaxes(0, 1))
    runner.arena.load_outputs(others, np.full(count, STEPS, np.uint64), newest, np.full(count, 2))
    back = runner.step(others, inputs[0, some], fed)
    assert np.array_equal(back.outputs, stayed.outputs)
    assert np.array_equal(runner.arena.packed(others), runner.arena.packed(some))


async def _run(
    address: str, inputs: NDArray[np.float32], prefix: str, pause: asyncio.Event | None = None
) -> np.ndarray:
    """inputs [steps, sessions, 64] -> outputs [steps, sessions, 16], all sessions side by side."""
    outputs = []
    async with engram.AsyncClient(address) as client:
        sessions = await client.open_many(W, [f"{prefix}-{number}" for number in range(inputs.shape[1])])
        for number, x in enumerate(inputs):
            outputs.append(np.array(await client.step_many(sessions, x)))
            if pause is not None and number == len(inputs) // 2:
                pause.set()
        await client.close_many(sessions)
    return np.stack(outputs)


def _same(few: np.ndarray, many: np.ndarray) -> bool:
    return np.array_equal(few.view(np.uint32), many.view(np.uint32))


@pytest.mark.promise(5)
def test_a_server_answers_what_plain_torch_does_and_the_same_bits_in_every_batch_and_after_its_death(
    tmp_path: Path,
) -> None:
    write_w(tmp_path / "models")
    generator = np.random.default_rng(5)
    inputs = generator.standard_normal((STEPS, 1000, INPUT), dtype=np.float32)
    with LocalServer(tmp_path / "server", tmp_path / "models", ("--device", "cuda:0")) as server:
        many = asyncio.run(_run(server.address, inputs, "many"))
        for place, width in ((0, 1), (17, 1), (100, 3), (200, 64), (500, 333)):
            few = asyncio.run(_run(server.address, inputs[:, place : place + width], f"few-{place}"))
            assert _same(few, many[:, place : place + width]), (place, width)

        async def killed() -> np.ndarray:
            half = asyncio.Event()
            running = asyncio.create_task(_run(server.address, inputs[:, :300], "killed", half))
            await half.wait()
            server.kill()
            await asyncio.to_thread(server.start)
            return await running

        assert _same(asyncio.run(killed()), many[:, :300])
    for plain in workload_w().plains:
        with plain.running(1):
            state = plain.initial(inputs.shape[1])
            for x, got in zip(plain.inputs(inputs), many, strict=True):
                y, state = plain.step(x, state)
                assert np.abs(plain.values(y) - got).max() < 1e-5, plain.name
