"""Where the demo shows what happens: pictures that are drawn again in place on a terminal; plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

_BAR = 16
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_GAP = "    "


class Screen(Protocol):
    """Where a story is shown."""

    def belief(self, row: int, images: NDArray[np.uint8], labels: NDArray[np.int64], y: NDArray[np.float32]) -> None:
        """After `row` rows (0-based, just read): images [n, 8, 8], labels [n], class probabilities y [n, 10]."""

    def picture(self, lines: Sequence[str], caption: str, passing: bool = False) -> None:
        """A picture made of characters. `passing`: the next one takes its place, and only a terminal shows this one."""

    def say(self, text: str) -> None:
        """Something happened."""


class Lines:
    """One line for each event: for logs and pipes."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out

    def belief(self, row: int, images: NDArray[np.uint8], labels: NDArray[np.int64], y: NDArray[np.float32]) -> None:
        self.say(f"row {row + 1} of {images.shape[1]}: {_crowd(labels, y)}")

    def picture(self, lines: Sequence[str], caption: str, passing: bool = False) -> None:
        if not passing:
            self.say("\n".join(["", *lines, "", caption]))

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Terminal:
    """Draws the first `shown` digits side by side and redraws them as rows arrive; a picture is redrawn by the next."""

    def __init__(self, out: TextIO, width: int, height: int = 24) -> None:
        self._out = out
        self._width, self._height = width, height
        self._shown = max(1, min(4, (width + len(_GAP)) // (_BAR + 9 + len(_GAP))))
        self._drawn = 0

    def belief(self, row: int, images: NDArray[np.uint8], labels: NDArray[np.int64], y: NDArray[np.float32]) -> None:
        panels = [
            _panel(images[one], row + 1, int(labels[one]), y[one]) for one in range(min(self._shown, len(images)))
        ]
        lines = [_GAP.join(parts) for parts in zip(*panels, strict=True)]
        self._draw([*lines, "", f"row {row + 1} of {images.shape[1]}: {_crowd(labels, y)}"])

    def picture(self, lines: Sequence[str], caption: str, passing: bool = False) -> None:
        # A line that wraps, or one that has left the screen, could not be drawn over.
        room = max(1, self._height - 3)
        self._draw([line[: self._width] for line in ("", *list(lines)[:room], caption)])

    def say(self, text: str) -> None:
        self._out.write(f"\x1b[2K{text}\n")
        self._out.flush()
        self._drawn = 0  # what was drawn stays above, and the next picture begins below

    def _draw(self, lines: list[str]) -> None:
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}A\x1b[J")
        self._out.write("".join(f"\x1b[2K{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines)


def _panel(image: NDArray[np.uint8], rows: int, label: int, belief: NDArray[np.float32]) -> list[str]:
    """Ten lines: the rows read so far in grey blocks, then the ten classes as bars. All of the same width."""
    blank = " ·" * image.shape[1]
    beside = " " * (_BAR + 9 - len(blank))
    lines = [(_pixels(image[at]) if at < rows else blank) + beside for at in range(image.shape[0])]
    lines.append(" " * (_BAR + 9))
    best = int(belief.argmax())
    for digit, share in enumerate(belief):
        colour = "\x1b[32m" if digit == label else "\x1b[31m" if digit == best else "\x1b[90m"
        mark = "◀" if digit == label else " "
        lines.append(f"{digit} {colour}{_bar(float(share))}\x1b[0m {share:4.0%} {mark}")
    return lines


def _pixels(row: NDArray[np.uint8]) -> str:
    """Two columns for each pixel, so that it is square; 0..16 become 24 greys of the 256-colour table."""
    return "".join(f"\x1b[48;5;{232 + int(value) * 23 // 16}m  " for value in row) + "\x1b[0m"


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR)


def _crowd(labels: NDArray[np.int64], y: NDArray[np.float32]) -> str:
    right = float((y.argmax(1) == labels).mean())
    belief = float(y[np.arange(len(labels)), labels].mean())
    return f"{len(labels)} sessions, {right:.0%} read right so far, mean belief in the true digit {belief:.2f}"
