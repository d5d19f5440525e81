"""The kinds of cells that are made of no other cell: ours, and those that others register. registry.py has all kinds."""

from __future__ import annotations

from engram_models.bidirectional import KINDS as BIDIRECTIONAL
from engram_models.boltzmann import KINDS as BOLTZMANN
from engram_models.cell import Cell
from engram_models.hopfield import KINDS as HOPFIELD
from engram_models.ntm import KINDS as NTM
from engram_models.recurrent import KINDS as RECURRENT

PLAIN_KINDS: dict[str, type[Cell]] = {
    kind.kind: kind for kind in (*RECURRENT, *BIDIRECTIONAL, *NTM, *BOLTZMANN, *HOPFIELD)
}
