"""Pictures made of characters, for terminals and pipes alike. The stories draw with it; pure functions over arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HALVES = {(1, 1): "█", (1, -1): "▀", (-1, 1): "▄", (-1, -1): " "}
_UNKNOWN = "░"
_SHADES = " ░▒▓█"
_LEVELS = "▁▂▃▄▅▆▇█"
_GAP = "   "


def pixels(values: NDArray[Any]) -> list[str]:
    """Numbers [height, width] above 0 as ink, below as paper, 0 as unknown. Two rows a line, so that pixels are square."""
    signs = np.sign(values).astype(int)
    if len(signs) % 2:
        signs = np.concatenate([signs, np.full((1, signs.shape[1]), -1)])
    pairs = zip(signs[::2].tolist(), signs[1::2].tolist(), strict=True)
    return ["".join(_HALVES.get(pair, _UNKNOWN) for pair in zip(upper, lower, strict=True)) for upper, lower in pairs]


def shades(values: NDArray[Any]) -> list[str]:
    """Numbers [height, width] of 0 to 1, one character each."""
    return ["".join(_SHADES[place] for place in row) for row in _scaled(values, len(_SHADES)).tolist()]


def spark(values: NDArray[Any], top: float) -> str:
    """Numbers [n] of 0 to `top` as columns in one line; what is not finite is a gap."""
    places = _scaled(np.nan_to_num(values) / top, len(_LEVELS))
    return "".join(
        _LEVELS[place] if finite else " " for place, finite in zip(places.tolist(), np.isfinite(values), strict=True)
    )


def framed(lines: Sequence[str]) -> list[str]:
    """Between two bars: where paper is blank, one sees where it ends."""
    return [f"▕{line}▏" for line in lines]


def beside(panels: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Titled pictures side by side, as high as the highest."""
    widths = [max(len(line) for line in (title, *lines)) for title, lines in panels]
    height = max(len(lines) for _, lines in panels)
    columns = [
        [line.ljust(width) for line in (title, *lines, *[""] * (height - len(lines)))]
        for (title, lines), width in zip(panels, widths, strict=True)
    ]
    return [_GAP.join(parts).rstrip() for parts in zip(*columns, strict=True)]


def _scaled(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """0 to 1 as 0 to count - 1; what is beyond counts as the end."""
    places: NDArray[np.int64] = np.clip(np.rint(values * (count - 1)), 0, count - 1).astype(np.int64)
    return places
