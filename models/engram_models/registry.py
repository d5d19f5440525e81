"""The kinds of models that can be served. A new kind of ours is a module with a Cell and a line here; others are registered."""

from __future__ import annotations

import re

from engram_models.bidirectional import KINDS as BIDIRECTIONAL
from engram_models.boltzmann import KINDS as BOLTZMANN
from engram_models.cell import Cell
from engram_models.hopfield import KINDS as HOPFIELD
from engram_models.normalised import KINDS as NORMALISED
from engram_models.ntm import KINDS as NTM
from engram_models.recurrent import KINDS as RECURRENT

_KINDS: dict[str, type[Cell]] = {
    kind.kind: kind for kind in (*RECURRENT, *BIDIRECTIONAL, *NORMALISED, *NTM, *BOLTZMANN, *HOPFIELD)
}
_OURS = frozenset({*_KINDS, "onnx"})  # the last is what imported graphs are
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
    other = _KINDS.get(kind)
    if other is not None and (other.__module__, other.__qualname__) != (cell.__module__, cell.__qualname__):
        raise ValueError(f"{cell.__name__}.kind is {kind!r}, which {other.__module__}:{other.__qualname__} is already")
    _KINDS[kind] = cell


def cell_type(kind: str) -> type[Cell] | None:
    return _KINDS.get(kind)


def kinds() -> list[str]:
    return sorted(_KINDS)
