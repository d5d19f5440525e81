"""Engram's models: cells, the bundles that carry them, the probe that finds how they may be batched, and training.

Names are imported when they are first asked for: torch, which takes seconds, is there for those who use it and not for whoever
reads a file (files.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_models.bidirectional import Bidirectional
    from engram_models.boltzmann import DBN, RBM, feed_forward, initialise
    from engram_models.bundle import (
        Bundle,
        BundleError,
        BundleRef,
        Repository,
        load_bundle,
        shipped_models_dir,
        version_key,
    )
    from engram_models.bundle_writing import write_graph_bundle
    from engram_models.cell import Cell, State
    from engram_models.cell_bundles import CellStep, cell_floor, load_cell, write_bundle
    from engram_models.check import CheckVector
    from engram_models.digits import Digits, heldout_digits
    from engram_models.graph_step import GraphError, GraphStep
    from engram_models.hopfield import Hopfield
    from engram_models.importers import bundle_from_torch
    from engram_models.normalised import Normalised
    from engram_models.ntm import NTM, content_addressing
    from engram_models.pattern_bits import PatternError
    from engram_models.pattern_rules import RULES
    from engram_models.patterns import LABEL_BYTES_MAX, PatternMemory, Recalled
    from engram_models.probe import batch_floor
    from engram_models.recurrent import GRU, LSTM, GRUResetAfter, PeepholeLSTM, VanillaRNN
    from engram_models.spec import Schema, TensorSpec

__all__ = [
    "DBN",
    "GRU",
    "LABEL_BYTES_MAX",
    "LSTM",
    "NTM",
    "RBM",
    "RULES",
    "Bidirectional",
    "Bundle",
    "BundleError",
    "BundleRef",
    "Cell",
    "CellStep",
    "CheckVector",
    "Digits",
    "GRUResetAfter",
    "GraphError",
    "GraphStep",
    "Hopfield",
    "Normalised",
    "PatternError",
    "PatternMemory",
    "PeepholeLSTM",
    "Recalled",
    "Repository",
    "Schema",
    "State",
    "TensorSpec",
    "VanillaRNN",
    "batch_floor",
    "bundle_from_torch",
    "cell_floor",
    "content_addressing",
    "feed_forward",
    "heldout_digits",
    "initialise",
    "load_bundle",
    "load_cell",
    "shipped_models_dir",
    "version_key",
    "write_bundle",
    "write_graph_bundle",
]

_HOMES = {  # module: the names that it has
    "bidirectional": "Bidirectional",
    "boltzmann": "DBN RBM feed_forward initialise",
    "bundle": "Bundle BundleError BundleRef Repository load_bundle shipped_models_dir version_key",
    "bundle_writing": "write_graph_bundle",
    "cell": "Cell State",
    "cell_bundles": "CellStep cell_floor load_cell write_bundle",
    "check": "CheckVector",
    "digits": "Digits heldout_digits",
    "graph_step": "GraphError GraphStep",
    "hopfield": "Hopfield",
    "importers": "bundle_from_torch",
    "normalised": "Normalised",
    "ntm": "NTM content_addressing",
    "pattern_bits": "PatternError",
    "pattern_rules": "RULES",
    "patterns": "LABEL_BYTES_MAX PatternMemory Recalled",
    "probe": "batch_floor",
    "recurrent": "GRU LSTM GRUResetAfter PeepholeLSTM VanillaRNN",
    "spec": "Schema TensorSpec",
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
