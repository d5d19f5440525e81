"""A client process: steps its sessions by the SDK in every way there is, and writes down what was acknowledged.

It is killed and begun again; then it opens its sessions once more and carries on from the seq where they stand. Now and then, and when
a signal tells it to, it calls off what it has asked for; then it learns what became of it and carries on from there. It sees no
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
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram
from chaos import histories
from chaos.histories import (
    ANSWER,
    ASKED,
    CLOSED,
    CLOSING,
    FINAL,
    MODEL,
    OPENED,
    PREFILLED,
    SETTLED,
    Writer,
    inputs,
    name_of,
    rows,
)
from chaos.nursery import CANCEL, HALF_CLOSE
from chaos.rude import Rude

GROUPS = 2  # tasks of a client that step sessions of their own beside each other
BRANCH_STEPS = 4
KEPT_MAX = 40
ENDS = 3  # of a session whose opens, closes and detaches are called off
IMPATIENT, IMPATIENCE_S = 0.02, 0.02  # of all calls so many are cancelled by their caller, within this time
OPTIONS = engram.ClientOptions(
    timeout_s=120.0, connect_timeout_s=120.0, reconnect_timeout_s=120.0, backoff_max_s=0.5, attempt_timeout_s=2.0
)


@dataclass(slots=True)
class Group:
    """Sessions that are stepped together. `seqs`: where they stand; `asked`: the last step asked for, of the call under way."""

    sessions: list[engram.Session]
    numbers: NDArray[Any]
    seqs: NDArray[Any]
    asked: NDArray[Any]


class Driver:
    """One life of one client."""

    def __init__(self, task: dict[str, Any], client: engram.AsyncClient, stopping: asyncio.Event) -> None:
        self._client = client
        self._stopping = stopping
        self._interval = bool(task["interval"])
        self._first, self._count = int(task["first"]), int(task["count"])
        self._branches = bool(task["branches"])
        self._random = random.Random(task["seed"])
        self._writer = Writer(pathlib.Path(task["history"]))
        self._branch = int(task["life"]) * 100_000
        self._kept: dict[int, tuple[engram.Session, int]] = {}  # branches that stay open, with their sessions' numbers
        self._acts: set[asyncio.Task[None]] = set()  # what may be called off
        self._rude = Rude(task["addresses"], self._first, self._writer, random.Random(task["seed"] + 1))
        self._called: set[asyncio.Task[None]] = set()

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
                *(self._drive(Group([sessions[i] for i in p], numbers[p], seqs[p], seqs[p].copy())) for p in parts)
            )
        except engram.EngramError:
            for session in sessions:
                await _tell_lost(session)
            raise
        await asyncio.gather(*self._called)
        for session, number in zip(sessions, numbers.tolist(), strict=True):
            await self._final(session, number, 0)
        for branch, (session, number) in self._kept.items():
            await self._final(session, number, branch)

    async def _final(self, session: engram.Session, number: int, branch: int) -> None:
        state = await session.state()
        self._write(FINAL, number, session.seq, branch=branch, output=histories.digest(list(state.values())))

    # Called off

    def cancel(self) -> None:
        """Whatever is under way is cancelled by its caller, and a stream with frames on their way is too."""
        for act in self._acts:
            act.cancel()
        self._call(self._rude.cancel)

    def half_close(self) -> None:
        """A stream says that nothing more will come, while its steps are under way."""
        self._call(self._rude.half_close)

    def _call(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._branches and not self._stopping.is_set():
            self._called.add(asyncio.get_running_loop().create_task(act()))

    async def _drive(self, group: Group) -> None:
        while not self._stopping.is_set():
            act = asyncio.get_running_loop().create_task(self._act(group))
            self._acts.add(act)
            if self._random.random() < IMPATIENT:
                asyncio.get_running_loop().call_later(self._random.random() * IMPATIENCE_S, act.cancel)
            await asyncio.wait([act])
            self._acts.discard(act)
            if act.cancelled():
                await self._after_cancel(group)
            else:
                act.result()
            for task in [one for one in self._called if one.done()]:
                self._called.discard(task)
                task.result()
            stands = [session.seq for session in group.sessions]
            assert stands == group.seqs.tolist(), "the SDK counts otherwise than its caller"

    async def _act(self, group: Group) -> None:
        choice = self._random.random()
        if choice < 0.55:
            await self._step(group)
        elif choice < 0.80:
            await self._run(group)
        elif choice < 0.90:
            await self._prefill(group)
        elif choice < 0.96:
            await self._one(group)
        elif choice > 0.99:
            await asyncio.sleep(self._random.random() * 0.1)
        elif not self._branches:
            await self._keep(int(self._random.choice(group.numbers)))
        elif choice < 0.98:
            await self._copy(group)
        else:
            await self._interrupt(int(self._random.choice(group.numbers)))

    async def _after_cancel(self, group: Group) -> None:
        """A caller asks what became of its steps, or makes the same call again, which is then applied once."""
        one_each = bool((group.asked - group.seqs <= 1).all())
        if not one_each or self._random.random() < 0.5:
            await self._settle(group)
            return
        self._write(ASKED, group.numbers, group.asked)
        again = np.zeros(len(group.sessions), np.bool_)
        for i, session in enumerate(group.sessions):
            again[i] = session.seq < group.asked[i]
            group.seqs[i] = session.seq
        group.asked[:] = group.seqs + again
        self._write(SETTLED, group.numbers, group.seqs, durable=_durable(group.sessions))
        steps = [
            session.step(inputs(group.numbers[i], group.asked[i]))
            for i, session in enumerate(group.sessions)
            if again[i]
        ]
        if steps:
            Y = np.stack(await asyncio.gather(*steps))
            group.seqs[again] += 1
            self._write(ANSWER, group.numbers[again], group.seqs[again], output=Y)

    async def _settle(self, group: Group) -> None:
        """After a cancel: what became of the steps that were asked for."""
        self._write(ASKED, group.numbers, group.asked)
        for i, session in enumerate(group.sessions):
            await session.settle()
            group.seqs[i] = session.seq
        group.asked[:] = group.seqs
        self._write(SETTLED, group.numbers, group.seqs, durable=_durable(group.sessions))

    # What is done

    async def _step(self, group: Group) -> None:
        group.asked[:] = group.seqs + 1
        Y = await self._client.step_many(group.sessions, inputs(group.numbers, group.asked))
        group.seqs += 1
        self._write(ANSWER, group.numbers, group.seqs, durable=_durable(group.sessions), output=Y)

    async def _one(self, group: Group) -> None:
        """One after the other, each alone in its frame."""
        for i, session in enumerate(group.sessions[:4]):
            number = group.numbers[i]
            group.asked[i] += 1
            y = await session.step(inputs(number, group.asked[i]))
            group.seqs[i] += 1
            self._write(ANSWER, number, group.seqs[i], durable=session.durable_seq, output=y)

    async def _run(self, group: Group) -> None:
        length = self._random.randrange(2, 64)
        group.asked[:] = group.seqs + length

        async def one(i: int, session: engram.Session) -> None:
            number, steps = group.numbers[i], np.arange(group.seqs[i] + 1, group.asked[i] + 1)
            Y = await session.run(inputs(number, steps))
            group.seqs[i] += length
            self._write(ANSWER, number, steps, durable=session.durable_seq, output=Y)

        await asyncio.gather(*(one(i, session) for i, session in enumerate(group.sessions)))

    async def _prefill(self, group: Group) -> None:
        length = self._random.randrange(2, 20)
        group.asked[:] = group.seqs + length

        async def one(i: int, session: engram.Session) -> None:
            number, steps = group.numbers[i], np.arange(group.seqs[i] + 1, group.asked[i] + 1)
            await session.prefill(inputs(number, steps))
            group.seqs[i] += length
            self._write(PREFILLED, number, steps, durable=session.durable_seq)

        await asyncio.gather(*(one(i, session) for i, session in enumerate(group.sessions)))

    async def _copy(self, group: Group) -> None:
        """A fork, or an export that is imported: it goes the way that its source will go. Closed, it begins again."""
        i = self._random.randrange(len(group.sessions))
        number, seq, session = int(group.numbers[i]), int(group.seqs[i]), group.sessions[i]
        self._branch += 1
        branch, name = self._branch, f"{name_of(number)}-{self._branch}"
        copies = self._client.sessions
        # A call whose answer was lost is made again by the SDK, and may then find what it did the first time.
        with contextlib.suppress(engram.AlreadyExistsError):
            if self._random.random() < 0.5:
                await copies.fork(session.id, name, min_seq=seq)
            else:
                await copies.import_(await copies.export(session.id, min_seq=seq), name)
        # From there on, and, once it was closed, from the beginning.
        for start in (seq, 0):
            copy = await self._client.open(MODEL, name)
            assert copy.seq == start, f"{name} stands at {copy.seq} and not at {start}"
            self._write(OPENED, number, copy.seq, branch=branch)
            await self._branch_steps(copy, number, branch)
            await copy.close()
            self._branch += 1
            branch = self._branch

    async def _keep(self, number: int) -> None:
        """One more session, which stays open, or some steps of one of these."""
        if len(self._kept) < KEPT_MAX:
            self._branch += 1
            branch = self._branch
            session = await self._client.open(MODEL, f"{name_of(number)}-{branch}")
            self._write(OPENED, number, session.seq, branch=branch)
            self._kept[branch] = (session, number)
        branch = self._random.choice(list(self._kept))
        session, number = self._kept.pop(
            branch
        )  # back when it has answered: whoever calls this off may do so at any step
        await self._branch_steps(session, number, branch)
        self._kept[branch] = (session, number)

    async def _interrupt(self, number: int) -> None:
        """Opens, closes and detaches a session beside the others, and calls each off at some moment; then sees where it stands."""
        self._branch += 1
        branch, name = self._branch, f"{name_of(number)}-{self._branch}"
        for _ in range(ENDS):
            await self._impatiently(self._client.open(MODEL, name))
            session = await self._client.open(MODEL, name)
            self._write(OPENED, number, session.seq, branch=branch)
            await self._branch_steps(session, number, branch)
            closes = self._random.random() < 0.5
            if closes:
                self._write(CLOSING, number, session.seq, branch=branch)
            if not await self._impatiently(session.close() if closes else session.detach()):
                # Asked for again, it joins what is under way; an answer is true.
                await (session.close() if closes else session.detach())
            if closes:
                self._write(CLOSED, number, 0, branch=branch)
        await (await self._client.open(MODEL, name)).close()

    async def _impatiently(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Whether it was done before its caller lost patience."""
        task = asyncio.get_running_loop().create_task(work)
        try:
            await asyncio.wait([task], timeout=self._random.random() * IMPATIENCE_S)
        finally:
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled():
            return False
        task.result()
        return True

    async def _branch_steps(self, session: engram.Session, number: int, branch: int) -> None:
        steps = np.arange(session.seq + 1, session.seq + BRANCH_STEPS + 1)
        self._write(ASKED, number, steps[-1], branch=branch)
        Y = await session.run(inputs(number, steps))
        self._write(ANSWER, number, steps, branch=branch, output=Y)

    def _write(self, kind: int, numbers: Any, seqs: Any, **columns: Any) -> None:
        interval = self._interval and not columns.get("branch")
        self._writer.add(rows(kind, numbers, seqs, interval=interval, **columns))


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
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
        # All answers are written down; that a store which is away just now does not let go of the sessions is no fault.
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contextlib.suppress(engram.CloseIncompleteError))
            client = await stack.enter_async_context(engram.AsyncClient(task["addresses"], OPTIONS))
            driver = Driver(task, client, stopping)
            loop.add_signal_handler(CANCEL, driver.cancel)
            loop.add_signal_handler(HALF_CLOSE, driver.half_close)
            await driver.run()

    try:
        asyncio.run(main())
    except Exception:
        print(f"at {time.time():.3f}:", file=sys.stderr)
        traceback.print_exc()
        return 1
    return 0
