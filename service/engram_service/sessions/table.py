"""The sessions that this server knows, as columns: row i of every column is one session. Ids here are keys (auth/tenants.py).

Written by the step loop's thread alone. An idle session costs one row here (some 300 bytes with its id) and nothing else, so
columns are as narrow as they can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_service.auth.tenants import tenant_of
from engram_service.places import at

NO_SLOT = -1
NO_STREAM = -1
TAG_NBYTES = 22
TOKEN_NBYTES = 16

_COLUMNS: dict[str, tuple[Any, tuple[int, ...], float]] = {
    # name: (dtype, row shape, value of an unused row)
    "tag": (np.uint8, (TAG_NBYTES,), 0),  # names the session's keys
    "token": (np.uint8, (TOKEN_NBYTES,), 0),  # this server's claim
    "epoch": (np.uint64, (), 0),
    "client_id": (np.uint64, (), 0),
    "created_ms": (np.uint64, (), 0),
    "ttl_ms": (np.uint64, (), 0),
    "losses": (np.uint16, (), 0),  # the store's count of losses at the claim
    "touched": (
        np.float32,
        (),
        0.0,
    ),  # when the session's time was last renewed, by open or touch; seconds on the table's clock
    "model": (np.int16, (), -1),  # index in the catalog
    "slot": (np.int32, (), NO_SLOT),  # row in the model's arena
    "stream": (np.int32, (), NO_STREAM),  # stream that the session is attached to
    "handle": (np.uint32, (), 0),  # its name there
    "admitted": (np.uint64, (), 0),  # last seq accepted
    "computed": (np.uint64, (), 0),  # last seq whose state is in the arena
    "applied": (np.uint64, (), 0),  # last seq answered, or ready to be
    "acked": (np.uint64, (), 0),  # last seq whose output the client has
    "durable": (np.uint64, (), 0),  # last seq in Redis
    "interval": (np.bool_, (), False),  # durability interval
    "busy": (np.bool_, (), False),  # in a batch, or waiting for its slot: no row of it may start
    "opening": (np.bool_, (), False),  # an open, close or move has it: no row of it is admitted
    "flushing": (np.bool_, (), False),  # an interval commit is on its way
    "dirty_since": (np.float32, (), 0.0),  # seconds on the table's clock; interval sessions
    "used": (np.float32, (), 0.0),  # seconds on the table's clock; for eviction
}


class Reference(NamedTuple):
    """One session, to be kept across a wait: its row, and which of the sessions that have had this row it is."""

    row: int
    generation: int


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Several of them, as columns. `rows` may be used as they are only while they are pinned; else ask the table."""

    rows: NDArray[np.int32]
    generations: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> References:
        """Some of them, by an array or a mask."""
        return References(self.rows[index], self.generations[index])

    def one(self, index: int) -> Reference:
        return Reference(self.rows.item(index), self.generations.item(index))

    def each(self) -> list[Reference]:
        return list(map(Reference, self.rows.tolist(), self.generations.tolist()))

    @classmethod
    def of(cls, references: list[Reference]) -> References:
        rows, generations = zip(*references, strict=True) if references else ((), ())
        return cls(np.array(rows, np.int32), np.array(generations, np.uint32))

    @classmethod
    def joined(cls, some: list[References]) -> References:
        if len(some) == 1:
            return some[0]
        return cls(np.concatenate([one.rows for one in some]), np.concatenate([one.generations for one in some]))


