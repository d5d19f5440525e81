"""What is limited for the whole server, counted by all data processes together: streams, sessions and rows in flight of each
tenant, streams and sessions of all. The manager makes one page of memory and hands it to each process as it starts, with a column
in it that nobody else writes while the process lives; so nothing is locked. A limit is compared with the sum of all columns.

Who takes something adds it to its column, looks at the sum, and takes it back where that is too much. Of processes that come at the
same moment none, or not all, are let in, and never too many. That a processor keeps what it writes to itself for an instant does
not matter: thousands of instructions of the interpreter lie between the addition and the look.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.auth.tenants import NUMBERS

STREAMS, SESSIONS, ROWS = range(3)
_THINGS = 3
_COLUMN_NBYTES = _THINGS * NUMBERS * 8  # 6 MB, which become memory as they are used


class Page:
    """As each process has it."""

    def __init__(self, file: int) -> None:
        """`file` stays the caller's."""
        self._cells: NDArray[np.int64] = np.frombuffer(mmap.mmap(file, 0), np.int64).reshape(-1, _THINGS, NUMBERS)

    def column(self, process: int) -> Column:
        return Column(self._cells, process)

    def clear(self, process: int) -> None:
        """What a process had that has ended is free again."""
        self._cells[process] = 0


class Column:
    """A page in the hands of the one process that writes this column. Its tenants have numbers (auth/tenants.py)."""

    def __init__(self, cells: NDArray[np.int64], process: int) -> None:
        self._cells = cells
        self._own = cells[process]
        self.rows = self._own[ROWS]
        """This process's rows in flight by tenant."""

    def add(self, thing: int, number: int, more: int) -> None:
        self._own[thing, number] += more

    def total(self, thing: int, number: int) -> int:
        """Of all processes."""
        return sum(self._cells[:, thing, number].tolist())

    def totals(self, thing: int, numbers: NDArray[Any]) -> NDArray[np.int64]:
        """The same of several tenants."""
        found: NDArray[np.int64] = self._cells[:, thing, numbers].sum(axis=0)
        return found

    def take(self, thing: int, number: int, more: int, limit: int) -> bool:
        """Adds so many, unless all would have more than the limit then (0: none). Whoever is far beyond it adds nothing even for a
        moment, in which others would find no room."""
        if limit and self.total(thing, number) + more > limit:
            return False
        self.add(thing, number, more)
        if limit and self.total(thing, number) > limit:
            self.add(thing, number, -more)
            return False
        return True


def made(processes: int) -> int:
    """The file of a new page with a column for each process; in memory alone, and gone with the last process that has it."""
    if sys.platform == "linux":
        file = os.memfd_create("engram-counts")
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.ftruncate(file, processes * _COLUMN_NBYTES)
    return file


def alone() -> Column:
    """The column of a process that shares with nobody."""
    return Column(np.zeros((1, _THINGS, NUMBERS), np.int64), 0)
