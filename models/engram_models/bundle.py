"""Bundles: a served model on disk. `model.toml` says what it is, `weights.safetensors` holds its numbers; nothing executes.

    <directory>/<name>/<version>/model.toml           kind, config, tensors, fingerprint
    <directory>/<name>/<version>/weights.safetensors  weight.*: parameters; check.*: the recorded check vector

The check vector is a short run (inputs and a random state, then outputs and states) recorded when the bundle was written and
run again whenever it is loaded: a bundle that computes something else on this machine is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from engram_models.cell import Cell, State, torch_dtype
from engram_models.files import is_passing, read_file, read_toml
from engram_models.registry import cell_type
from engram_models.spec import TensorSpec

FORMAT = 1
CHECK_ROWS = 4
CHECK_STEPS = 3
CHECK_TOLERANCE = 1e-5
MANIFEST, WEIGHTS = "model.toml", "weights.safetensors"
_MEMORY_SHARE = (
    4  # weights may have that part (1/n) of the machine's memory: they are there twice while they are loaded
)
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS: dict[str, type] = {
    "format": int, "kind": str, "description": str, "allows_non_finite": bool, "fingerprint": str,
    "config": dict, "input": dict, "output": dict, "state": list,
}  # fmt: skip
_KIND_WORDS = {int: "a whole number", str: "a string", bool: "true or false", dict: "a table", list: "tables"}


class BundleError(Exception):
    """A bundle that cannot be served; the message says which file, what is wrong, and what was expected.

    Where the machine and not the bundle is to blame (no descriptor left, a file system that is away) `passing` is true: what is
    on disk may be good, and is worth another try as it is.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A loaded model version. `cell` is in evaluation mode, on the device it was loaded for."""

    name: str
    version: str
    kind: str
    fingerprint: str  # 32 hex digits: equal fingerprints mean equal weights, sizes and schema
    cell: Cell
    input: TensorSpec
    output: TensorSpec
    state: tuple[TensorSpec, ...]
    generates: bool
    allows_non_finite: bool
    description: str
    path: Path

    @property
    def state_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.state)


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
                if not _NAME.fullmatch(name) or not _NAME.fullmatch(version):
                    errors.append(f"{shown(path)}: name and version are letters, digits, '.', '_' and '-', at most 64")
                    continue
                found.setdefault((name, version), BundleRef(name, version, path))
        return sorted(found.values(), key=lambda ref: (ref.name, version_key(ref.version))), errors

    def _versions(self, directory: Path, errors: list[str]) -> list[Path]:
        """Directories that have a manifest, be it one that can be read or not, and are not just being written."""
        versions: list[Path] = []
        for name in self._list(directory, errors, top=True):
            # What could not be a model anyway (lost+found) may be unreadable.
            found = self._list(directory / name, errors if _NAME.fullmatch(name) else [])
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


def write_bundle(
    directory: Path, name: str, version: str, cell: Cell, description: str = "", allows_non_finite: bool = False
) -> Path:
    """Writes <directory>/<name>/<version>, whole or not at all. Raises BundleError if it is there already or cannot be."""
    if not _NAME.fullmatch(name) or not _NAME.fullmatch(version):
        raise BundleError(f"{name}/{version}: name and version are letters, digits, '.', '_' and '-', at most 64")
    target = directory / name / version
    if target.exists():
        raise BundleError(f"{target} exists; versions are never overwritten, choose another")
    weights = {f"weight.{key}": value.detach().cpu().contiguous() for key, value in cell.state_dict().items()}
    if bad := [key for key, value in weights.items() if not torch.isfinite(value).all()]:
        raise BundleError(f"{name}/{version}: {bad[0]} has NaN or infinity")
    manifest: dict[str, Any] = {
        "format": FORMAT, "kind": cell.kind, "description": description, "allows_non_finite": allows_non_finite,
        "fingerprint": _fingerprint(cell, weights), "config": dict(cell.config), "input": _spec_table(cell.input),
        "output": _spec_table(cell.output), "state": [_spec_table(spec) for spec in cell.state_schema],
    }  # fmt: skip
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    except OSError as error:
        raise BundleError(f"{target}: {error.strerror}") from error
    try:
        save_file({**weights, **_record_check(cell)}, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors gives it to its writer alone
        (temporary / MANIFEST).write_text(_toml(manifest))
        temporary.chmod(0o755)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BundleError(f"{target}: {getattr(error, 'strerror', None) or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def load_bundle(path: Path, device: torch.device | str = "cpu") -> Bundle:
    """Loads and verifies a bundle. Raises BundleError, whatever is wrong with it."""
    try:
        return _load(path, device)
    except BundleError:
        raise
    except Exception as error:  # a file may be wrong in ways that nobody has thought of
        raise BundleError(f"{shown(path)}: {type(error).__name__}: {error}") from error


def _load(path: Path, device: torch.device | str) -> Bundle:
    manifest = _manifest(path / MANIFEST)
    tensors = _tensors(path / WEIGHTS)
    cell = _cell(path, manifest, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    weights = {key: value for key, value in tensors.items() if not key.startswith("check.")}
    _load_weights(path, cell, weights)
    fingerprint = _fingerprint(cell, weights)
    if manifest["fingerprint"] != fingerprint:
        raise BundleError(
            f"{path}: fingerprint {manifest['fingerprint']} is recorded, {fingerprint} is what the files give"
        )
    cell.to(device).eval().requires_grad_(False)
    _verify_check(path, cell, tensors)
    return Bundle(
        name=path.parent.name, version=path.name, kind=cell.kind, fingerprint=fingerprint, cell=cell, input=cell.input,
        output=cell.output, state=cell.state_schema, generates=cell.schema.generates, allows_non_finite=manifest["allows_non_finite"],
        description=manifest["description"], path=path,
    )  # fmt: skip


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_toml(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error
    if unknown := set(manifest) - set(_KEYS):
        raise BundleError(f"{path}: there is no key {sorted(unknown)[0]!r}")
    if missing := set(_KEYS) - set(manifest):
        raise BundleError(f"{path}: the key {sorted(missing)[0]!r} is missing")
    for key, kind in _KEYS.items():
        if not isinstance(manifest[key], kind) or (kind is int and isinstance(manifest[key], bool)):
            raise BundleError(f"{path}: {key} must be {_KIND_WORDS[kind]}")
    if manifest["format"] != FORMAT:
        raise BundleError(f"{path}: format {manifest['format']}; this version reads {FORMAT}")
    try:
        json.dumps(manifest["config"])
    except TypeError as error:
        raise BundleError(
            f"{path}: config may have numbers, strings, true, false, lists and tables: {error}"
        ) from error
    if not _finite(manifest["config"]):
        raise BundleError(f"{path}: config has a number that is not finite")
    return manifest


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _cell(path: Path, manifest: Mapping[str, Any], nbytes: int) -> Cell:
    """The untrained cell that the manifest describes, with the schema that it records. The bundle has `nbytes` of tensors."""
    kind = cell_type(str(manifest["kind"]))
    if kind is None:
        raise BundleError(f"{path}: kind {manifest['kind']!r} is not one that this version serves")
    try:
        _check_size(kind, manifest["config"], nbytes)
        cell = kind.from_config(manifest["config"])
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BundleError(f"{path}: config does not fit kind {manifest['kind']}: {error}") from error
    for key, table in (("input", _spec_table(cell.input)), ("output", _spec_table(cell.output))):
        if manifest[key] != table:
            raise BundleError(f"{path}: {key} is recorded as {manifest[key]}, its config gives {table}")
    schema = [_spec_table(spec) for spec in cell.state_schema]
    if manifest["state"] != schema:
        raise BundleError(f"{path}: the recorded state schema is not the one that its config gives")
    return cell


def _check_size(kind: type[Cell], config: Mapping[str, Any], nbytes: int) -> None:
    """A config of a few bytes must not have us make more weights than its bundle brings along. Raises ValueError."""
    with torch.device("meta"):  # shapes alone
        wanted = sum(tensor.numel() * tensor.itemsize for tensor in kind.from_config(config).state_dict().values())
    if wanted > nbytes:
        raise ValueError(f"it asks for {wanted} bytes of weights, weights.safetensors has {nbytes} bytes of tensors")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load(read_file(path, _memory_bytes() // _MEMORY_SHARE))
    except FileNotFoundError as error:
        link = f"; it is a link to {shown(Path(os.readlink(path)))}" if path.is_symlink() else ""
        raise BundleError(f"{path}: no such file{link}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise BundleError(f"{path}: not safetensors: {error}") from error
    except Exception as error:  # of the library's, for a dtype that torch has not, say
        raise BundleError(f"{path}: not safetensors for torch: {type(error).__name__}: {error}") from error


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path}: {error.strerror}", is_passing(error))


def _memory_bytes() -> int:
    """Of the machine, or of the container."""
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_MEMORY.read_text().strip()
    except OSError:
        return own
    return min(own, int(limit)) if limit.isdigit() else own


def _load_weights(path: Path, cell: Cell, weights: Mapping[str, Tensor]) -> None:
    wanted = {f"weight.{key}": value for key, value in cell.state_dict().items()}
    if missing := sorted(set(wanted) - set(weights)):
        raise BundleError(f"{path}: {missing[0]} is missing from the weights")
    if unexpected := sorted(set(weights) - set(wanted)):
        raise BundleError(f"{path}: {unexpected[0]} is not a weight of kind {cell.kind} with this config")
    for key, value in weights.items():
        if value.shape != wanted[key].shape or value.dtype != wanted[key].dtype:
            expected = f"{wanted[key].dtype} {tuple(wanted[key].shape)}"
            raise BundleError(f"{path}: {key} is {value.dtype} {tuple(value.shape)}, expected {expected}")
        if not torch.isfinite(value).all():
            raise BundleError(f"{path}: {key} has NaN or infinity")
    cell.load_state_dict({key.removeprefix("weight."): value for key, value in weights.items()})


def _record_check(cell: Cell) -> dict[str, Tensor]:
    """A seeded run of CHECK_STEPS steps over CHECK_ROWS rows, from a random state."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        inputs = torch.stack([cell.inputs_like(_random(cell.input, generator)) for _ in range(CHECK_STEPS)])
    before = [_random(spec, generator) for spec in cell.state_schema]
    outputs, after = _run(cell, inputs, before)
    record = {"check.inputs": inputs, "check.outputs": outputs}
    for spec, first, last in zip(cell.state_schema, before, after, strict=True):
        record[f"check.before.{spec.name}"], record[f"check.after.{spec.name}"] = first, last.cpu().contiguous()
    return record


