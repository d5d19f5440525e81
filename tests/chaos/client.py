"""A client process: steps its sessions by the SDK in every way there is, and writes down what was acknowledged.

It is killed and begun again; then it opens its sessions once more and carries on from the seq where they stand. It sees no
error whatever happens to servers and Redis: an error ends the process, and the campaign with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import random
import signal
import sys
import time
import traceback
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram
from chaos import histories
from chaos.histories import ANSWER, FINAL, MODEL, OPENED, QUIET, Writer, inputs, rows

GROUPS = 2  # tasks of a client that step sessions of their own beside each other
BRANCH_STEPS = 4
OPTIONS = engram.ClientOptions(
    timeout_s=120.0, connect_timeout_s=120.0, reconnect_timeout_s=120.0, backoff_max_s=0.5, attempt_timeout_s=2.0
)


class Driver:
    """One life of one client."""

    def __init__(self, task: dict[str, Any], client: engram.AsyncClient, stopping: asyncio.Event) -> None:
        self._client = client
        self._stopping = stopping
        self._life = int(task["life"])
        self._interval = bool(task["interval"])
        self._first, self._count = int(task["first"]), int(task["count"])
        self._branches = bool(task["branches"])
        self._random = random.Random(task["seed"])
        self._writer = Writer(pathlib.Path(task["history"]))
        self._branch = self._life * 100_000

    async def run(self) -> None:
        numbers = np.arange(self._first, self._first + self._count)
        names = [name_of(number) for number in numbers.tolist()]
        durability = "interval" if self._interval else "step"
        sessions = await self._client.open_many(MODEL, names, durability=durability)
        seqs = np.array([session.seq for session in sessions])
        self._write(OPENED, numbers, seqs, durable=seqs)
        parts = np.array_split(np.arange(self._count), GROUPS)
        try:
            await asyncio.gather(
                *(self._drive([sessions[i] for i in part], numbers[part], seqs[part]) for part in parts)
            )
        except engram.EngramError:
            for session in sessions:
                await _tell_lost(session)
            raise
        for session, number in zip(sessions, numbers.tolist(), strict=True):
            state = await session.state()
            self._write(FINAL, number, session.seq, output=histories.digest(list(state.values())))

    async def _drive(self, sessions: list[engram.Session], numbers: NDArray[Any], seqs: NDArray[Any]) -> None:
        seqs = seqs.copy()
        while not self._stopping.is_set():
            choice = self._random.random()
            if choice < 0.55:
                await self._step(sessions, numbers, seqs)
            elif choice < 0.80:
                await self._run(sessions, numbers, seqs)
            elif choice < 0.90:
                await self._absorb(sessions, numbers, seqs)
            elif choice < 0.96:
                await self._one(sessions, numbers, seqs)
            elif choice < 0.98 and self._branches:
                await self._copy(sessions, numbers, seqs)
            else:
                await asyncio.sleep(self._random.random() * 0.1)
            assert [session.seq for session in sessions] == seqs.tolist(), "the SDK counts otherwise than its caller"

    async def _step(self, sessions: list[engram.Session], numbers: NDArray[Any], seqs: NDArray[Any]) -> None:
        Y = await self._client.step_many(sessions, inputs(numbers, seqs + 1))
        seqs += 1
        self._write(ANSWER, numbers, seqs, durable=_durable(sessions), output=Y)

    async def _one(self, sessions: list[engram.Session], numbers: NDArray[Any], seqs: NDArray[Any]) -> None:
        """One after the other, each alone in its frame."""
        for i in range(min(4, len(sessions))):
            y = await sessions[i].step(inputs(numbers[i], seqs[i] + 1))
            seqs[i] += 1
            self._write(ANSWER, numbers[i], seqs[i], durable=sessions[i].durable_seq, output=y)

    async def _run(self, sessions: list[engram.Session], numbers: NDArray[Any], seqs: NDArray[Any]) -> None:
        length = self._random.randrange(2, 64)

        async def one(i: int) -> None:
            steps = np.arange(seqs[i] + 1, seqs[i] + length + 1)
            Y = await sessions[i].run(inputs(numbers[i], steps))
            seqs[i] += length
            self._write(ANSWER, numbers[i], steps, durable=sessions[i].durable_seq, output=Y)

        await asyncio.gather(*(one(i) for i in range(len(sessions))))

    async def _absorb(self, sessions: list[engram.Session], numbers: NDArray[Any], seqs: NDArray[Any]) -> None:
        length = self._random.randrange(2, 20)

        async def one(i: int) -> None:
            steps = np.arange(seqs[i] + 1, seqs[i] + length + 1)
            await sessions[i].absorb(inputs(numbers[i], steps))
            seqs[i] += length
            self._write(QUIET, numbers[i], steps, durable=sessions[i].durable_seq)

        await asyncio.gather(*(one(i) for i in range(len(sessions))))

    async def _copy(self, sessions: list[engram.Session], numbers: NDArray[Any], seqs: NDArray[Any]) -> None:
        """A fork, or an export that is imported: it goes the way that its source will go. Closed, it begins again."""
        i = self._random.randrange(len(sessions))
        number, seq = int(numbers[i]), int(seqs[i])
        self._branch += 1
        branch, name = self._branch, f"{name_of(number)}-{self._branch}"
        copies = self._client.sessions
        # A call whose answer was lost is made again by the SDK, and may then find what it did the first time.
        with contextlib.suppress(engram.AlreadyExists):
            if self._random.random() < 0.5:
                await copies.fork(sessions[i].id, name, min_seq=seq)
            else:
                await copies.import_(await copies.export(sessions[i].id, min_seq=seq), name)
        # From there on, and, once it was closed, from the beginning.
        for start in (seq, 0):
            copy = await self._client.open(MODEL, name)
            assert copy.seq == start, f"{name} stands at {copy.seq} and not at {start}"
            steps = np.arange(start + 1, start + BRANCH_STEPS + 1)
            Y = await copy.run(inputs(number, steps))
            self._write(OPENED, number, start, branch=branch)
            self._write(ANSWER, number, steps, branch=branch, output=Y)
            await copy.close()
            self._branch += 1
            branch = self._branch

    def _write(self, kind: int, numbers: Any, seqs: Any, **columns: Any) -> None:
        interval = self._interval and not columns.get("branch")
        self._writer.add(rows(kind, numbers, seqs, interval=interval, **columns))


def name_of(number: int) -> str:
    return f"session-{number}"


async def _tell_lost(session: engram.Session) -> None:
    """For whoever reads the log."""
    try:
        await session.run(np.zeros((0, histories.INPUTS), np.float32))
    except engram.EngramError as error:
        print(f"lost at step {session.seq}: {session.id}: {error}", file=sys.stderr)


def _durable(sessions: list[engram.Session]) -> NDArray[Any]:
    return np.array([session.durable_seq for session in sessions])


def run(task: dict[str, Any]) -> int:
    """The exit code: 0 after a SIGTERM, 1 after an error that the caller of the SDK saw."""

    async def main() -> None:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        # All answers are written down; that a store which is away just now does not let go of the sessions is no fault.
        with contextlib.suppress(engram.CloseIncomplete):
            async with engram.AsyncClient(task["addresses"], OPTIONS) as client:
                await Driver(task, client, stopping).run()

    try:
        asyncio.run(main())
    except Exception:
        print(f"at {time.time():.3f}:", file=sys.stderr)
        traceback.print_exc()
        return 1
    return 0
