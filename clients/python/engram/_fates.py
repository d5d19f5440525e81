"""Steps whose callers were told of a failure, or went away, though the server may have applied them. Used by _core.py.

Such a session is in doubt. Nothing new is sent for it until the server has said of each of these steps whether it was applied:
its answer comes (_core.py puts it down here), or it is withdrawn (_recovery.py, where the server is sure that it was not).
What was applied is then decided once, by whoever comes first:

  - the caller asks (`Session.settle`): they were applied, and these are their outputs;
  - the next call of the session begins with the very same inputs: it is their repeat, and gets their outputs. So its input is
    applied once, and all is as if the failed call had never been applied;
  - the next call has other inputs: they were applied, and it goes behind them.

Until then `seq` does not count them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._calls import Call
from engram._errors import EngramError, Fate
from engram._table import SessionTable


@dataclass(slots=True)
class OpenStep:
    """One step, with what a repeat of it is known by. `output` is None for a prefill too."""

    fate: Fate
    seq: int
    inputs: bytes
    flags: int
    answered: bool = False
    output: NDArray[Any] | None = None


class Doubt:
    """The open steps of one session, by seq."""

    def __init__(self) -> None:
        self.steps: list[OpenStep] = []
        self.waiters: list[asyncio.Future[None]] = []
        self.trouble: EngramError | None = None  # why the server could not say yet

    @property
    def ready(self) -> bool:
        # Answers come in the order of the seqs.
        return self.steps[-1].answered

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.waiters.clear()


class Doubts:
    """Doubts by slot; the table's column `doubt` says which slots have one. `settled` has the slots that may go on."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._doubts: dict[int, Doubt] = {}
        self.settled: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._doubts)

    def get(self, slot: int) -> Doubt | None:
        return self._doubts.get(slot)

    def seq(self, slot: int) -> int:
        """The last step of a session whose answer has reached its caller."""
        doubt = self._doubts.get(slot)
        answered = int(self._table.answered[slot])
        return answered if doubt is None else min(answered, doubt.steps[0].seq - 1)

    # What becomes of open steps

    def add(self, slot: int, step: OpenStep) -> None:
        """A caller was told that his step failed, or has gone, and the server has not said yet what became of it."""
        doubt = self._doubts.setdefault(slot, Doubt())
        doubt.steps.append(step)
        if len(doubt.steps) > 1 and doubt.steps[-2].seq > step.seq:
            doubt.steps.sort(key=lambda one: one.seq)
        self._table.doubt[slot] = True

    def answered(self, slots: NDArray[np.int64], seqs: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        """Answers that nobody waits for any more."""
        for place, (slot, seq) in enumerate(zip(slots.tolist(), seqs.tolist(), strict=True)):
            doubt = self._doubts.get(slot)
            for step in () if doubt is None else doubt.steps:
                if step.seq == seq:
                    step.answered = True
                    step.output = None if values is None else values[place].copy()
                    self._look(slot)
                    break

    def passed(self, slots: NDArray[np.int64], seqs: NDArray[np.int64]) -> None:
        """Later steps, whose callers wait, were answered: the open ones before them were applied."""
        here = self._table.doubt[slots]
        for slot, seq in zip(slots[here].tolist(), seqs[here].tolist(), strict=True):
            doubt = self._doubts.get(slot)
            if doubt is None:
                continue
            for step in doubt.steps:
                if step.seq < seq:
                    step.fate.applied = True
            doubt.steps = [step for step in doubt.steps if step.seq > seq]
            self._look(slot)

    def withdrawn(self, slot: int, first: int, last: int) -> None:
        """These seqs are taken back: the server has not applied them, and they are not sent again."""
        doubt = self._doubts.get(slot)
        if doubt is None:
            return
        for step in doubt.steps:
            if first <= step.seq <= last:
                step.fate.applied = False
        doubt.steps = [step for step in doubt.steps if not first <= step.seq <= last]
        self._look(slot)

    def drop(self, slot: int, error: EngramError) -> None:
        """The session is lost: what was not answered stays open."""
        doubt = self._doubts.pop(slot, None)
        self._table.doubt[slot] = False
        if doubt is None:
            return
        for step in doubt.steps:
            if step.answered:
                step.fate.applied = True
        for waiter in doubt.waiters:
            if not waiter.done():
                waiter.set_exception(error.copy())

    def _look(self, slot: int) -> None:
        doubt = self._doubts[slot]
        if doubt.steps and not doubt.ready:
            return
        self.settled.append(slot)
        doubt.wake()
        if not doubt.steps:
            self._end(slot)

    # What is decided

    def decide(self, slot: int) -> list[OpenStep]:
        """The open steps, all of them answered, were applied."""
        doubt = self._doubts[slot]
        for step in doubt.steps:
            step.fate.applied = True
        self._end(slot)
        return doubt.steps

    def resolve(self, slot: int, call: Call, at: int, stop: int) -> int | None:
        """Before rows at..stop-1 of a call go to a session in doubt: how many of them were its open steps, and are answered with
        that; None: the server has not yet said what became of these."""
        doubt = self._doubts[slot]
        if not doubt.ready:
            return None
        steps = doubt.steps
        count = len(steps)
        if count > stop - at or steps[-1].seq != self._table.sent[slot] or not _same(steps, call, at):
            self.decide(slot)
            return 0
        for step in steps:
            step.fate.applied = False  # it is the repeat's now
        self._end(slot)
        outputs = [step.output for step in steps]
        values = None if outputs[0] is None else np.stack([one for one in outputs if one is not None])
        call.open += count
        call.settle(np.arange(at, at + count), values)
        return count

    def _end(self, slot: int) -> None:
        self._doubts.pop(slot).wake()
        self._table.doubt[slot] = False


def _same(steps: list[OpenStep], call: Call, at: int) -> bool:
    return all(
        step.flags == call.flags and step.inputs == row_bytes(call, at + place) for place, step in enumerate(steps)
    )


def row_bytes(call: Call, at: int) -> bytes:
    """A row's input; empty where the row runs on its own output."""
    return b"" if call.inputs is None else call.inputs[at].tobytes()
