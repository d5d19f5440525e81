"""Progress of a long computation on standard error: a bar that redraws itself on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 30
_LINES = 10  # in all, where nothing can be redrawn
_REDRAW_S = 0.1


class Progress:
    """`update` after every piece of work; says what is done, a note (loss, accuracy), and the time left.

    `done` is what had been done before: the time left is reckoned from the pace of this run alone.
    """

    def __init__(self, total: int, label: str, out: TextIO | None = None, done: int = 0) -> None:
        self._total, self._label, self._out = max(total, 1), label, out or sys.stderr
        self._start, self._before = time.monotonic(), done
        self._drawn = 0.0
        self._tenths = done * _LINES // self._total

    def update(self, done: int, note: str = "") -> None:
        now, last = time.monotonic(), done >= self._total
        live = self._out.isatty()
        if live and now - self._drawn < _REDRAW_S and not last:
            return
        tenths = done * _LINES // self._total
        if not live and tenths == self._tenths:
            return
        self._drawn, self._tenths = now, tenths
        left = (now - self._start) / max(done - self._before, 1) * (self._total - done)
        filled = _WIDTH * done // self._total
        bar = "#" * filled + "-" * (_WIDTH - filled)
        line = f"{self._label} [{bar}] {done:,}/{self._total:,}  {note}  {left:.0f} s left"
        self._out.write(f"\r{line}\x1b[K" if live and not last else f"\r{line}\x1b[K\n" if live else f"{line}\n")
        self._out.flush()
