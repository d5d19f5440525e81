"""Steps through the SDK that it finds, for benchmark_sdk.py: `sdk_driver.py ADDRESS MODEL SECONDS` prints its figures, one a line.

A process of its own, for the SDK may be an older checkout's.
"""

from __future__ import annotations

import asyncio
import sys
import time

import numpy as np

import engram

SESSIONS = 1000
INPUT = np.zeros(64, np.float32)


def main() -> None:
    address, model, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    figures = {"blocking_ms": blocking(address, model, seconds), **asyncio.run(in_asyncio(address, model, seconds))}
    for name, value in figures.items():
        print(name, value)


def blocking(address: str, model: str, seconds: float) -> float:
    with engram.Client(address) as client:
        session, waits = client.open(model), []
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            session.step(INPUT)
            waits.append(time.perf_counter() - began)
    return _p50(waits)


async def in_asyncio(address: str, model: str, seconds: float) -> dict[str, float]:
    async with engram.AsyncClient(address) as client:
        first, *_ = sessions = await client.open_many(model, SESSIONS)
        waits, inputs = [], np.zeros((SESSIONS, len(INPUT)), np.float32)
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            await first.step(INPUT)
            waits.append(time.perf_counter() - began)

        async def pump(session: engram.Session, until: float) -> int:
            count = 0
            while time.perf_counter() < until:
                await session.step(INPUT)
                count += 1
            return count

        began = time.perf_counter()
        counts = await asyncio.gather(*(pump(session, began + seconds) for session in sessions))
        tasks = sum(counts) / (time.perf_counter() - began)
        began, count = time.perf_counter(), 0
        while time.perf_counter() < began + seconds:
            await client.step_many(sessions, inputs)
            count += SESSIONS
        many = count / (time.perf_counter() - began)
    return {"async_ms": _p50(waits), "tasks_per_s": tasks, "many_per_s": many}


def _p50(waits: list[float]) -> float:
    return 1000 * float(np.median(waits))


if __name__ == "__main__":
    main()
