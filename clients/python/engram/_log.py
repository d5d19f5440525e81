"""What was sent and may have to be sent again: parts, oldest first, each the columns of rows sent together.

A row leaves the log when it is settled: answered, and for interval durability also durable. Used by _core.py.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram._table import SessionTable

# By slot: the seq from which on its rows are rewritten, and (from, to, less) of those that move down.
Moves = dict[int, tuple[int, list[tuple[int, int, int]]]]


@dataclass(slots=True)
class Part:
    """Rows of one model, sent together.

    Attributes:
        slots, firsts, lasts: int64 [n]; the seqs of a row, more than one where it repeats.
        inputs: uint8 [n, input bytes], or None where the rows run on their own output.
        flags: uint8 [n], or one number for all rows.
    """

    model: int
    slots: NDArray[np.int64]
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]
    inputs: NDArray[np.uint8] | None
    flags: NDArray[np.uint8] | int
    deadline: float = math.inf  # of the last caller who waits for one of them
    mark: int = 0

    @property
    def nbytes(self) -> int:
        return 24 * len(self.slots) + (0 if self.inputs is None else self.inputs.nbytes)

    def only(self, index: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Part:
        """Some of the rows."""
        inputs = None if self.inputs is None else self.inputs[index]
        flags = self.flags if isinstance(self.flags, int) else self.flags[index]
        return Part(
            self.model,
            self.slots[index],
            self.firsts[index],
            self.lasts[index],
            inputs,
            flags,
            self.deadline,
            self.mark,
        )

    def flag_column(self) -> NDArray[np.uint8]:
        return np.full(len(self.slots), self.flags, np.uint8) if isinstance(self.flags, int) else self.flags


class SentLog:
    """Bounded by its user, who looks at `full`."""

    def __init__(self, table: SessionTable, bytes_max: int) -> None:
        self._table = table
        self._bytes_max = bytes_max
        self._parts: deque[Part] = deque()
        self._marks = 0
        self._compact_at = bytes_max // 2
        self.nbytes = 0

    @property
    def full(self) -> bool:
        return self.nbytes >= self._bytes_max

    @property
    def oldest(self) -> int:
        """The mark of the oldest part kept; every smaller mark has left the log."""
        return self._parts[0].mark if self._parts else self._marks + 1

    @property
    def newest(self) -> int:
        return self._marks

    def append(self, part: Part) -> None:
        self._marks += 1
        part.mark = self._marks
        self._parts.append(part)
        self.nbytes += part.nbytes

    def trim(self) -> None:
        """Drops the oldest parts whose rows are all settled; when much is held up behind one row, the settled rows too."""
        parts, table = self._parts, self._table
        while parts and bool((parts[0].lasts <= table.settled(parts[0].slots)).all()):
            self.nbytes -= parts.popleft().nbytes
        if self.nbytes > self._compact_at:
            self._compact()

    def _compact(self) -> None:
        kept: deque[Part] = deque()
        for part in self._parts:
            alive = part.lasts > self._table.settled(part.slots)
            if alive.all():
                kept.append(part)
            elif alive.any():
                kept.append(part.only(alive))
        self._parts = kept
        self.nbytes = sum(part.nbytes for part in kept)
        # Looked at again only when as much has been added again: each row is moved a bounded number of times.
        self._compact_at = min(self._bytes_max, max(self._bytes_max // 2, self.nbytes + self._bytes_max // 8))

    @property
    def parts(self) -> list[Part]:
        """All of it."""
        return list(self._parts)

    def newest_of(self, slots: NDArray[np.int64], steps: NDArray[np.int64]) -> list[Part]:
        """The parts that have the last so many steps of these sessions. The older ones are not looked at."""
        missing = np.zeros(self._table.capacity, np.int64)
        missing[slots] = steps
        found: list[Part] = []
        for part in reversed(self._parts):
            if not (missing[slots] > 0).any():
                break
            hit = missing[part.slots] > 0
            if hit.any():
                np.subtract.at(missing, part.slots[hit], (part.lasts - part.firsts + 1)[hit])
                found.append(part)
        return found[::-1]

    def renumber(self, moves: Moves) -> None:
        """Rewrites sessions' rows from a seq on; what no move names is dropped."""
        slots = np.fromiter(moves, np.int64, len(moves))
        for index, part in enumerate(self._parts):
            hit = np.flatnonzero(np.isin(part.slots, slots))
            if not len(hit):
                continue
            part = Part(
                part.model,
                part.slots.copy(),
                part.firsts.copy(),
                part.lasts.copy(),
                part.inputs,
                part.flags,
                mark=part.mark,
            )
            rows = zip(
                hit.tolist(), part.slots[hit].tolist(), part.firsts[hit].tolist(), part.lasts[hit].tolist(), strict=True
            )
            for row, slot, start, stop in rows:
                first, pieces = moves[slot]
                if stop < first:
                    continue
                less = next((less for begin, end, less in pieces if begin <= max(start, first) <= end), None)
                if less is None and start < first:
                    part.lasts[row] = first - 1  # it repeats, and goes less far
                elif less is None:
                    part.slots[row] = 0
                else:
                    part.firsts[row] -= less
                    part.lasts[row] -= less
            self._parts[index] = part
