"""The handwritten digits that ship with `digits-reader`: those that its training never saw. For the demo and the tests."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from engram_models.bundle import shipped_models_dir

_FILE = "digits-heldout.safetensors"
_BRIGHTEST = 16  # the digits' pixels are 0..16


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
    tensors = load_file((directory or shipped_models_dir()) / _FILE)
    return Digits(tensors["images"], tensors["labels"])


def save_heldout_digits(digits: Digits, directory: Path) -> Path:
    path = directory / _FILE
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"images": np.ascontiguousarray(digits.images), "labels": np.ascontiguousarray(digits.labels)}, path)
    path.chmod(0o644)
    return path
