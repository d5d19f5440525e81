"""Batches after their computation, until all of their rows are answered. Event loop only."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    states: list[NDArray[np.uint8]]  # new states of the sessions in `last`, by tensor; empty: as the arena has them
    last: NDArray[np.intp]  # of each session that was computed: its last row
    good: NDArray[np.intp] | None  # rows that were computed; None: all
    error: Exception | None  # why others were not
    started: float
    computed: float
    committing: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))  # rows of the commit's sessions
    unanswered: int = 0
    answered: NDArray[np.bool_] | None = None  # rows that were answered by a deadline


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
