"""What the modules of the bench share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[str], None]


class Plain(Protocol):
    """A model as a library computes it, with no serving at all: what the server is compared with, in speed and in outputs."""

    name: str  # of the library, for people

    def running(self, threads: int) -> AbstractContextManager[object]:
        """Steps are made in it."""

    def inputs(self, pool: NDArray[np.float32]) -> Sequence[Any]:
        """Batches of inputs, as the library has them."""

    def initial(self, rows: int) -> Any:
        """The state of so many new sessions."""

    def step(self, x: Any, state: Any) -> tuple[Any, Any]:
        """One batch: -> outputs, new states. What it gives has been computed, not only begun."""

    def values(self, y: Any) -> NDArray[np.float32]:
        """Outputs as numbers, [rows, *shape]."""
