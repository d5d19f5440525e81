"""What is released fits together: versions, the platforms of the extra `native` and the wheels that are built, the rights of jobs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from engram import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
RELEASE: dict[str, Any] = WORKFLOWS["release.yml"]["jobs"]
NATIVE = [Requirement(text) for text in PROJECT["optional-dependencies"]["native"]]
# What Rust calls a machine, as markers see it.
PLATFORMS = {
    "x86_64-unknown-linux-gnu": ("linux", "x86_64"),
    "aarch64-unknown-linux-gnu": ("linux", "aarch64"),
    "armv7-unknown-linux-gnueabihf": ("linux", "armv7l"),
    "riscv64gc-unknown-linux-gnu": ("linux", "riscv64"),
    "x86_64-apple-darwin": ("darwin", "x86_64"),
    "aarch64-apple-darwin": ("darwin", "arm64"),
    "x86_64-pc-windows-msvc": ("win32", "AMD64"),
    "aarch64-pc-windows-msvc": ("win32", "ARM64"),
}


def test_versions_are_equal() -> None:
    cargo = tomllib.loads((ROOT / "native/Cargo.toml").read_text())
    assert cargo["package"]["version"] == __version__
    assert [str(one.specifier) for one in NATIVE] == [f"=={__version__}"] * len(NATIVE)
    assert {one.name for one in NATIVE} == {"engram-native"}


def test_there_is_a_wheel_for_each_platform_that_asks_for_one_and_no_other() -> None:
    built = {row["target"] for row in RELEASE["native"]["strategy"]["matrix"]["include"]}
    assert built <= set(PLATFORMS), "tell PLATFORMS how markers see it"
    asking = {target for target, (system, machine) in PLATFORMS.items() if _asks(system, machine)}
    assert asking == built
    assert not any(one.marker is None for one in NATIVE)


def _asks(system: str, machine: str) -> bool:
    environment = {"sys_platform": system, "platform_machine": machine, "platform_python_implementation": "CPython"}
    return any(one.marker is not None and one.marker.evaluate(environment) for one in NATIVE)


def test_all_that_is_built_is_published_and_what_publishes_may_do_nothing_else() -> None:
    publish = RELEASE["publish"]
    assert set(publish["needs"]) == set(RELEASE) - {"publish"}
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    assert publish["if"] == "github.ref_type == 'tag'"
    patterns = [pattern.replace("*", ".*") for pattern in publish["strategy"]["matrix"]["package"]]
    kept = [
        step["with"]["name"] for job in RELEASE.values() for step in job["steps"] if "upload" in step.get("uses", "")
    ]
    assert len(kept) == len(RELEASE) - 1
    assert all(sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) == 1 for name in kept), kept


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_may_only_read_and_do_not_run_for_ever(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"])


def test_ci_runs_what_anybody_can_run() -> None:
    assert [step["run"] for step in WORKFLOWS["ci.yml"]["jobs"]["check"]["steps"] if "run" in step] == ["bash .ci/run"]
