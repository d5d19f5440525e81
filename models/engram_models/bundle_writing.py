"""Writes bundles, whole or not at all. For cell_bundles.py, which has a cell, and for the import, which has a graph. No torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError

from engram_models.bundle import (
    ANY,
    FORMAT,
    GRAPH,
    MANIFEST,
    NAME,
    NAME_RULE,
    ONE_BY_ONE,
    WEIGHTS,
    BundleError,
)
from engram_models.check import CheckVector
from engram_models.fingerprints import IMPORTED, fingerprint, graph_digest, spec_table
from engram_models.spec import Schema
from engram_models.tensor_file import StoredTensor, Tensors, write_tensors


def write_graph_bundle(
    directory: Path, name: str, version: str, graph: bytes, schema: Schema, check: CheckVector, *,
    config: Mapping[str, Any] | None = None, description: str = "", allows_non_finite: bool = False,
    initials: Mapping[str, NDArray[Any]] | None = None, one_by_one: str = "", tolerance: float = 0.0,
) -> Path:  # fmt: skip
    """A model that is its graph, which is in the normal form (bundle.py).

    `initials`: initial values that are arrays [*shape], by state tensor. `one_by_one`: why its rows are computed so, if they
    are. Raises BundleError if the bundle is there already or cannot be written.
    """
    dtypes = {spec.name: spec.dtype for spec in schema.state}
    tensors = {f"initial.{key}": StoredTensor(dtypes[key], values) for key, values in (initials or {}).items()}
    return write(
        directory, name, version, IMPORTED, config or {}, schema, graph, {**tensors, **check.tensors(schema)},
        description=description, allows_non_finite=allows_non_finite, one_by_one=one_by_one, tolerance=tolerance,
    )  # fmt: skip


def write(
    directory: Path, name: str, version: str, kind: str, config: Mapping[str, Any], schema: Schema, graph: bytes,
    tensors: Tensors, *, description: str, allows_non_finite: bool, one_by_one: str = "", tolerance: float = 0.0,
) -> Path:  # fmt: skip
    """Writes <directory>/<name>/<version>. Raises BundleError if it is there already or cannot be."""
    target = checked_target(directory, name, version)
    if bad := [key for key, tensor in tensors.items() if not key.startswith("check.") and not tensor.finite]:
        raise BundleError(f"{name}/{version}: {bad[0]} has NaN or infinity")
    digest = graph_digest(graph) if graph else ""
    manifest: dict[str, Any] = {
        "format": FORMAT, "kind": kind, "description": description, "allows_non_finite": allows_non_finite,
        "fingerprint": fingerprint(kind, config, schema, digest, tensors), "config": dict(config),
        "step": {"graph": digest, "batch": ONE_BY_ONE if one_by_one else ANY, "why": one_by_one, "tolerance": tolerance},
        "input": [spec_table(spec) for spec in schema.inputs], "output": [spec_table(spec) for spec in schema.outputs],
        "state": [spec_table(spec) for spec in schema.state],
    }  # fmt: skip
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    except OSError as error:
        raise BundleError(f"{target}: {error.strerror}") from error
    try:
        write_tensors(temporary / WEIGHTS, tensors)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors gives it to its writer alone
        if graph:
            (temporary / GRAPH).write_bytes(graph)
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


def checked_target(directory: Path, name: str, version: str) -> Path:
    """Where such a bundle goes. Raises BundleError where the names are none, it is there already, or cannot be written."""
    if not NAME.fullmatch(name) or not NAME.fullmatch(version):
        raise BundleError(f"{name}/{version}: {NAME_RULE}")
    target = directory / name / version
    if target.exists():
        raise BundleError(f"{target} exists; versions are never overwritten, choose another")
    there = next(folder for folder in target.parents if folder.exists() or folder == folder.parent)
    if not there.is_dir():
        raise BundleError(f"{target}: {there} is no directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BundleError(f"{target}: {there} cannot be written")
    return target


def _toml(manifest: Mapping[str, Any]) -> str:
    """The manifest as toml: plain values first, then its tables."""
    plain = [
        f"{key} = {_value(value)}"
        for key, value in manifest.items()
        if value == [] or not isinstance(value, dict | list)
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
