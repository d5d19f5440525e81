"""Constants of sessions: what a session was opened with, where that is not its model's default.

A session's record has them, as a part of its state, from the claim that makes it. The slot of a session without steps is filled
from here, so that it has them also where the store has lost that record. Event loop only; opening.py enters, residency.py asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram.v1 import model_pb2
from engram_models.spec import TensorSpec
from engram_service.catalog import Served
from engram_service.errors import InvalidArgumentError
from engram_service.rows import Rows
from engram_service.sessions.table import SessionTable

_CONSTANT = "constant"
_NAMED_MAX = 16


def starting_state(served: Served, given: Sequence[model_pb2.Constant]) -> NDArray[np.uint8] | None:
    """The state that a new session with these constants begins with, uint8 [state_nbytes]; None: the model's initial one.

    Raises InvalidArgumentError. What is given is part of a frame, whose size is limited; it is copied once all of it fits."""
    if not given:
        return None
    there = {spec.name: (at, spec) for at, spec in _constants(served)}
    found: dict[str, bytes] = {}
    for one in given:
        if one.name in found:
            raise _invalid(served, f"{one.name} is given twice")
        if one.name not in there:
            raise _invalid(
                served, f"there is no constant {one.name[:64]!r}; {_listed([spec for _, spec in there.values()])}"
            )
        _, spec = there[one.name]
        if len(one.data) != spec.nbytes:
            form = f"{spec.dtype}{list(spec.shape)}"
            raise _invalid(served, f"{one.name} is {form}, {spec.nbytes} bytes, and {len(one.data)} were given")
        value = np.frombuffer(one.data, np.uint8).reshape(1, -1)
        for _, reason, _ in Rows([spec]).faults(value, served.bundle.allows_non_finite):
            wrong = "NaN or infinity" if reason == "NON_FINITE_INPUT" else "a byte that is no bool"
            raise _invalid(served, f"{one.name} has {wrong}")
        found[one.name] = one.data
    initial: NDArray[np.uint8] = served.bundle.initial_row
    state = initial.copy()
    for name, data in found.items():
        state[there[name][0]] = np.frombuffer(data, np.uint8)
    return None if np.array_equal(state, initial) else state


def _invalid(served: Served, what: str) -> InvalidArgumentError:
    return InvalidArgumentError("INVALID_CONSTANT", f"model {served.reference}: {what}", model=served.bundle.name)


def _listed(specs: Sequence[TensorSpec]) -> str:
    if not specs:
        return "this model has none"
    more = f" and {len(specs) - _NAMED_MAX} more" if len(specs) > _NAMED_MAX else ""
    return (
        "there are: " + ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs[:_NAMED_MAX]) + more
    )


def _constants(served: Served) -> list[tuple[slice, TensorSpec]]:
    """The constants of a model, and where in its packed state they are."""
    specs = served.bundle.schema.state
    return [(at, spec) for at, spec in zip(Rows(specs).slices, specs, strict=True) if spec.role == _CONSTANT]


class Starts:
    """By row of the session table, the constants of sessions that have no step in the store yet."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._kept: dict[int, bytes] = {}

    def enter(self, served: Served, rows: NDArray[np.int32], states: NDArray[np.uint8]) -> None:
        """Sessions without steps whose records have states, uint8 [n, state_nbytes]."""
        if not len(rows) or not (constants := _constants(served)):
            return
        values = np.concatenate([states[:, at] for at, _ in constants], axis=1)
        same: dict[bytes, bytes] = {}  # sessions of one open mostly have the same ones
        for row, value in zip(rows.tolist(), map(bytes, values), strict=True):
            self._kept[row] = same.setdefault(value, value)

    def states(self, served: Served, rows: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
        """Which of these sessions begin with constants of their own, and their states."""
        places = [n for n, row in enumerate(rows.tolist()) if row in self._kept] if self._kept else []
        if not places:
            return np.empty(0, np.intp), np.empty((0, served.layout.state_nbytes), np.uint8)
        values = np.frombuffer(b"".join(self._kept[rows.item(n)] for n in places), np.uint8).reshape(len(places), -1)
        states = np.tile(served.bundle.initial_row, (len(places), 1))
        start = 0
        for at, spec in _constants(served):
            states[:, at] = values[:, start : start + spec.nbytes]
            start += spec.nbytes
        return np.array(places, np.intp), states

    def forget(self, rows: NDArray[np.intp]) -> None:
        """These rows are freed."""
        if self._kept:
            for row in rows.tolist():
                self._kept.pop(row, None)

    def trim(self) -> None:
        """Forgets what records of steps have by now."""
        if self._kept:
            rows = np.fromiter(self._kept, np.intp, len(self._kept))
            self.forget(rows[self._table.durable[rows] > 0])
