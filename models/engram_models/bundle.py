"""Bundles: a served model on disk, read and verified without torch. Nothing in one executes.

    <directory>/<name>/<version>/model.toml           kind, config, tensors, fingerprint; how the step may be called
    <directory>/<name>/<version>/step.onnx            the step as an ONNX graph, weights within; a plug-in cell's bundle has none
    <directory>/<name>/<version>/weights.safetensors  weight.*: a cell's parameters; initial.*: initial values that are arrays;
                                                      check.*: the recorded check vector (check.py)

The step's graph is in the normal form: its inputs are the schema's inputs and then all state tensors, its outputs the schema's
outputs and then the new values of the state tensors that are not constant, in schema order and bound by place, each
[batch, *shape], and a shared one [*shape]. bundle_writing.py writes bundles, cell_bundles.py makes cells of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from engram_models.check import CheckError, CheckVector
from engram_models.files import is_passing, read_file, read_toml
from engram_models.fingerprints import IMPORTED, fingerprint, graph_digest
from engram_models.memory_files import OPEN_FILES, copied, has_memory_files, memory_bytes, open_in_memory
from engram_models.spec import Schema, TensorSpec
from engram_models.tensor_file import StoredTensor, Tensors, read_tensors

_T = TypeVar("_T")

FORMAT = 2
ONE_BY_ONE, ANY = "one-by-one", "any"
MANIFEST, WEIGHTS, GRAPH = "model.toml", "weights.safetensors", "step.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "name and version are letters, digits, '.', '_' and '-', at most 64"
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:-]{0,127}")
SIZE_MAX = 1 << 40  # numbers of a tensor, so that no size overflows; what memory is there for, the service says
TENSORS_MAX = 4096
_MEMORY_SHARE = 4  # files may have that part (1/n) of the machine's memory: they are there twice while they are loaded
_KEYS: dict[str, type] = {
    "format": int, "kind": str, "description": str, "allows_non_finite": bool, "fingerprint": str,
    "config": dict, "step": dict, "input": list, "output": list, "state": list,
}  # fmt: skip
_STEP_KEYS: dict[str, type] = {"graph": str, "batch": str, "why": str, "tolerance": float}
_KIND_WORDS = {
    int: "a whole number", str: "a string", bool: "true or false", dict: "a table", list: "tables", float: "a number",
}  # fmt: skip


class BundleError(Exception):
    """A bundle that cannot be served; the message says which file, what is wrong, and what was expected.

    Where the machine and not the bundle is to blame (no descriptor left, a file system that is away) `passing` is true: what is
    on disk may be good, and is worth another try as it is.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model version: what its files say, verified against each other. Weights and graph stay on disk until they are asked for."""

    name: str
    version: str
    kind: str
    fingerprint: str  # 32 hex digits: equal fingerprints mean equal weights, sizes and schema
    schema: Schema
    config: Mapping[str, Any]
    graph: str  # digest of step.onnx, 32 hex digits; "": there is none
    batch: str  # ANY or ONE_BY_ONE
    why: str  # one by one
    tolerance: float  # the largest difference between a row alone and among others that an import measured; 0: none
    allows_non_finite: bool
    description: str
    path: Path
    check: CheckVector
    initials: Mapping[str, NDArray[Any]]  # of state tensors whose initial value is an array, [*shape]

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def state_nbytes(self) -> int:
        return self.schema.state_nbytes

    @property
    def one_by_one(self) -> bool:
        return self.batch == ONE_BY_ONE

    def initial(self, spec: TensorSpec) -> NDArray[Any]:
        """A state tensor's initial value, [*shape]."""
        return self.initials.get(spec.name, initial_value(spec))

    @cached_property
    def initial_row(self) -> NDArray[np.uint8]:
        """The initial state as a row of bytes, uint8 [state_nbytes]."""
        values = [np.ascontiguousarray(self.initial(spec)).reshape(-1).view(np.uint8) for spec in self.schema.state]
        return np.concatenate([np.empty(0, np.uint8), *values])

    def initial_states(self, rows: int) -> list[NDArray[Any]]:
        """[rows, *shape] of each state tensor."""
        return [np.repeat(self.initial(spec)[None], rows, 0) for spec in self.schema.state]

    def read_graph(self) -> bytes:
        """Raises BundleError where it is not the one that the manifest names."""
        return _read_graph(self.path, self.graph)

    @contextlib.contextmanager
    def graph_file(self) -> Iterator[bytes | str]:
        """The same for whoever gives it to ONNX Runtime while others of this process's threads are busy: as the path of a copy in
        memory, where there are such. Bytes of many megabytes are copied, and freed, under the interpreter's lock."""
        if not has_memory_files():
            yield self.read_graph()
            return
        with open_in_memory() as copy:
            if _read(self.path / GRAPH, lambda bytes_max: copied(self.path / GRAPH, copy, bytes_max)) != self.graph:
                raise _other_graph(self.path)
            yield f"{OPEN_FILES}/{copy.fileno()}"

    def read_weights(self) -> dict[str, StoredTensor]:
        """A cell's parameters by their names in the cell. Raises BundleError."""
        tensors = _tensors(self.path / WEIGHTS)
        if fingerprint(self.kind, self.config, self.schema, self.graph, tensors) != self.fingerprint:
            raise BundleError(f"{self.path}: the weights are not those that the bundle had when it was loaded")
        return {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}


