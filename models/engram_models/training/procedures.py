"""The experiments by the names that recipes call them. Imported only when one is run: each brings its own libraries."""

from __future__ import annotations

from importlib import import_module

from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Experiment

_PROCEDURES = {
    "sequence": "engram_models.training.sequence:SequenceTraining",
    "gradient-flow": "engram_models.training.gradients:GradientFlow",
    "rbm-exact": "engram_models.training.rbm_exact:RBMExact",
    "dbn-digits": "engram_models.training.dbn_digits:DBNDigits",
    "hopfield-capacity": "engram_models.training.hopfield:HopfieldCapacity",
    "dense-recall": "engram_models.training.dense:DenseRecall",
    "letters": "engram_models.training.letters:Letters",
}


def procedure(name: str) -> type[Experiment]:
    """Raises TrainingError where there is none of that name."""
    if name not in _PROCEDURES:
        raise TrainingError(f"there is no procedure {name!r}; there are: {', '.join(_PROCEDURES)}")
    module, _, kind = _PROCEDURES[name].partition(":")
    found: type[Experiment] = getattr(import_module(module), kind)
    return found
