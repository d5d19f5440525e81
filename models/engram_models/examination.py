"""Looks at a bundle in a process of its own: does it compute what it recorded, how may its rows be batched, how slow is it?

A graph from a stranger may take all memory, never end, or end its process; so it runs there first. For the service's catalog and
`engram models check`, which need no ONNX Runtime for it.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from engram_models.batching import Batching
from engram_models.bundle import GRAPH, WEIGHTS, Bundle, BundleError
from engram_models.importing import sandbox
from engram_models.importing.errors import ImportRefusedError, KilledError

log = logging.getLogger(__name__)

TILE_ROWS = 32
_SECONDS = 120.0
_TRIES = 2


@dataclass(frozen=True, slots=True)
class Examination:
    """How the rows of one bundle may be batched on ONNX Runtime, on this machine."""

    floor: int | None
    tile: int
    row_s: float = field(default=0.0, compare=False)  # of a processor, that a row takes in such batches

    @property
    def batching(self) -> Batching:
        return Batching(self.floor, self.tile)


def examine(bundle: Bundle, rows_max: int, stopped: threading.Event | None = None, niceness: int = 0) -> Examination:
    """Raises BundleError where it computes something else, or does what no bundle may do to the process that runs it.

    Once `stopped` is set, it ends at once. A process that was killed from outside is given another try.
    """
    size = sum((bundle.path / name).stat().st_size for name in (GRAPH, WEIGHTS))
    named = {"fingerprint": bundle.fingerprint, "graph": bundle.graph}
    arguments = {"path": str(bundle.path.absolute()), "rows_max": rows_max, **named}
    for left in reversed(range(_TRIES)):
        with tempfile.TemporaryDirectory(prefix="engram-") as folder:
            try:
                found = sandbox.run(
                    "engram_models.inspection:inspected", Path(folder), arguments, sandbox.memory_limit(size), _SECONDS,
                    stopped=stopped, niceness=niceness,
                )  # fmt: skip
                break
            except ImportRefusedError as error:
                if not (left and isinstance(error, KilledError)):
                    raise BundleError(f"{bundle.path}: {error}") from error
                log.warning("model %s is examined once more: %s", bundle.reference, error)
    return Examination(**found)
