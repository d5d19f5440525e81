"""The handwritten digits: those that training reads, and those that ship because no training ever saw them.

The held-out ones are what the demo streams and the tests read; the split is made where the digits' own experiments ask for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save_file

from engram_models.bundle import shipped_models_dir
from engram_models.files import read_file

_FILE = "digits-heldout.safetensors"
_BYTES_MAX = 16 << 20
_BRIGHTEST = 16  # the digits' pixels are 0..16
_SPLIT_SEED = 1797
_HELD_OUT_PER_CLASS = 36


class Digits(NamedTuple):
    """Images of handwritten digits and what they show."""

    images: NDArray[np.uint8]  # [n, 8, 8], 0..16
    labels: NDArray[np.int64]  # [n], 0..9

    @property
    def rows(self) -> NDArray[np.float32]:
        """What the model reads: float32 [n, 8 rows, 8 values], 0..1, top row first."""
        return (self.images / np.float32(_BRIGHTEST)).astype(np.float32)


def heldout_digits(directory: Path | None = None) -> Digits:
    """The held-out digits beside the bundles in `directory` (default: the shipped ones), in shuffled order."""
    tensors = load(read_file((directory or shipped_models_dir()) / _FILE, _BYTES_MAX))
    return Digits(tensors["images"], tensors["labels"])


def split_digits() -> tuple[Digits, Digits]:
    """(training, held-out) parts of scikit-learn's digits: the same for everyone, all classes alike in the latter.

    1,797 images, 36 of each class held out: neither training nor any choice of a recipe's numbers may look at those. Raises
    ImportError without scikit-learn, which the extra `train` brings.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    per_class = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    held = generator.permutation(np.concatenate([rows[:_HELD_OUT_PER_CLASS] for rows in per_class]))
    trained = generator.permutation(np.concatenate([rows[_HELD_OUT_PER_CLASS:] for rows in per_class]))
    data = Digits(images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.int64))
    return Digits(data.images[trained], data.labels[trained]), Digits(data.images[held], data.labels[held])


def save_heldout_digits(digits: Digits, directory: Path) -> Path:
    path = directory / _FILE
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"images": np.ascontiguousarray(digits.images), "labels": np.ascontiguousarray(digits.labels)}, path)
    path.chmod(0o644)
    return path
