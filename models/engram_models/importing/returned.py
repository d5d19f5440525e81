"""What the variables are called that a forward returns, read from its source. Called by torch_programs.py."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

from torch import nn


def script_results(module: Any) -> list[str] | None:
    """The variables that a scripted forward returns; `h0` is how TorchScript writes an `h` that was set anew."""
    names = _returned(f"def {module.code.partition('def ')[2]}") if hasattr(module, "code") else None
    return names and ["" if re.fullmatch(r"_\d+", name) else name for name in names]


def written_results(module: nn.Module) -> list[str] | None:
    try:
        return _returned(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError):
        return None


def _returned(code: str) -> list[str] | None:
    """The names of the variables that a function returns, where all its returns name the same; "" for an expression."""
    try:
        function = ast.parse(code).body[0]
    except (SyntaxError, IndexError):
        return None
    inner = {
        id(n)
        for f in ast.walk(function)
        if isinstance(f, ast.FunctionDef | ast.Lambda) and f is not function
        for n in ast.walk(f)
    }
    returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and id(node) not in inner]
    found = {tuple(_variables(value)) for value in returns if value is not None}
    return list(found.pop()) if len(found) == 1 else None


def _variables(value: ast.expr) -> list[str]:
    if isinstance(value, ast.Tuple | ast.List):
        return [name for element in value.elts for name in _variables(element)]
    return [value.id if isinstance(value, ast.Name) else ""]
