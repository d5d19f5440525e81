"""Proves a graph in normal form before it is served, and compares it with a run that its owner recorded. For the import command.

The graph runs in the sandbox (trials.py, replay.py); here is what goes there and what comes back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.check import CheckVector
from engram_models.importing import replay, sandbox
from engram_models.importing.arrays import read_arrays
from engram_models.importing.numbers import TOLERANCE
from engram_models.importing.trials import Dependent, Trials
from engram_models.spec import Schema, TensorSpec

Arrays = Mapping[str, NDArray[Any]]
Progress = Callable[[str], None]

_CHECK = "check.npz"


@dataclass(frozen=True)
class Proof:
    """What was shown of a graph, and a run of it for the bundle."""

    same_bits: bool
    """Every row had the same bits in every batch as alone."""
    tolerance: float
    """Else the largest difference of a number from the same row alone, in parts of max(1, |y|)."""
    one_by_one: bool
    """Rows have to be given to the graph one by one, and `why` says why."""
    why: str
    finite: bool
    """Outputs and states are finite on ordinary inputs."""
    notes: tuple[str, ...]
    """What its owner should know, a sentence each."""
    rows: int
    sizes: tuple[int, ...]
    calls: int
    check: CheckVector


@dataclass(frozen=True)
class Verified:
    """A recorded run that the graph gave again."""

    steps: int
    rows: int
    largest: float
    """Largest difference, in parts of max(1, |y|)."""


def prove(
    graph: bytes,
    schema: Schema,
    initial: Arrays,
    *,
    one_by_one: str = "",
    examples: Arrays | None = None,
    seconds: float = sandbox.SECONDS,
    progress: Progress | None = None,
) -> Proof:
    """initial: [*shape] by name of state; zeros, or the schema's value, where there is none. Raises ImportRefusedError.

    one_by_one: why rows go one by one whatever is proved (a static batch). examples: inputs of a real run, as for `verify`.
    """
    taken = {name: array for name, array in (examples or {}).items() if name in {spec.name for spec in schema.inputs}}
    with _folder(graph, initial, taken) as folder:
        found = sandbox.run(
            f"{__name__}:prove_here", folder, {"schema": _told(schema), "one_by_one": one_by_one},
            sandbox.memory_limit(len(graph)), seconds, progress,
        )  # fmt: skip
        recorded = read_arrays(folder / _CHECK)
    lists = [[recorded[f"{kind}{place}"] for place in range(count)] for kind, count in _counts(schema)]
    return Proof(**{**found, "notes": tuple(found["notes"]), "sizes": tuple(found["sizes"])}, check=CheckVector(*lists))


def verify(
    graph: bytes,
    schema: Schema,
    initial: Arrays,
    vector: Arrays,
    *,
    allowed: float = TOLERANCE,
    seconds: float = sandbox.SECONDS,
    progress: Progress | None = None,
) -> Verified:
    """vector: inputs and outputs by name, [steps, *shape] or [steps, rows, *shape]. Raises ImportRefusedError where one differs."""
    replay.arranged(schema, vector)
    with _folder(graph, initial, vector) as folder:
        found = sandbox.run(
            f"{__name__}:verify_here", folder, {"schema": _told(schema), "allowed": allowed},
            sandbox.memory_limit(len(graph) + sum(array.nbytes for array in vector.values())), seconds, progress,
        )  # fmt: skip
    return Verified(**found)


def prove_here(folder: Path, schema: dict[str, Any], one_by_one: str) -> dict[str, Any]:
    """The sandbox's part of `prove`."""
    asked = _heard(schema)
    graph, initial, examples = _given(folder)
    arranged = {
        spec.name: replay.arranged_one(spec, examples[spec.name]) for spec in asked.inputs if spec.name in examples
    }
    trials = Trials(graph, asked, initial, arranged)
    trials.run_alone()
    why = one_by_one
    if not why:
        try:
            trials.run_together()
        except Dependent as error:
            why = f"outputs may depend on the batch: {error}"
    found = trials.findings
    check = trials.recorded(alone=bool(why))
    kept = {"input": check.inputs, "before": check.before, "output": check.outputs, "after": check.after}
    named: Any = {f"{kind}{place}": array for kind, arrays in kept.items() for place, array in enumerate(arrays)}
    np.savez(folder / _CHECK, **named)
    return {
        "same_bits": bool(why) or not found.largest, "tolerance": 0.0 if why else found.largest,
        "one_by_one": bool(why), "why": why,
        "finite": found.finite, "notes": found.notes, "rows": found.rows, "sizes": found.sizes, "calls": found.calls,
    }  # fmt: skip


def verify_here(folder: Path, schema: dict[str, Any], allowed: float) -> dict[str, Any]:
    """The sandbox's part of `verify`."""
    graph, initial, vector = _given(folder)
    steps, rows, largest = replay.replay(graph, _heard(schema), initial, vector, allowed)
    return {"steps": steps, "rows": rows, "largest": largest}


@contextmanager
def _folder(graph: bytes, initial: Arrays, given: Arrays) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="engram-import-") as name:
        folder = Path(name)
        (folder / "step.onnx").write_bytes(graph)
        _save(folder / "initial.npz", initial)
        _save(folder / "given.npz", given)
        yield folder


def _save(path: Path, arrays: Arrays) -> None:
    """Under names of our own: those of a stranger may be paths."""
    order = sorted(arrays)
    named = {f"a{place}": np.asarray(arrays[name]) for place, name in enumerate(order)}
    np.savez(path, names=np.frombuffer("\0".join(order).encode(), np.uint8), **named)  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, NDArray[Any]]:
    arrays = read_arrays(path)
    order = arrays.pop("names").tobytes().decode()
    return {name: arrays[f"a{place}"] for place, name in enumerate(order.split("\0") if arrays else ())}


def _given(folder: Path) -> tuple[bytes, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    return (folder / "step.onnx").read_bytes(), _load(folder / "initial.npz"), _load(folder / "given.npz")


def _counts(schema: Schema) -> list[tuple[str, int]]:
    return [
        ("input", len(schema.inputs)), ("before", len(schema.state)), ("output", len(schema.outputs)), ("after", len(schema.state))
    ]  # fmt: skip


def _told(schema: Schema) -> dict[str, Any]:
    return {part: [asdict(spec) for spec in getattr(schema, part)] for part in ("inputs", "outputs", "state")}


def _heard(told: dict[str, Any]) -> Schema:
    parts = {
        part: tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs)
        for part, specs in told.items()
    }
    return Schema(**parts)
