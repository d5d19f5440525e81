"""The crates that native/ is built of keep native/deny.toml, as far as that can be seen without cargo-deny and its list of
vulnerabilities: licences, sources, and no crate in two versions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
DENY = tomllib.loads((NATIVE / "deny.toml").read_text())
LOCKED: list[dict[str, Any]] = tomllib.loads((NATIVE / "Cargo.lock").read_text())["package"]


def test_every_crate_is_from_the_registry_and_has_a_checksum() -> None:
    allowed = {f"registry+{address}" for address in DENY["sources"]["allow-registry"]}
    ours = {"engram-native", "engram-fuzz", "engram-load"}
    assert {one["name"] for one in LOCKED if "source" not in one} == ours
    others = [one for one in LOCKED if one["name"] not in ours]
    assert [one["name"] for one in others if one["source"] not in allowed or "checksum" not in one] == []


def test_no_crate_is_there_twice() -> None:
    skipped = [one["crate"].split("@") for one in DENY["bans"]["skip"]]
    found = [one for one in LOCKED if not any(_is(one, name, version) for name, version in skipped)]
    names = [one["name"] for one in found]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    for name, version in skipped:
        assert any(_is(one, name, version) for one in LOCKED), f"{name} {version} is gone: take it out of deny.toml"


def _is(package: dict[str, Any], name: str, version: str) -> bool:
    return package["name"] == name and f"{package['version']}.".startswith(f"{version}.")


@pytest.mark.skipif(shutil.which("cargo") is None, reason="licences are in the crates, which cargo knows")
def test_every_crate_has_a_licence_that_we_take() -> None:
    command = ["cargo", "metadata", "--locked", "--all-features", "--format-version", "1"]
    done = subprocess.run(command, cwd=NATIVE, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    packages = json.loads(done.stdout)["packages"]
    assert len(packages) == len(LOCKED)
    refused = {one["name"]: one["license"] for one in packages if not taken(one["license"] or "")}
    assert refused == {}


@pytest.mark.parametrize(
    ("expression", "good"),
    [
        ("MIT", True),
        ("GPL-3.0", False),
        ("", False),
        ("MIT/GPL-3.0", True),
        ("GPL-3.0 OR MIT", True),
        ("GPL-3.0 AND MIT", False),
        ("(GPL-3.0 OR ISC) AND Unicode-3.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("MIT WITH LLVM-exception", False),
        ("MIT OR GPL-3.0 AND GPL-2.0", True),
    ],
)
def test_expressions_of_licences(expression: str, good: bool) -> None:
    assert taken(expression) is good


def taken(expression: str) -> bool:
    """Whether an SPDX expression can be met by licences that deny.toml allows. AND binds before OR."""
    expression = expression.replace("/", " OR ").strip()
    while inner := re.search(r"\(([^()]*)\)", expression):
        expression = expression[: inner.start()] + ("MIT" if taken(inner[1]) else "none") + expression[inner.end() :]
    return any(
        all(one.strip() in DENY["licenses"]["allow"] for one in re.split(r"\bAND\b", part))
        for part in re.split(r"\bOR\b", expression)
    )
