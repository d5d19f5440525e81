"""What is asked of one model beside its steps: an NTM's memory by content, a Boltzmann machine's recreations, a network's patterns.

The catalog makes one with each model; protocols/engram/memory.py and patterns/memories.py ask. Changes nothing, neither arena nor
session, and needs the model's weights alone, whatever runs its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram_models import Bundle, BundleError, PatternMemory, TensorSpec, recreation
from engram_models.addressing import address
from engram_models.patterns import own_memory

Floats = NDArray[np.float32]

_T = TypeVar("_T")


class Queries:
    """Of one model. Thread-safe."""

    addressable: TensorSpec | None
    """The state tensor, float32 [locations, width], that can be asked by content; None: the model has none."""
    patterns: PatternMemory | None
    """The model's own, which a session's memory begins with, and which nobody changes; None: its sessions keep none."""

    def __init__(self, bundle: Bundle) -> None:
        """Reads the weights where they are asked for. Raises BundleError where they do not fit."""
        found = [spec for spec in bundle.schema.state if spec.role == "memory" and spec.dtype == "float32"]
        self.addressable = next((spec for spec in found if len(spec.shape) == 2), None)
        before = bundle.schema.state[: bundle.schema.state.index(self.addressable)] if self.addressable else ()
        self._start = sum(spec.nbytes for spec in before)
        self._recreation: recreation.Recreation | None = None
        self.patterns = None
        if bundle.kind in recreation.KINDS:
            self._recreation = _made(
                bundle, lambda weights: recreation.Recreation(bundle.kind, bundle.config, weights), _visible
            )
        elif bundle.kind == "hopfield":
            self.patterns = _made(bundle, lambda weights: own_memory(bundle.config, weights), _size)

    @property
    def recreates(self) -> bool:
        return self._recreation is not None

    def address(self, state: NDArray[np.uint8], keys: Floats, strengths: Floats) -> tuple[Floats, Floats]:
        """Weightings [n, N] and reads [n, M] of keys [n, M] with strengths [n], in the memory of a state [state_nbytes]."""
        spec = self.addressable
        assert spec is not None
        values = np.frombuffer(state.tobytes(), np.float32, spec.size, self._start)
        return address(values.reshape(spec.shape), keys, strengths)

    def recreate(self, inputs: Floats, unknown: NDArray[np.bool_] | None, sweeps: int) -> tuple[Floats, Floats]:
        """Recreations [n, visible] of inputs [n, visible], and energies [n, sweeps + 1]; known units keep their values.

        Without `unknown` every unit is recreated. Raises ValueError where a known unit is not within 0..1.
        """
        assert self._recreation is not None
        values, energies = self._recreation.recreate(inputs, None if unknown is None else ~unknown, sweeps)
        return values.astype(np.float32), energies.astype(np.float32)


def _made(bundle: Bundle, make: Callable[[Mapping[str, NDArray[Any]]], _T], size: Callable[[_T], int]) -> _T:
    """What `make` makes of the weights, if its size is that of the model's one input."""
    weights = {name: tensor.values for name, tensor in bundle.read_weights().items()}
    try:
        made = make(weights)
    except (TypeError, ValueError, OverflowError) as error:
        raise BundleError(f"{bundle.path}: the weights and the config do not fit: {error}") from error
    if [spec.shape for spec in bundle.schema.inputs] != [(size(made),)]:
        shapes = [list(spec.shape) for spec in bundle.schema.inputs]
        raise BundleError(f"{bundle.path}: the inputs are {shapes}, its weights take [{size(made)}]")
    return made


def _visible(made: recreation.Recreation) -> int:
    return made.visible


def _size(made: PatternMemory) -> int:
    return made.size
