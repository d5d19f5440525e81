"""Cells from packages of other people: found by name, checked for what a kind must be, and registered. Called by `engram serve`
for the setting `cells`, and by `engram models check --cell`. Nothing is imported that nobody has named.

A name is `module:Class`, or that of an entry point in the group `engram.cells` of an installed package.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from engram_models.cell import Cell
from engram_models.registry import register

GROUP = "engram.cells"


class PlugInError(Exception):
    """A plug-in that cannot be used: which, why, what to do."""


def register_cells(names: Iterable[str]) -> list[str]:
    """Imports and registers these plug-ins; gives their kinds. Raises PlugInError."""
    kinds = []
    for name in names:
        found = find_cell(name)
        try:
            register(found)
        except ValueError as error:
            raise PlugInError(f"cell {name!r}: {error}") from None
        kinds.append(found.kind)
    return kinds


def find_cell(name: str) -> type[Cell]:
    """The class that a name stands for; its module is imported. Raises PlugInError."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        module_name, attribute = _entry_point(name)
    try:
        found: Any = import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        missing = (
            isinstance(error, ModuleNotFoundError) and error.name is not None and module_name.startswith(error.name)
        )
        why = "no such module; is its package installed?" if missing else f"{type(error).__name__}: {_line(error)}"
        raise PlugInError(f"cell {name!r}: importing {module_name} failed: {why}") from None
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise PlugInError(f"cell {name!r}: {module_name} has no {attribute}; name it as module:Class")
    if not inspect.isclass(found) or not issubclass(found, Cell):
        raise PlugInError(f"cell {name!r}: {attribute} is no subclass of engram_models.Cell")
    return found


def _entry_point(name: str) -> tuple[str, str]:
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise PlugInError(
            f"cell {name!r}: neither module:Class nor an entry point in the group {GROUP}; installed packages have: {known}"
        )
    return installed[name].module, installed[name].attr


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
