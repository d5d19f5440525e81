"""The kinds of models that can be served. A new kind is a module with a Cell and a line here."""

from __future__ import annotations

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


def cell_type(kind: str) -> type[Cell] | None:
    return _KINDS.get(kind)


def kinds() -> list[str]:
    return sorted(_KINDS)