@dataclass(frozen=True, slots=True)
class BundleRef:
    """A bundle that a repository has, not loaded."""

    name: str
    version: str
    path: Path


class Repository:
    """Directories of bundles. Where two have the same name and version, the earlier directory wins."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = list(directories)
        self._listed: dict[Path, list[str]] = {}  # what each directory had when it was last read

    def scan(self) -> tuple[list[BundleRef], list[str]]:
        """What is there, by name and ascending version, and what is wrong with what is not. Loads nothing."""
        found: dict[tuple[str, str], BundleRef] = {}
        errors: list[str] = []
        for directory in self._directories:
            for path in self._versions(directory, errors):
                name, version = path.parent.name, path.name
                if not NAME.fullmatch(name) or not NAME.fullmatch(version):
                    errors.append(f"{shown(path)}: {NAME_RULE}")
                    continue
                found.setdefault((name, version), BundleRef(name, version, path))
        return sorted(found.values(), key=lambda ref: (ref.name, version_key(ref.version))), errors

    def _versions(self, directory: Path, errors: list[str]) -> list[Path]:
        """Directories that have a manifest, be it one that can be read or not, and are not just being written."""
        versions: list[Path] = []
        for name in self._list(directory, errors, top=True):
            # What could not be a model anyway (lost+found) may be unreadable.
            found = self._list(directory / name, errors if NAME.fullmatch(name) else [])
            versions += [directory / name / version for version in found if not version.startswith(".")]
        return [path for path in versions if os.path.lexists(path / MANIFEST)]

    def _list(self, directory: Path, errors: list[str], top: bool = False) -> list[str]:
        """The names in a directory. Where it cannot be read just now, what it had before still counts."""
        try:
            self._listed[directory] = sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            if top:
                errors.append(f"{shown(directory)}: no such directory")
            self._listed.pop(directory, None)
        except OSError as error:
            errors.append(f"{shown(directory)}: {error.strerror}")
        return self._listed.get(directory, [])


def shown(path: Path) -> str:
    """A path as text that every log and every message can carry, whatever bytes are in it."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Orders versions with their numbers as numbers: 2 before 10, 1.9 before 1.10."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|[^\d._-]+", version)
    )


def shipped_models_dir() -> Path:
    """The bundles that come with the package."""
    return Path(__file__).parent / "bundles"


def load_bundle(path: Path, whole: bool = True) -> Bundle:
    """Reads a bundle and verifies its files against each other; runs nothing. Raises BundleError, whatever is wrong with it.

    Not `whole`: reads neither weights nor graph, for whoever has it verified by another process; nothing of it is proved then.
    """
    try:
        return _load(path, whole)
    except BundleError:
        raise
    except Exception as error:  # a file may be wrong in ways that nobody has thought of
        raise BundleError(f"{shown(path)}: {type(error).__name__}: {error}") from error


