"""Patterns as text: what `engram store` and `engram recall` read and print. Raises ValueError with what a person can mend.

A pattern is 0110..., with or without commas or blanks between; or numbers with commas or blanks between, each -1 and +1 or
0 and 1. ? or _ stands for an unknown bit of a cue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO

from engram._commands.text import numbered

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MARKS = {"0": 0, "1": 1, "+1": 1, "-1": -1, "?": 2, "_": 2}
_UNKNOWN_MARK = 2


def pattern_of(text: str) -> NDArray[np.int8]:
    """A line's bits, int8 [N]: 0 and 1 or -1 and +1."""
    row = _row(text)
    if (row == _UNKNOWN_MARK).any():
        raise ValueError("a stored pattern has no unknown bits; ? and _ are for cues")
    return row


def cue_of(text: str) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """A line's bits, and which of them are unknown, [N] each."""
    row = _row(text)
    unknown = row == _UNKNOWN_MARK
    row[unknown] = 1  # which goes with either way to write a pattern
    return row, unknown


def labelled(text: str) -> tuple[str | None, NDArray[np.int8]]:
    """A line of a store: a label, then a tab or comma, then the pattern; or the pattern alone."""
    label, tab, rest = text.partition("\t")
    if tab:
        return label.strip(), pattern_of(rest)
    label, comma, rest = text.partition(",")
    if comma and label.strip() not in _MARKS:
        # A first field that is one bit is a bit: a label that looks like one needs the tab.
        return label.strip(), pattern_of(rest)
    return None, pattern_of(text)


def read_lines(blocks: Iterable[bytes]) -> tuple[list[str] | None, NDArray[np.int8]]:
    """Labels (None: no line has one) and patterns [n, N] of all lines that are not empty."""
    import numpy as np

    labels: list[str | None] = []
    rows: list[NDArray[np.int8]] = []
    for number, line in numbered(blocks):
        try:
            label, row = labelled(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if rows and len(row) != len(rows[0]):
            raise ValueError(f"line {number}: {len(row)} bits; the lines before have {len(rows[0])}")
        if labels and (label is None) != (labels[0] is None):
            raise ValueError(f"line {number}: give every line a label, or none")
        labels.append(label)
        rows.append(row)
    if not rows:
        raise ValueError("no patterns")
    named = [label for label in labels if label is not None]
    return named or None, np.stack(rows)


def read_npz(file: BinaryIO) -> tuple[list[str] | None, NDArray[np.int8]]:
    """Labels and patterns of an .npz with `patterns` [n, N] and, perhaps, `labels` [n]. Nothing in it is executed."""
    import zipfile

    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            if "patterns" not in arrays:
                raise ValueError(f"no array `patterns`; there are: {', '.join(arrays) or 'none'}")
            labels = [str(label) for label in arrays["labels"]] if "labels" in arrays else None
            return labels, arrays["patterns"]
    except (zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ValueError("not an .npz file") from error


def text_of(pattern: NDArray[np.int8]) -> str:
    """A pattern as a string of 0 and 1."""
    return "".join("1" if bit == 1 else "0" for bit in pattern.tolist())


def _row(text: str) -> NDArray[np.int8]:
    import numpy as np

    text = text.strip()
    if not text:
        raise ValueError("no bits")
    parts = re.split(r"[,\s]+", text) if re.search(r"[,\s]", text) else list(text)
    if len(parts) == 1 or any(part not in _MARKS for part in parts):
        parts = list("".join(parts))
    for place, part in enumerate(parts):
        if part not in _MARKS:
            raise ValueError(f"bit {place} is {part!r}; bits are 0 and 1, or -1 and +1 with commas between")
    row = np.array([_MARKS[part] for part in parts], np.int8)
    if (row == 0).any() and (row == -1).any():
        raise ValueError("the line has both 0 and -1; bits are 0 and 1, or -1 and +1")
    return row
