"""What the client costs, against a peer that answers at once: `python tests/sdk/measure.py`. Prints one line a case."""

from __future__ import annotations

import asyncio
import pathlib
import subprocess
import sys
import time

import numpy as np

import engram


async def main() -> None:
    peer = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name("fake_peer.py"))], stdout=subprocess.PIPE, text=True
    )
    assert peer.stdout is not None
    try:
        address = f"127.0.0.1:{peer.stdout.readline().strip()}"
        async with engram.AsyncClient(address) as client:
            await measure(client)
    finally:
        peer.kill()
        peer.wait()


async def measure(client: engram.AsyncClient) -> None:
    sessions = await client.open_many("count", 1024)
    generator = np.random.default_rng(0)
    for rows in (1, 64, 256, 1024):
        X = generator.standard_normal((rows, 64), np.float32)
        part = sessions[:rows]
        for _ in range(20):
            await client.step_many(part, X)
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < 2:
            await client.step_many(part, X)
            count += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        say(f"step_many, {rows} rows", rows * count, count, wall, cpu)

    async def one_after_another(session: engram.Session, x: np.ndarray, stop: float) -> int:
        steps = 0
        while time.perf_counter() < stop:
            await session.step(x)
            steps += 1
        return steps

    for tasks in (1, 64, 1024):
        X = generator.standard_normal((tasks, 64), np.float32)
        wall, cpu = time.perf_counter(), time.process_time()
        steps = await asyncio.gather(*(one_after_another(sessions[i], X[i], wall + 2) for i in range(tasks)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        say(f"step, {tasks} tasks", sum(steps), sum(steps) // tasks, wall, cpu)
    X = generator.standard_normal((100_000, 64), np.float32)
    wall, cpu = time.perf_counter(), time.process_time()
    await sessions[0].run(X)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    say("run, 1 session", len(X), len(X) // 64, wall, cpu)


def say(what: str, rows: int, rounds: int, wall: float, cpu: float) -> None:
    print(
        f"{what:24} {rows / wall:10,.0f} rows/s  {1e6 * wall / rounds:8.0f} us a round  {cpu / wall:5.2f} cores"
        f"  {1e6 * cpu / rounds:8.0f} us of CPU a round  {rows / cpu:10,.0f} rows a CPU second",
        flush=True,
    )


if __name__ == "__main__":
    asyncio.run(main())
