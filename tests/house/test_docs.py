"""The documents do not lie about what a test can look up: settings, files, commands, metrics."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from engram_service.auth.access import RIGHT_OF
from engram_service.observability.metrics import Metrics
from engram_service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HOMES = ("", "service/engram_service/", "clients/python/engram/", "models/engram_models/", "docs/")


def test_operations_names_every_setting_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/operations.md").read_text(), re.M))
    for item in fields(Settings):
        shown = str(item.default).lower() if isinstance(item.default, bool) else str(item.default)
        assert rows.get(item.name) == (f"`{shown}`" if shown else ""), f"{item.name}: run make docs"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|toml|txt|svg|proto))`", text)) - {"model.toml", "engram.toml"}
    named |= set(re.findall(r"\]\((?!http)([^)#]+)", text))
    for name in named:
        assert any((ROOT / home / name).exists() for home in HOMES), f"{path.name} names {name}"


def test_commands_of_the_readme_exist() -> None:
    commands = {entry.name for entry in entry_points(group="engram.commands")}
    named = set(re.findall(r"`engram (\w+)", (ROOT / "README.md").read_text()))
    assert named <= commands


def test_security_names_the_right_of_every_method() -> None:
    rows = dict(re.findall(r"^\| (`\w+`|any token) \| (.*?) \|$", (ROOT / "docs/security.md").read_text(), re.M))
    for method, right in RIGHT_OF.items():
        assert re.search(rf"\b{method}\b", rows[f"`{right}`" if right else "any token"]), method


def test_metrics_that_are_named_exist() -> None:
    known = {family.name for family in Metrics().registry.collect()}
    for name in re.findall(r"`(engram_\w+)", (ROOT / "docs/operations.md").read_text()):
        assert name.removesuffix("_total") in known or name in known, name


def test_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)", path.read_text()))
        assert named <= targets, path.name


def test_each_promise_has_tests_that_are_marked_with_its_number() -> None:
    """Every file of the table, so that `pytest -m promise` is what the table says; and no number that the table lacks."""
    rows = re.findall(r"^\| (\d+) \| (?:.*?) \| (?:.*?) \| (.*) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    table = {int(number): set(re.findall(r"`(tests/[\w/]+\.py)`", files)) for number, files in rows}
    marked = {path: _promises(path) for path in (ROOT / "tests").rglob("test_*.py")}
    for number, files in table.items():
        for name in files:
            assert number in marked[ROOT / name], f"{name} has no test that is marked promise({number})"
    assert set.union(*marked.values()) == set(table) == set(range(1, 13))


def _promises(path: Path) -> set[int]:
    return set(map(int, re.findall(r"^@pytest\.mark\.promise\((\d+)\)$", path.read_text(), re.M)))
