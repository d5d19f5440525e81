"""Recipes: toml files that say what is trained, on what, how, and what must come out. Read by run.py and `engram train`.

    name, claim, procedure, seeds      what it is called, what it shows, which experiment it is, the seeds `make learn` runs
    [options]                          of the procedure
    [model], [task]                    of procedures that train a cell: kind and config; name and what the task takes
    [quick]                            other options for a CI-sized run; [quick.model], [quick.task], [quick.pass] likewise
    [pass]                             metric = { min = .., max = .. }: what the outcome is held against
    [bundle]                           name, version, description of the model that is written at the end

Recipes that come with the package lie in engram_models/recipes and are found by name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from engram_models.files import read_toml
from engram_models.training.errors import TrainingError

_TABLES = ("options", "model", "task", "quick", "pass", "bundle")
_KEYS = ("name", "claim", "procedure", "seeds", *_TABLES)
SEED_MAX = 2**31 - 1
_BUNDLE_KEYS = ("name", "version", "description")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe, checked for its own keys; options, model and task are checked by who takes them."""

    name: str
    claim: str
    procedure: str
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    model: Mapping[str, Any]
    task: Mapping[str, Any]
    bounds: Mapping[str, Mapping[str, float]]  # [pass]
    bundle: Mapping[str, str]
    path: Path

    @property
    def digest(self) -> str:
        """Of everything that decides the outcome: a checkpoint of another recipe is refused by it."""
        deciding = [self.procedure, dict(self.options), dict(self.model), dict(self.task)]
        return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=16).hexdigest()

    def verdict(self, metrics: Mapping[str, Any]) -> list[str]:
        """What of [pass] the metrics miss, in words; empty: they pass."""
        return [
            f"{name} is {metrics.get(name)}, {'at least' if side == 'min' else 'at most'} {limit:g} is asked"
            for name, bound in self.bounds.items()
            for side, limit in bound.items()
            if not _within(metrics.get(name), side, limit)
        ]


def shipped_recipes() -> dict[str, Path]:
    """Those that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))}


def load_recipe(name: str | Path, quick: bool = False) -> Recipe:
    """A recipe by its name or its file's path. Raises TrainingError."""
    path = shipped_recipes().get(str(name)) or Path(name)
    try:
        tables = read_toml(path)
    except FileNotFoundError:
        known = ", ".join(shipped_recipes())
        raise TrainingError(f"no recipe {str(name)!r} and no such file; there are: {known}") from None
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise TrainingError(f"{path}: {error}") from error
    return _recipe(path, tables, quick)


def parsed(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A table as a dataclass of plain values: unknown keys, missing ones and values of another type are refused."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    refuse_unknown(table, known, where)
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise TrainingError(f"{where} lacks the key {name!r}")
    values = {name: _value(value, hints[name], f"{where}: {name}") for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise TrainingError(f"{where}: {error}") from error


def refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    if unknown := sorted(set(table) - set(known)):
        raise TrainingError(f"{where}: there is no key {unknown[0]!r}; there are: {', '.join(known)}")


def _recipe(path: Path, tables: dict[str, Any], quick: bool) -> Recipe:
    refuse_unknown(tables, _KEYS, str(path))
    for key in _TABLES:
        if not isinstance(tables.setdefault(key, {}), dict):
            raise TrainingError(f"{path}: {key} must be a table, [{key}]")
    if not isinstance(tables.get("procedure"), str):
        raise TrainingError(f"{path}: procedure must be a string that names an experiment")
    seeds = tables.get("seeds", [1])
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int and 0 <= seed <= SEED_MAX for seed in seeds)
    ):
        raise TrainingError(f"{path}: seeds must be a list of whole numbers from 0, at least one")
    refuse_unknown(tables["bundle"], _BUNDLE_KEYS, f"{path}: [bundle]")
    if tables["bundle"] and not {"name", "version"} <= set(tables["bundle"]):
        raise TrainingError(f"{path}: [bundle] needs name and version")
    if quick:
        _make_quick(path, tables)
    return Recipe(
        name=str(tables.get("name", path.stem)), claim=str(tables.get("claim", "")), procedure=tables["procedure"],
        seeds=tuple(seeds), options=tables["options"], model=tables["model"], task=tables["task"],
        bounds=_bounds(path, tables["pass"]), bundle={key: str(value) for key, value in tables["bundle"].items()}, path=path,
    )  # fmt: skip


def _make_quick(path: Path, tables: dict[str, Any]) -> None:
    """Lays [quick] over the other tables; a [quick.pass] replaces [pass]."""
    quick: dict[str, Any] = dict(tables["quick"])
    for key in ("model", "task", "pass"):
        if not isinstance(quick.get(key, {}), dict):
            raise TrainingError(f"{path}: {key} in [quick] must be a table, [quick.{key}]")
    for key in ("model", "task"):
        tables[key] = {**tables[key], **quick.pop(key, {})}
    tables["pass"] = quick.pop("pass", tables["pass"])
    tables["options"] = {**tables["options"], **quick}


def _bounds(path: Path, table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    for name, bound in table.items():
        sides = bound.items() if isinstance(bound, dict) else [("", None)]
        if any(side not in ("min", "max") or not _is_finite(limit) for side, limit in sides):
            raise TrainingError(f"{path}: [pass] {name} must be {{ min = number }}, {{ max = number }} or both")
    return dict(table)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _within(value: Any, side: str, limit: float) -> bool:
    if not _is_finite(value):
        return False
    return bool(value >= limit if side == "min" else value <= limit)


def _value(value: Any, hint: Any, where: str) -> Any:
    """The value as the field's type: a whole number may stand for a float, a list for a tuple."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        if not isinstance(value, list):
            raise TrainingError(f"{where} must be a list")
        return tuple(_value(item, inner, where) for item in value)
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise TrainingError(f"{where} must be a finite number")
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise TrainingError(f"{where} must be {words.get(hint, hint)}, not {value!r}")
    return value
