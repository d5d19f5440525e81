"""One client process of the bench: opens sessions, then steps them in a closed loop until it is told to stop.

`engram bench` starts it as `python -m engram_service.bench.load` with its LoadSpec as JSON in the first line of stdin. It
answers "ready", begins at "go", ends at "stop", and then has written its figures into the spec's directory as .npy files.
Nothing here imports torch, so that a client process is small.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import engram

CHECKED_STEPS = 16  # of every session, from its first: kept, to be compared with plain libraries
_POOL = 16


@dataclass(frozen=True)
class LoadSpec:
    """What one process does. Groups of sessions go side by side: while one is computed, another is committed."""

    address: str
    model: str
    input_shape: tuple[int, ...]
    sessions: int
    groups: int
    connections: int
    durability: str
    seed: int
    directory: str

    def dumps(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def loads(cls, text: str) -> LoadSpec:
        fields = json.loads(text)
        return cls(**{**fields, "input_shape": tuple(fields["input_shape"])})


def input_pool(seed: int, sessions: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Inputs [pool, sessions, *shape] of a process; step t of every session takes row t modulo the pool."""
    pool = max(2, min(_POOL, (64 << 20) // max(1, sessions * 4 * int(np.prod(shape)))))
    return np.random.default_rng(seed).standard_normal((pool, sessions, *shape), dtype=np.float32)


class Loop:
    """One group of sessions of one client, stepped together; records when each step was finished and how long it took."""

    def __init__(self, client: engram.AsyncClient, sessions: list[engram.Session], pool: NDArray[np.float32]) -> None:
        self._client = client
        self._sessions = sessions
        self._pool = pool
        self.times: list[tuple[float, float]] = []  # finished, took: seconds
        self.outputs: list[NDArray[np.float32]] = []

    async def run(self, stop: asyncio.Event) -> None:
        # One call a step either way; for one session the plain one, which is what its users write.
        one = self._sessions[0] if len(self._sessions) == 1 else None
        number = 0
        while not stop.is_set():
            x = self._pool[number % len(self._pool)]
            begun = time.monotonic()
            y = (await one.step(x[0]))[None] if one is not None else await self._client.step_many(self._sessions, x)
            finished = time.monotonic()
            self.times.append((finished, finished - begun))
            if number < CHECKED_STEPS:
                self.outputs.append(np.array(y, np.float32))
            number += 1

    def figures(self) -> NDArray[np.float64]:
        """[calls, 3]: when it was finished, how long it took, rows."""
        rows = np.full((len(self.times), 1), len(self._sessions), np.float64)
        return np.hstack((np.array(self.times, np.float64).reshape(-1, 2), rows))


async def drive(spec: LoadSpec, said: asyncio.StreamReader) -> None:
    clients = [engram.AsyncClient(spec.address) for _ in range(spec.connections)]
    try:
        for client in clients:
            await client.connect()
        loops = await _open(spec, clients)
        print("ready", flush=True)
        await said.readline()
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for loop in loops:
                group.create_task(loop.run(stop))
            await said.readline()
            stop.set()
        _save(spec, loops)
    finally:
        await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)


async def _open(spec: LoadSpec, clients: list[engram.AsyncClient]) -> list[Loop]:
    """Deals the sessions out to the clients, and each client's to its groups."""
    pool = input_pool(spec.seed, spec.sessions, spec.input_shape)
    names = [f"bench-{spec.seed}-{number}" for number in range(spec.sessions)]
    loops = []
    for client, places in zip(clients, np.array_split(np.arange(spec.sessions), len(clients)), strict=True):
        mine = [names[place] for place in places]
        sessions = await client.open_many(spec.model, mine, durability=spec.durability)
        for part in np.array_split(np.arange(len(mine)), min(spec.groups, len(mine))):
            loops.append(Loop(client, [sessions[place] for place in part], np.ascontiguousarray(pool[:, places[part]])))
    return loops


def _save(spec: LoadSpec, loops: list[Loop]) -> None:
    directory = Path(spec.directory)
    np.save(directory / f"figures-{spec.seed}.npy", np.concatenate([loop.figures() for loop in loops]))
    # Groups may differ by a step when they are told to stop early; what all of them have is compared.
    steps = min(len(loop.outputs) for loop in loops)
    np.save(
        directory / f"outputs-{spec.seed}.npy",
        np.concatenate([np.stack(loop.outputs[:steps]) for loop in loops], axis=1),
    )


async def main() -> None:
    said = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), sys.stdin)
    spec = LoadSpec.loads((await said.readline()).decode())
    await drive(spec, said)


if __name__ == "__main__":
    asyncio.run(main())
