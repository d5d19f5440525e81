"""A proposal as people and programs read it: one line for each tensor, and how it is known. For the import command."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_models.importing.interface import dim_words
from engram_models.importing.proposal import Line, Proposal

_HEADER = ("TENSOR", "ROLE", "PAIRED WITH", "BATCH AXIS", "DTYPE", "SHAPE", "INITIAL", "HOW IT KNOWS")
_WIDTH_MAX = 44


def table(proposal: Proposal) -> list[str]:
    """Aligned lines. Shapes are as served; where they are not known yet, as the file has them."""
    rows = [_HEADER, *(_row(line, proposal.settled) for line in proposal.lines)]
    widths = [min(_WIDTH_MAX, max(len(row[column]) for row in rows)) for column in range(len(_HEADER) - 1)]
    return ["  ".join([*(_cell(c, w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]


def as_json(proposal: Proposal) -> list[dict[str, Any]]:
    return [
        {
            "tensor": line.tensor, "role": line.role, "paired_with": line.output or line.of, "batch_axis": line.axis,
            "dtype": line.dtype, "shape": list(line.shape) if proposal.settled else None, "initial": _initial(line),
            "how": "; ".join(filter(None, line.how)),
        }
        for line in proposal.lines
    ]  # fmt: skip


def understood(proposal: Proposal) -> list[str]:
    """For the manifest: a line of text for each tensor."""
    lines = []
    for line in proposal.lines:
        tensor, role, paired, axis, *_, how = _row(line, True)
        fed = f" from {paired}" if paired != "-" else ""
        lines.append(f"{role} {tensor}{fed}, batch axis {axis}: {how}")
    return lines


def _row(line: Line, known: bool) -> tuple[str, ...]:
    paired = f"{line.output}:{line.context}" if line.role == "window" and line.output else line.output
    paired = f"past of {line.of}" if line.of else paired
    if known:
        shape = "x".join(map(str, line.shape)) or "scalar"
        axis = ("none" if line.axis is None else str(line.axis)) if not line.of else "-"
    else:
        shape, axis = "-" if line.dims is None else "x".join(dim_words(dim) for dim in line.dims) or "scalar", "?"
    return (
        line.tensor,
        line.role,
        paired or "-",
        axis,
        line.dtype,
        shape,
        _initial(line),
        "; ".join(filter(None, line.how)),
    )


def _initial(line: Line, known: bool = True) -> str:
    if not line.is_state:
        return "-"
    if isinstance(line.initial, np.ndarray):
        return f"array, {line.initial_words}"
    if not known or not line.initial_words:
        return line.initial_words or "?"
    return f"{line.initial:g}" if line.initial_words == "zero" else f"{line.initial:.10g}, {line.initial_words}"


def _cell(text: str, width: int) -> str:
    return (text if len(text) <= width else f"{text[: width - 3]}...").ljust(width)
