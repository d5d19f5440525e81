"""Sessions by the handles that the stream has for them. Used by _core.py and _answers.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._table import HANDLE_PLACE, VOID_HANDLE, SessionTable


class Handles:
    """The low bits of a handle are a small number that is used again: here are slots by that number."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._by_place = np.full(64, -1, np.int64)

    def slots(self, handles: bytes) -> NDArray[np.int64]:
        """Slots by handle; -1 where no session has it now."""
        numbers = np.frombuffer(handles, "<u4")
        places = numbers & HANDLE_PLACE
        if len(places) and int(places.max()) >= len(self._by_place):
            places = np.where(places < len(self._by_place), places, 0)
        slots: NDArray[np.int64] = self._by_place[places]
        known = (slots >= 0) & (self._table.handle[slots] == numbers)
        return slots if known.all() else np.where(known, slots, -1)

    def enter(self, handles: NDArray[Any], slots: NDArray[np.int64]) -> None:
        """These sessions have these handles from now on."""
        places = handles & HANDLE_PLACE
        top = int(places.max())
        if top >= len(self._by_place):
            more = np.full(max(top + 1, 2 * len(self._by_place)) - len(self._by_place), -1, np.int64)
            self._by_place = np.concatenate([self._by_place, more])
        self._by_place[places] = slots
        self._table.handle[slots] = handles

    def clear(self) -> None:
        """The stream is gone, and with it all handles."""
        self._table.handle[: self._table.count] = VOID_HANDLE
        self._by_place.fill(-1)
