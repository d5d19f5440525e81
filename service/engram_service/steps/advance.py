"""Batches after their computation, until all of their rows are answered. Event loop only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.scheduling.scheduler import Batch


@dataclass(eq=False, slots=True)
class Advance:
    """A batch that was computed: what is needed to commit and to answer it."""

    served: Served
    batch: Batch
    outputs: NDArray[np.uint8]  # [rows, output_nbytes]
    sessions: NDArray[np.int32]  # that were computed; from its commit on, those of the commit
    seqs: NDArray[np.uint64]  # their last ones
    states: list[NDArray[np.uint8]]  # their new states, by tensor; empty: as the arena has them
    good: NDArray[np.intp] | None  # rows that were computed; None: all
    error: Exception | None  # why others were not
    started: float
    computed: float
    whole: bool  # all rows of the batch are of `sessions`
    unanswered: int = 0
    answered: NDArray[np.bool_] | None = None  # rows that were answered by a deadline

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Goes on with these of the sessions."""
        self.sessions, self.seqs, self.whole = self.sessions[mask], self.seqs[mask], False
        self.states = [block[mask] for block in self.states]

    def rows_of(self, sessions: NDArray[np.int32]) -> NDArray[np.intp]:
        """The rows of the batch that are of these sessions."""
        if self.whole and len(sessions) == len(self.sessions):
            return np.arange(len(self.batch))
        return np.flatnonzero(np.isin(self.batch.steps.rows, sessions))


class Advances:
    """Those whose commits are under way."""

    def __init__(self) -> None:
        self._under_way: set[Advance] = set()

    def __len__(self) -> int:
        return len(self._under_way)

    def add(self, advance: Advance) -> None:
        self._under_way.add(advance)

    def settle(self, advance: Advance, rows: int) -> None:
        """So many of its rows are answered."""
        advance.unanswered -= rows
        if advance.unanswered <= 0:
            self._under_way.discard(advance)

    def late(self, now: float) -> list[Advance]:
        """Those with a row whose time is up."""
        return [one for one in self._under_way if (one.batch.steps.deadlines < now).any()]

    def prolong(self, rows: NDArray[np.int32], seq: np.uint64, deadline: float) -> None:
        """What is under way of these sessions up to this seq has time until then, if it had less."""
        for advance in self._under_way:
            steps = advance.batch.steps
            these = np.isin(steps.rows, rows) & (steps.seqs <= seq)
            steps.deadlines[these] = np.maximum(steps.deadlines[these], deadline)
