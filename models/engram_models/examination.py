"""Looks at a bundle in a process of its own: does it compute what it recorded, and how may its rows be batched?

A graph from a stranger may take all memory, never end, or end its process; so it runs there first. For the service's catalog and
`engram models check`.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_models.bundle import GRAPH, WEIGHTS, Bundle, BundleError, load_bundle
from engram_models.check import CheckError
from engram_models.graph_step import ALONE, Batching, GraphError, GraphStep
from engram_models.importing import sandbox
from engram_models.importing.errors import ImportRefused
from engram_models.probe import batch_floor

TILE_ROWS = 32
_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Examination:
    """How the rows of one bundle may be batched on ONNX Runtime, on this machine."""

    floor: int | None
    tile: int

    @property
    def batching(self) -> Batching:
        return Batching(self.floor, self.tile)


def examine(bundle: Bundle, rows_max: int) -> Examination:
    """Raises BundleError where it computes something else, or does what no bundle may do to the process that runs it."""
    size = sum((bundle.path / name).stat().st_size for name in (GRAPH, WEIGHTS))
    arguments = {"path": str(bundle.path.absolute()), "rows_max": rows_max}
    with tempfile.TemporaryDirectory(prefix="engram-") as folder:
        try:
            found = sandbox.run(f"{__name__}:examined", Path(folder), arguments, sandbox.memory_limit(size), _SECONDS)
        except ImportRefused as error:
            raise BundleError(f"{bundle.path}: {error}") from error
    return Examination(**found)


def checked_step(bundle: Bundle, batching: Batching) -> GraphStep:
    """The bundle's step, after it has computed what was recorded. Raises BundleError."""
    try:
        step = GraphStep(bundle.read_graph(), bundle.schema, batching)
        bundle.check.verify(bundle.schema, step, bundle.tolerance)
    except (GraphError, CheckError) as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    return step


def examined(_: Path, path: str, rows_max: int) -> dict[str, Any]:
    """What `examine` has done in the process of its own. Raises ImportRefused, without the path."""
    from engram_models.importing.reading import check_graph, parse_model  # which has onnx

    try:
        bundle = load_bundle(Path(path))
        check_graph(parse_model(bundle.read_graph()))
        return asdict(_batching(bundle, rows_max))
    except BundleError as error:
        raise ImportRefused(str(error).removeprefix(f"{path}: ")) from error


def _batching(bundle: Bundle, rows_max: int) -> Examination:
    if bundle.one_by_one:
        checked_step(bundle, ALONE)
        return Examination(None, 1)
    step = checked_step(bundle, Batching())
    floor = batch_floor(step, bundle.schema, bundle.check, rows_max)
    if floor is not None:
        return Examination(floor, 1)
    alike = batch_floor(step, bundle.schema, bundle.check, TILE_ROWS, [TILE_ROWS]) is not None
    return Examination(None, TILE_ROWS if alike else 1)
