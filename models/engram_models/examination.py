"""Looks at bundles in a process of its own: are they whole, do they compute what they recorded, and how may they be batched?

`python -m engram_models.examination ROWS_MAX PATH...` prints a line of JSON for each, as it goes. A graph from a stranger may take all
memory, never end, or end its process; so it runs here first, and whoever serves it reads what was found (Examination).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from engram_models.bundle import Bundle, BundleError, load_bundle
from engram_models.check import CheckError
from engram_models.graph_step import ALONE, Batching, GraphError, GraphStep
from engram_models.probe import batch_floor

TILE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Examination:
    """Of one bundle on ONNX Runtime: how its rows may be batched, or the error."""

    path: str
    floor: int | None = None
    tile: int = 1
    error: str = ""

    @property
    def batching(self) -> Batching:
        return Batching(self.floor, self.tile)


def checked_step(bundle: Bundle, batching: Batching) -> GraphStep:
    """The bundle's step, after it has computed what was recorded. Raises BundleError."""
    try:
        step = GraphStep(bundle.read_graph(), bundle.schema, batching)
        bundle.check.verify(bundle.schema, step)
    except (GraphError, CheckError) as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    return step


def examine(path: Path, rows_max: int) -> Examination:
    """Raises BundleError."""
    bundle = load_bundle(path)
    if not bundle.graph:
        raise BundleError(f"{path}: it has no graph: it is a plug-in cell's, which torch computes")
    _check_graph(bundle)
    if bundle.one_by_one:
        checked_step(bundle, ALONE)
        return Examination(str(path), None, 1)
    step = checked_step(bundle, Batching())
    floor = batch_floor(step, bundle.schema, bundle.check, rows_max)
    if floor is not None:
        return Examination(str(path), floor)
    alike = batch_floor(step, bundle.schema, bundle.check, TILE_ROWS, [TILE_ROWS]) is not None
    return Examination(str(path), None, TILE_ROWS if alike else 1)


def _check_graph(bundle: Bundle) -> None:
    """Refuses what no bundle's graph may have: external data, operators of strangers, functions."""
    from engram_models.importing.errors import ImportRefused
    from engram_models.importing.reading import check_graph, parsed

    try:
        check_graph(parsed(bundle.read_graph()))
    except ImportRefused as error:
        raise BundleError(f"{bundle.path}: {error}") from error


def main(arguments: list[str]) -> None:
    rows_max, *paths = arguments
    for path in paths:
        try:
            found = examine(Path(path), int(rows_max))
        except BundleError as error:
            found = Examination(path, error=str(error))
        print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
