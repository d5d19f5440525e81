"""What is asked of a model beside its steps: an NTM's memory by content, a Boltzmann machine's recreation. For api/memory.py.

Changes nothing: neither arena nor session. NumPy alone, on whatever device the model's steps are computed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engram_models import addressing
from engram_models.bundle import Bundle
from engram_models.recreation import KINDS, Recreation
from engram_models.spec import TensorSpec
from engram_service.rows import rows_of

Floats = NDArray[np.float32]


def addressable(bundle: Bundle) -> TensorSpec | None:
    """The state tensor, float32 [locations, width], that can be asked by content; None: the model has none."""
    found = [
        spec
        for spec in bundle.schema.state
        if spec.role == "memory" and spec.dtype == "float32" and len(spec.shape) == 2
    ]
    return found[0] if found else None


def address(bundle: Bundle, state: NDArray[np.uint8], keys: Floats, strengths: Floats) -> tuple[Floats, Floats]:
    """Weightings [n, N] and reads [n, M] of keys [n, M] with strengths [n], in the memory of a state [state_nbytes].

    `bundle` is addressable."""
    wanted = addressable(bundle)
    assert wanted is not None
    at = rows_of(bundle.schema.state).slices[bundle.schema.state.index(wanted)]
    memory = np.ascontiguousarray(state[at]).view(np.float32).reshape(wanted.shape)
    return addressing.address(memory, keys, strengths)


def recreates(bundle: Bundle) -> bool:
    return bundle.kind in KINDS


class Recreations:
    """The models that recreate inputs, as far as they were asked to. One thread's."""

    def __init__(self) -> None:
        self._made: dict[str, Recreation] = {}  # by fingerprint

    def recreate(
        self, bundle: Bundle, inputs: Floats, unknown: NDArray[np.bool_] | None, sweeps: int
    ) -> tuple[Floats, Floats]:
        """Recreations [n, visible] of inputs [n, visible], and energies [n, sweeps + 1]; known units keep their values.

        Without `unknown` every unit is recreated. Raises ValueError where a known unit is not within 0..1, and BundleError
        where the model's weights cannot be read any more."""
        if bundle.fingerprint not in self._made:
            weights = {name: tensor.values for name, tensor in bundle.read_weights().items()}
            self._made[bundle.fingerprint] = Recreation(bundle.kind, bundle.config, weights)
        known = None if unknown is None else ~unknown
        recreations, energies = self._made[bundle.fingerprint].recreate(inputs, known, sweeps)
        return recreations.astype(np.float32), energies.astype(np.float32)
