"""How the modules hang together: no circles of imports, none that grows past what one can keep in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from house.test_house import PACKAGES, ROOT, _modules

LINES_MAX = 400


def _graph(package: str) -> dict[str, set[str]]:
    """The modules of a package, and which of them each imports: on top, within functions, and for types alone."""
    trees = {_name(package, path): tree for path, tree in _modules(package)}
    return {name: set(_imported(name, tree, set(trees))) for name, tree in trees.items()}


def _name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(module: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            # `from package import module` needs the module; `from package import name` the package.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in names if name in known and name != module)


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach one another, largest first."""
    reach = {name: _reached(graph, name) for name in graph}
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}
    return [set(circle) for circle in sorted(found, key=lambda one: (-len(one), sorted(one)))]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead.extend(graph[name])
    return reached


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"g"}, "g": {"e"}}
    assert _circles(graph) == [{"e", "f", "g"}, {"b", "c"}]


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_one_another_in_no_circle(package: str) -> None:
    assert _circles(_graph(package)) == []


def test_modules_are_short() -> None:
    paths = [path for package in PACKAGES for path, _ in _modules(package)]
    paths += [path for path in (ROOT / "native").rglob("*.rs") if "target" not in path.parts]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > LINES_MAX} == {}