class SessionTable:
    """Columns of sessions, grown by half when full; freed rows are used again."""

    tag: NDArray[np.uint8]
    token: NDArray[np.uint8]
    epoch: NDArray[np.uint64]
    client_id: NDArray[np.uint64]
    created_ms: NDArray[np.uint64]
    ttl_ms: NDArray[np.uint64]
    losses: NDArray[np.uint16]
    touched: NDArray[np.float32]
    model: NDArray[np.int16]
    slot: NDArray[np.int32]
    stream: NDArray[np.int32]
    handle: NDArray[np.uint32]
    admitted: NDArray[np.uint64]
    computed: NDArray[np.uint64]
    applied: NDArray[np.uint64]
    acked: NDArray[np.uint64]
    durable: NDArray[np.uint64]
    interval: NDArray[np.bool_]
    busy: NDArray[np.bool_]
    opening: NDArray[np.bool_]
    flushing: NDArray[np.bool_]
    dirty_since: NDArray[np.float32]
    used: NDArray[np.float32]

    def __init__(self, capacity: int = 1024) -> None:
        self.ids: list[str | None] = []
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []
        self.counted: Callable[[str, int], None] = lambda tenant, more: None
        """Is told how many sessions of a tenant came, or went."""
        self._generation = np.zeros(capacity, np.uint32)  # of each row: how often it has been freed
        for name, (dtype, shape, unused) in _COLUMNS.items():
            setattr(self, name, np.full((capacity, *shape), unused, dtype))

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def high(self) -> int:
        """One more than the greatest row ever in use: columns are valid below it."""
        return len(self.ids)

    def find(self, session_id: str) -> int | None:
        return self._row_of.get(session_id)

    # References

    def refer(self, rows: NDArray[Any]) -> References:
        """These sessions, to be kept across a wait."""
        return References(rows.astype(np.int32, copy=False), self._generation[rows])

    def alive(self, references: References) -> NDArray[np.bool_]:
        """Which of them still are the sessions that they were."""
        same: NDArray[np.bool_] = self._generation[at(references.rows)] == references.generations
        return same

    def rows_of(self, references: References) -> NDArray[np.int32]:
        """The rows of those that are still here."""
        return references.rows[self.alive(references)]

    def row_of(self, reference: Reference) -> int | None:
        """The row, if it still is this session's."""
        return reference.row if self._generation.item(reference.row) == reference.generation else None

    # Rows

    def id_of(self, row: int) -> str:
        session_id = self.ids[row]
        if session_id is None:
            raise KeyError(row)
        return session_id

    def add(self, session_id: str) -> int:
        """A new row with every column at its unused value. Callers hold the queue's lock: columns may move."""
        if self._free:
            row = self._free.pop()
            self.ids[row] = session_id
        else:
            row = len(self.ids)
            if row == len(self.model):
                self._grow()
            self.ids.append(session_id)
        self._row_of[session_id] = row
        self.counted(tenant_of(session_id), 1)
        return row

    def pinned(self, rows: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of these may not be freed, for a batch or the store is at work on them."""
        some = at(rows)
        held: NDArray[np.bool_] = self.busy[some] | self.flushing[some]
        return held

    def remove(self, rows: NDArray[Any]) -> None:
        """Frees rows, which end all references to them. Callers hold the queue's lock. Raises RuntimeError where one is pinned."""
        if self.pinned(rows).any():
            raise RuntimeError("a session that is in a batch or being flushed was to be forgotten")
        some = at(rows)
        self._generation[some] += np.uint32(1)
        went: Counter[str] = Counter()
        for row in rows.tolist():
            session_id = self.id_of(row)
            del self._row_of[session_id]
            went[tenant_of(session_id)] += 1
            self.ids[row] = None
        for tenant, count in went.items():
            self.counted(tenant, -count)
        for name, (_, _, unused) in _COLUMNS.items():
            getattr(self, name)[some] = unused
        self._free.extend(rows.tolist())

    def _grow(self) -> None:
        for name, (dtype, shape, unused) in _COLUMNS.items():
            old = getattr(self, name)
            new = np.full((len(old) + len(old) // 2, *shape), unused, dtype)
            new[: len(old)] = old
            setattr(self, name, new)
        self._generation = np.concatenate(
            [self._generation, np.zeros(len(self.model) - len(self._generation), np.uint32)]
        )
