"""The kinds of models that can be served. A new kind of ours is a module with a Cell and a line in plain_kinds.py, or
here, if it wraps another cell; kinds of others are registered."""

from __future__ import annotations

import re

from engram_models.cell import Cell
from engram_models.normalised import KINDS as NORMALISED
from engram_models.plain_kinds import PLAIN_KINDS

_WRAPPING = {kind.kind: kind for kind in NORMALISED}  # these look for the cell within among the plain ones
_OURS = frozenset({*PLAIN_KINDS, *_WRAPPING, "onnx"})  # the last is what imported graphs are
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def register(cell: type[Cell]) -> None:
    """Adds a kind of somebody else's (plug_ins.py), for this process. Raises ValueError where it cannot be one."""
    kind = getattr(cell, "kind", None)
    if not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise ValueError(
            f"{cell.__name__}.kind is {kind!r}: give it a name of lower-case letters, digits and '-', at most 64"
        )
    if kind in _OURS:
        raise ValueError(f"{cell.__name__}.kind is {kind!r}, which is a kind of Engram's own: choose another")
    if cell.forward is Cell.forward:
        raise ValueError(f"{cell.__name__} has no forward of its own")
    other = PLAIN_KINDS.get(kind)
    if other is not None and (other.__module__, other.__qualname__) != (cell.__module__, cell.__qualname__):
        raise ValueError(f"{cell.__name__}.kind is {kind!r}, which {other.__module__}:{other.__qualname__} is already")
    PLAIN_KINDS[kind] = cell


def cell_type(kind: str) -> type[Cell] | None:
    return _WRAPPING.get(kind) or PLAIN_KINDS.get(kind)


def kinds() -> list[str]:
    return sorted({*PLAIN_KINDS, *_WRAPPING})
