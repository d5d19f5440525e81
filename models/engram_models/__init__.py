"""Engram's models: cells, the bundles that carry them, the probe that finds how they may be batched, and training."""

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
    write_bundle,
)
from engram_models.cell import Cell, State
from engram_models.digits import Digits, heldout_digits
from engram_models.hopfield import Hopfield
from engram_models.importers import bundle_from_torch
from engram_models.normalised import Normalised
from engram_models.ntm import NTM, content_addressing
from engram_models.pattern_bits import PatternError
from engram_models.pattern_rules import RULES
from engram_models.patterns import LABEL_BYTES_MAX, PatternMemory, Recalled
from engram_models.probe import batch_floor
from engram_models.recurrent import GRU, LSTM, GRUResetAfter, PeepholeLSTM, VanillaRNN
from engram_models.spec import TensorSpec

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
    "Digits",
    "GRUResetAfter",
    "Hopfield",
    "Normalised",
    "PatternError",
    "PatternMemory",
    "PeepholeLSTM",
    "Recalled",
    "Repository",
    "State",
    "TensorSpec",
    "VanillaRNN",
    "batch_floor",
    "bundle_from_torch",
    "content_addressing",
    "feed_forward",
    "heldout_digits",
    "initialise",
    "load_bundle",
    "shipped_models_dir",
    "version_key",
    "write_bundle",
]
