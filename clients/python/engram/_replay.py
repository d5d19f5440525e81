"""Where the rows of the log are, by session and seq: found once, and then sent again wave by wave. Used by _recovery.py.

The log has rows in the order in which they were sent, so a stretch of one session's steps lies all over it. Rows are sorted here
once; a wave then costs what it has rows, however long the log is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engram._calls import FEEDBACK
from engram._log import Part


class Replay:
    """Rows of these parts, of all sessions or of `only` some. Of use until the log renumbers a session's rows, or has new ones."""

    def __init__(self, parts: Sequence[Part], only: NDArray[np.int64] | None = None) -> None:
        self._parts = parts
        self._models = np.array([part.model for part in parts], np.int64)
        sizes = [len(part.slots) for part in parts]
        part = np.repeat(np.arange(len(parts)), sizes)
        row = np.arange(len(part)) - np.repeat(np.cumsum(sizes) - sizes, sizes) if parts else part
        slots, firsts, lasts = (_joined(getattr(one, name) for one in parts) for name in ("slots", "firsts", "lasts"))
        mine = slots > 0 if only is None else np.isin(slots, only)
        order = np.flatnonzero(mine)
        order = order[np.lexsort((firsts[order], slots[order]))]
        self._part, self._row = part[order], row[order]
        self._slots, self._firsts, self._lasts = slots[order], firsts[order], lasts[order]
        known, starts = np.unique(self._slots, return_index=True)
        stops = [*starts.tolist()[1:], len(order)]
        self._bounds = dict(zip(known.tolist(), zip(starts.tolist(), stops, strict=True), strict=True))

    def slots(self) -> Iterable[int]:
        """The sessions that have rows here."""
        return self._bounds.keys()

    def wave(self, slots: NDArray[np.int64], after: NDArray[np.int64], counts: NDArray[np.int64]) -> list[Part]:
        """So many steps of each of these sessions after these seqs, repeats written out; one part a model, by session and seq."""
        picked: list[NDArray[np.int64]] = []
        froms: list[int] = []
        tos: list[int] = []
        for slot, seq, count in zip(slots.tolist(), after.tolist(), counts.tolist(), strict=True):
            start, stop = self._bounds.get(slot, (0, 0))
            begin = start + int(np.searchsorted(self._lasts[start:stop], seq, side="right"))
            end = start + int(np.searchsorted(self._firsts[start:stop], seq + count, side="right"))
            picked.append(np.arange(begin, end))
            froms.append(seq + 1)
            tos.append(seq + count)
        lengths = [len(one) for one in picked]
        rows = _joined(picked)
        firsts = np.maximum(self._firsts[rows], np.repeat(np.array(froms, np.int64), lengths))
        lasts = np.minimum(self._lasts[rows], np.repeat(np.array(tos, np.int64), lengths))
        repeats = lasts - firsts + 1
        source = np.repeat(np.arange(len(rows)), repeats)
        seqs = firsts[source] + np.arange(len(source)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        rows = rows[source]
        models = self._models[self._part[rows]]
        return [self._cut(int(model), rows[models == model], seqs[models == model]) for model in np.unique(models)]

    def _cut(self, model: int, rows: NDArray[np.int64], seqs: NDArray[np.int64]) -> Part:
        order = np.argsort(self._part[rows], kind="stable")
        cuts = np.flatnonzero(np.diff(self._part[rows[order]])) + 1
        flags = np.zeros(len(rows), np.uint8)
        inputs: NDArray[np.uint8] | None = None
        for places in np.split(order, cuts):
            part, of_part = self._parts[int(self._part[rows[places[0]]])], self._row[rows[places]]
            flags[places] = part.flags if isinstance(part.flags, int) else part.flags[of_part]
            if part.inputs is not None:
                if inputs is None:
                    inputs = np.zeros((len(rows), part.inputs.shape[1]), np.uint8)
                inputs[places] = part.inputs[of_part]
        flags[seqs > self._firsts[rows]] |= FEEDBACK
        return Part(model, self._slots[rows], seqs, seqs, inputs, flags)


def _joined(pieces: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *pieces])
