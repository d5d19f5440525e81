"""The alphabet as pictures: a font of our own, and the network that knows it. For the demo, the recipe and the tests.

The deck shows a 'T', half of it replaced by noise, and the 'T' that a Hopfield network makes of it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engram_models.hopfield import Hopfield

SIDE = 16
RULE = "dense"
"""Letters look alike: Hebb's and Storkey's rules do not bear that, the pseudo-inverse finds its way from little noise only."""
_PEN = 2  # pixels, to the right and downwards
_ON, _OFF, _UNKNOWN = "##", " .", " ?"

# Lines from point to point, each an x and a y from 0 to e, hexadecimal, y downwards. Upper halves differ from one another more
# than in common fonts: what is the same where the image is whole cannot be told apart.
_STROKES = {
    "A": "0e-70-ee 3a-ba", "B": "00-0e-be-ec-e9-b7-e5-e2-b0-00 07-b7", "C": "e2-c0-30-03-0b-3e-be-eb",
    "D": "00-90-e5-e9-9e-0e-00", "E": "e0-00-0e-ee 07-a7", "F": "e3-e0-00-0e 05-a5",
    "G": "e3-b0-50-06-08-5e-be-eb-e8-78", "H": "00-0e e0-ee 06-e6", "I": "50-90 70-7e 5e-9e",
    "J": "70-e0 b0-bb-8e-3e-0b", "K": "00-0e d0-07-ee", "L": "00-0e-ee-ec", "M": "0e-00-77-e0-ee", "N": "0e-00-ee-e0",
    "O": "50-90-e5-e9-9e-5e-09-05-50", "P": "0e-00-c0-e2-e4-c6-06", "Q": "20-c0-cb-2b-20 7b-ee",
    "R": "0e-00-80-a2-a5-87-07 57-ee", "S": "d0-30-02-04-36-b8-ea-ec-be-0e", "T": "00-e0 70-7e",
    "U": "20-2b-4e-ae-cb-c0", "V": "00-7e-e0", "W": "00-3e-76-be-e0", "X": "10-de d0-1e", "Y": "00-77-e0 77-7e",
    "Z": "00-e0-0e-ee",
}  # fmt: skip


def letters() -> tuple[list[str], NDArray[np.int8]]:
    """A to Z, and their pictures [26, 256]: rows from the top, ink +1, paper -1."""
    pictures = np.stack([_picture(strokes) for strokes in _STROKES.values()])
    return list(_STROKES), np.where(pictures, 1, -1).astype(np.int8)


def letters_cell() -> Hopfield:
    """The network of the bundle letters-hopfield."""
    from engram_models.hopfield import Hopfield  # with torch, which the demo does without

    labels, patterns = letters()
    return Hopfield.of(patterns, labels, RULE)


def draw(pattern: NDArray[Any]) -> str:
    """A pattern [side * side] of -1, 0 (unknown) and +1, or 0-1 as bool, as lines of text, two columns a pixel."""
    side = round(len(pattern) ** 0.5)
    rows = np.where(pattern, 1, -1) if pattern.dtype == np.bool_ else np.sign(pattern).astype(int)
    return "\n".join("".join((_UNKNOWN, _ON, _OFF)[unit] for unit in row) for row in rows.reshape(-1, side))


def half_replaced(patterns: NDArray[np.int8], half: str, generator: np.random.Generator) -> NDArray[np.int8]:
    """Pictures [n, 256] with one half, "lower", "upper", "left" or "right", replaced by noise: ink or paper as coins fall."""
    cues = patterns.copy().reshape(-1, SIDE, SIDE)
    middle = SIDE // 2
    place = {
        "lower": np.s_[:, middle:],
        "upper": np.s_[:, :middle],
        "left": np.s_[:, :, :middle],
        "right": np.s_[:, :, middle:],
    }
    part = cues[place[half]]
    part[:] = generator.choice(np.array([-1, 1], np.int8), part.shape)
    return cues.reshape(len(patterns), -1)


def _picture(strokes: str) -> NDArray[np.bool_]:
    ink = np.zeros((SIDE, SIDE), np.bool_)
    for stroke in strokes.split():
        points = [(int(point[0], 16), int(point[1], 16)) for point in stroke.split("-")]
        for (x0, y0), (x1, y1) in pairwise(points):
            steps = max(abs(x1 - x0), abs(y1 - y0))
            for step in range(steps + 1):
                x, y = ((2 * (a * (steps - step) + b * step) + steps) // (2 * steps) for a, b in ((x0, x1), (y0, y1)))
                ink[y : y + _PEN, x : x + _PEN] = True
    return ink.ravel()