def _verify_check(path: Path, cell: Cell, tensors: Mapping[str, Tensor]) -> None:
    try:
        inputs, expected = tensors["check.inputs"], tensors["check.outputs"]
        before = [tensors[f"check.before.{spec.name}"] for spec in cell.state_schema]
        after = [tensors[f"check.after.{spec.name}"] for spec in cell.state_schema]
    except KeyError as error:
        raise BundleError(f"{path}: the check vector lacks {error.args[0]}") from error
    for tensor, spec in ((inputs, cell.input), (expected, cell.output)):
        _check_fits(path, tensor, spec, CHECK_STEPS, CHECK_ROWS)
    for tensor, spec in zip([*before, *after], [*cell.state_schema, *cell.state_schema], strict=True):
        _check_fits(path, tensor, spec, CHECK_ROWS)
    device = next(chain(cell.parameters(), cell.buffers()), torch.empty(0)).device
    try:
        outputs, states = _run(cell, inputs.to(device), [tensor.to(device) for tensor in before])
    except (RuntimeError, TypeError, IndexError) as error:
        raise BundleError(f"{path}: the check vector does not run: {error}") from error
    for what, got, want in [
        ("outputs", outputs, expected),
        *zip([s.name for s in cell.state_schema], states, after, strict=True),
    ]:
        difference = (got.cpu().double() - want.double()).abs().max().item() if want.numel() else 0.0
        # Relative where numbers are large: a normalised cell answers in the units of its data.
        allowed = CHECK_TOLERANCE * max(
            1.0, want.double().nan_to_num(0, 0, 0).abs().max().item() if want.numel() else 0.0
        )
        if not difference <= allowed:
            raise BundleError(
                f"{path}: the check vector fails: {what} differ by {difference:.2g}, at most {allowed:.2g} is allowed; "
                "the weights are not those that were recorded, or this machine computes something else"
            )


