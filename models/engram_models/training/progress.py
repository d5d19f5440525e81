"""Progress of a long computation on standard error: a bar that redraws itself on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 30
_LINES = 10  # in all, where nothing can be redrawn


class Progress:
    """`update` after every unit of work; says what is done, a note (loss, accuracy), and the time left."""

    def __init__(self, total: int, label: str, out: TextIO | None = None) -> None:
        self._total, self._label, self._out = total, label, out or sys.stderr
        self._start = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        live = self._out.isatty()
        if not live and done % max(1, self._total // _LINES) and done != self._total:
            return
        left = (time.monotonic() - self._start) / done * (self._total - done)
        filled = _WIDTH * done // self._total
        bar = "#" * filled + "-" * (_WIDTH - filled)
        line = f"{self._label} [{bar}] {done}/{self._total}  {note}  {left:.0f} s left"
        self._out.write(
            f"\r{line}\x1b[K" if live and done < self._total else f"\r{line}\x1b[K\n" if live else f"{line}\n"
        )
        self._out.flush()
