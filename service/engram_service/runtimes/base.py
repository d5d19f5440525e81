"""The interface of a runtime: one model on one device. catalog.py makes them; the step loop calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from engram_service.runtimes.arena import Arena


class RuntimeStoppedError(Exception):
    """A batch that took too long was stopped. Nothing of it was applied."""


@dataclass(slots=True)
class Advanced:
    """What a batch left: rows of bytes, in the order of the slots that were given."""

    outputs: NDArray[np.uint8]  # [n, output_nbytes]
    states: list[NDArray[np.uint8]]  # [n, bytes of a state tensor] each, in schema order; empty: as the arena has them


class Runtime(ABC):
    """Advances the sessions of one model, whose states are in its arena.

    A row must not feel who shares its batch (promise 5): each runtime sees to it in its own way, and `batching` says how.

    Attributes:
        name: for people, logs and metrics.
        row_s: how long a row takes, about; 0: not known.
        code: what a record says of the runtime that wrote it; never used again for another one. 0 is nobody's.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    row_s: float = 0.0

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    @property
    @abstractmethod
    def batching(self) -> str:
        """How rows of several sessions are computed, in words."""

    @abstractmethod
    def step(self, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None) -> Advanced:
        """One step of each slot, all of them different. The new states are in the arena then.

        inputs: uint8 [n, input_nbytes]; rows set in `feedback` take their last output instead. Whatever it raises, nothing was
        written.
        """


NAMES = {1: "onnx_graphs-cpu", 2: "torch_cells-cpu", 3: "torch_cells-cuda"}
"""What records say (`Runtime.code`), as logs and metrics say it."""