def _check_fits(path: Path, tensor: Tensor, spec: TensorSpec, *rows: int) -> None:
    """A tensor of no bytes may have any number of rows: a check that runs over it might never end."""
    if tensor.dtype != torch_dtype(spec) or tuple(tensor.shape) != (*rows, *spec.shape):
        found, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{torch_dtype(spec)} {(*rows, *spec.shape)}"
        raise BundleError(f"{path}: the check vector fails: {spec.name} is {found}, expected {wanted}")


def _run(cell: Cell, inputs: Tensor, before: Iterable[Tensor]) -> tuple[Tensor, State]:
    was_training = cell.training
    cell.eval()
    with torch.no_grad():
        state: State = cell.state_type(*before)
        outputs = []
        for x in inputs:
            y, state = cell(x, state)
            outputs.append(y)
    cell.train(was_training)
    return torch.stack(outputs).cpu(), state


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    shape = (CHECK_ROWS, *spec.shape)
    if spec.is_float:
        return torch.randn(shape, generator=generator).to(torch_dtype(spec))
    return torch.randint(0, 2, shape, generator=generator).to(torch_dtype(spec))


def _fingerprint(cell: Cell, weights: Mapping[str, Tensor]) -> str:
    """BLAKE2b over kind, config, schema and weights: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    schema = [_spec_table(spec) for spec in (cell.input, cell.output, *cell.state_schema)]
    digest.update(json.dumps([cell.kind, dict(cell.config), schema], sort_keys=True).encode())
    for key in sorted(weights):
        value = weights[key].contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _spec_table(spec: TensorSpec) -> dict[str, Any]:
    table: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
    return {**table, "role": spec.role, "initial": spec.initial} if spec.role else table


def _toml(manifest: Mapping[str, Any]) -> str:
    """The manifest as toml: plain values first, then its tables."""
    plain = [
        f"{key} = {_value(value)}" for key, value in manifest.items() if not value or not isinstance(value, dict | list)
    ]
    lines = [*plain, ""]
    for key, value in manifest.items():
        for table in value if isinstance(value, list) else [value] if isinstance(value, dict) else []:
            lines.append(f"[[{key}]]" if isinstance(value, list) else f"[{key}]")
            lines.extend(f"{name} = {_value(item)}" for name, item in table.items())
            lines.append("")
    return "\n".join(lines)


def _value(value: Any) -> str:
    """A toml value: JSON writes strings, numbers, booleans and flat arrays the same way. A table in a table stands in line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_value(item)}" for name, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