def initial_value(spec: TensorSpec) -> NDArray[Any]:
    """Where it is one number everywhere, [*shape]."""
    if spec.dtype == "bfloat16":
        return np.full(spec.shape, np.float32(spec.initial).view(np.uint32) >> 16, np.uint16)
    return np.full(spec.shape, spec.initial, spec.np_dtype)


def _load(path: Path, whole: bool) -> Bundle:
    manifest = _manifest(path / MANIFEST)
    step = _step_table(path / MANIFEST, manifest["step"])
    schema = _schema(path / MANIFEST, manifest)
    tensors = _tensors(path / WEIGHTS, () if whole else ("initial.", "check."))
    for key, tensor in tensors.items():
        if not key.startswith(("weight.", "initial.", "check.")):
            raise BundleError(f"{path}: {key} is not a weight, an initial value or part of the check vector")
        if not key.startswith("check.") and not tensor.finite:
            raise BundleError(f"{path}: {key} has NaN or infinity")
    found: str = manifest["fingerprint"]
    if whole:
        found = fingerprint(manifest["kind"], manifest["config"], schema, step["graph"], tensors)
    if manifest["fingerprint"] != found:
        raise BundleError(f"{path}: fingerprint {manifest['fingerprint']} is recorded, {found} is what the files give")
    if step["graph"] and whole:
        _read_graph(path, step["graph"])
    elif not step["graph"] and manifest["kind"] == IMPORTED:
        raise BundleError(f"{path}: a bundle of kind {IMPORTED} must name its graph")
    try:
        check = CheckVector.read(schema, tensors)
    except CheckError as error:
        raise BundleError(f"{path}: {error}") from error
    return Bundle(
        name=path.parent.name, version=path.name, kind=manifest["kind"], fingerprint=found, schema=schema,
        config=manifest["config"], graph=step["graph"], batch=step["batch"], why=step["why"], tolerance=step["tolerance"],
        allows_non_finite=manifest["allows_non_finite"], description=manifest["description"], path=path, check=check,
        initials=_initials(path, schema, tensors),
    )  # fmt: skip


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_toml(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error
    if manifest.get("format", FORMAT) != FORMAT:
        raise BundleError(f"{path}: format {manifest['format']}; this version reads {FORMAT}")
    _check_keys(path, "", manifest, _KEYS)
    try:
        json.dumps(manifest["config"])
    except TypeError as error:
        raise BundleError(
            f"{path}: config may have numbers, strings, true, false, lists and tables: {error}"
        ) from error
    if not _finite(manifest["config"]):
        raise BundleError(f"{path}: config has a number that is not finite")
    return manifest


def _check_keys(path: Path, place: str, table: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    if unknown := set(table) - set(keys):
        raise BundleError(f"{path}: there is no key {place + sorted(unknown)[0]!r}")
    if missing := set(keys) - set(table):
        raise BundleError(f"{path}: the key {place + sorted(missing)[0]!r} is missing")
    for key, kind in keys.items():
        if not isinstance(table[key], kind) or (kind is int and isinstance(table[key], bool)):
            raise BundleError(f"{path}: {place}{key} must be {_KIND_WORDS[kind]}")


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _step_table(path: Path, step: dict[str, Any]) -> dict[str, Any]:
    _check_keys(path, "step.", step, _STEP_KEYS)
    if step["batch"] not in (ANY, ONE_BY_ONE):
        raise BundleError(f"{path}: step.batch is {step['batch']!r}; it is {ANY!r} or {ONE_BY_ONE!r}")
    if not 0 <= step["tolerance"] < math.inf:
        raise BundleError(f"{path}: step.tolerance {step['tolerance']} must be a number that is at least 0")
    if step["graph"] and not re.fullmatch(r"[0-9a-f]{32}", step["graph"]):
        raise BundleError(f"{path}: step.graph must be 32 hex digits")
    return step


def _schema(path: Path, manifest: Mapping[str, Any]) -> Schema:
    inputs, outputs, state = (
        tuple(_spec(path, f"{kind} {number}", table, kind == "state") for number, table in enumerate(manifest[kind]))
        for kind in ("input", "output", "state")
    )
    if not inputs or not outputs:
        raise BundleError(f"{path}: a model has an input and an output at least")
    if len(inputs) + len(outputs) + len(state) > TENSORS_MAX:
        raise BundleError(f"{path}: more than {TENSORS_MAX} tensors")
    for specs in ([*inputs, *state], outputs):
        names = [spec.name for spec in specs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise BundleError(f"{path}: there are two tensors called {twice!r}")
    return Schema(inputs, outputs, state)


def _spec(path: Path, place: str, table: object, is_state: bool) -> TensorSpec:
    if not isinstance(table, dict):
        raise BundleError(f"{path}: {place} must be a table")
    keys: dict[str, type] = {"name": str, "dtype": str, "shape": list}
    if is_state:
        keys |= {"role": str, "initial": float}
        if "shared" in table:
            keys |= {"shared": bool}
    _check_keys(path, f"{place}: ", table, keys)
    name, shape = table["name"], table["shape"]
    if not TENSOR_NAME.fullmatch(name):
        raise BundleError(f"{path}: {place}: {name!r} is no name: letters, digits and _ . / : -, at most 128")
    if not all(type(size) is int and 0 <= size <= SIZE_MAX for size in shape) or math.prod(shape) > SIZE_MAX:
        raise BundleError(
            f"{path}: {place}: {name} has the shape {shape}; sizes are whole numbers, {SIZE_MAX} together at most"
        )
    try:
        spec = TensorSpec(
            name, table["dtype"], tuple(shape), *(table[k] for k in keys if k not in ("name", "dtype", "shape"))
        )
        initial_value(TensorSpec(name, spec.dtype, (), initial=spec.initial))
    except (ValueError, OverflowError) as error:
        raise BundleError(f"{path}: {place}: {error}") from error
    if not math.isfinite(spec.initial):
        raise BundleError(f"{path}: {place}: the initial value {spec.initial} is not finite")
    return spec


def _initials(path: Path, schema: Schema, tensors: Tensors) -> dict[str, NDArray[Any]]:
    specs = {f"initial.{spec.name}": spec for spec in schema.state}
    initials: dict[str, NDArray[Any]] = {}
    for key, tensor in tensors.items():
        if not key.startswith("initial."):
            continue
        if (spec := specs.get(key)) is None:
            raise BundleError(f"{path}: {key}: there is no such state tensor")
        if tensor.text != (wanted := f"{spec.dtype} {spec.shape}"):
            raise BundleError(f"{path}: {key} is {tensor.text}, expected {wanted}")
        initials[spec.name] = tensor.values
    return initials


def _tensors(path: Path, prefixes: tuple[str, ...] = ()) -> dict[str, StoredTensor]:
    return _read(path, lambda bytes_max: read_tensors(path, bytes_max, prefixes))


def _read_graph(path: Path, digest: str) -> bytes:
    graph = _read(path / GRAPH, lambda bytes_max: read_file(path / GRAPH, bytes_max))
    if graph_digest(graph) != digest:
        raise _other_graph(path)
    return graph


def _other_graph(path: Path) -> BundleError:
    return BundleError(f"{path / GRAPH}: it is not the graph that {MANIFEST} names")


def _read(path: Path, read: Callable[[int], _T]) -> _T:
    try:
        return read(memory_bytes() // _MEMORY_SHARE)
    except FileNotFoundError as error:
        link = f"; it is a link to {shown(Path(os.readlink(path)))}" if path.is_symlink() else ""
        raise BundleError(f"{path}: no such file{link}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{path}: not safetensors: {error}") from error


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path}: {error.strerror}", is_passing(error))
