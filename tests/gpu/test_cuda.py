"""On a GPU: a server there answers what the CPU answers, and the same bits whoever shares the batch. `make gpu` runs it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

import engram
from engram_service.bench.workload import INPUT, W, workload_w, write_w
from engram_service.local import LocalServer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

STEPS = 8


async def _run(address: str, inputs: np.ndarray, prefix: str) -> np.ndarray:
    """inputs [steps, sessions, 64] -> outputs [steps, sessions, 16], all sessions side by side."""
    async with engram.AsyncClient(address) as client:
        sessions = await client.open_many(W, [f"{prefix}-{number}" for number in range(inputs.shape[1])])
        outputs = [np.array(await client.step_many(sessions, x)) for x in inputs]
        await client.close_many(sessions)
    return np.stack(outputs)


def test_a_gpu_answers_what_the_cpu_answers_with_the_same_bits_in_every_batch(tmp_path: Path) -> None:
    write_w(tmp_path / "models")
    generator = np.random.default_rng(5)
    inputs = generator.standard_normal((STEPS, 1000, INPUT), dtype=np.float32)
    with LocalServer(tmp_path / "server", tmp_path / "models", ("--device", "cuda:0")) as server:
        many = asyncio.run(_run(server.address, inputs, "many"))
        for place, width in ((0, 1), (17, 1), (100, 3), (200, 64), (500, 333)):
            few = asyncio.run(_run(server.address, inputs[:, place : place + width], f"few-{place}"))
            assert np.array_equal(few.view(np.uint32), many[:, place : place + width].view(np.uint32)), (place, width)
    work = workload_w()
    state = work.initial(inputs.shape[1])
    with torch.inference_mode():
        for x, got in zip(inputs, many, strict=True):
            y, state = work.step(torch.from_numpy(x), state)
            assert np.abs(y.numpy() - got).max() < 1e-5
