"""The Dockerfile and the compose file: linted, pinned, without rights, and in step with the repository."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import installed
import yaml

import engram

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "deploy"
DOCKERFILE = (DEPLOY / "images" / "Dockerfile").read_text()


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    return loaded


def test_hadolint_finds_nothing() -> None:
    hint = "it has no wheel for this machine"
    done = installed.run("hadolint", DEPLOY / "images" / "Dockerfile", hint=hint)
    assert done.returncode == 0, done.stdout
    bad = installed.run("hadolint", "-", hint=hint, stdin="FROM debian\nRUN apt-get install gcc\n")
    assert bad.returncode != 0, "and it would find something"


def test_bases_are_pinned_and_the_result_runs_without_rights() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert {base for base in bases if base not in ("source", "runtime")} == {"python:3.11.14-slim-bookworm"}
    runtime = DOCKERFILE[DOCKERFILE.index(" AS runtime") :]
    assert "USER 10001:10001" in runtime and "apt-get" not in DOCKERFILE
    copied = [
        line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY") and "--from" not in line
    ]
    allowed = {line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in (path for paths in copied for path in paths):
        assert (DEPLOY.parent / path).exists() and path in allowed, f"{path} is not sent to the build"


def test_versions_are_the_packages() -> None:
    assert compose()["x-engram"]["image"] == f"engram:{engram.__version__}-cpu"
    for name in ("base", "overlays/gpu"):
        text = (DEPLOY / "kubernetes" / name / "kustomization.yaml").read_text()
        assert f"newTag: {engram.__version__}-" in text
    chart = yaml.safe_load((DEPLOY / "helm" / "engram" / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == engram.__version__


def test_compose_is_pinned_mounts_what_is_there_and_stays_on_this_machine() -> None:
    for name, service in compose()["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), f"{name}: pin its version"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), f"{name}: {source} is not there"
        if name.startswith("engram"):
            assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["stop_grace_period"] == "30s"


def test_only_the_cuda_image_has_torch() -> None:
    extras = dict(re.findall(r"^FROM source AS build-(\w+)\n.*'\.\[(.*)\]'$", DOCKERFILE, re.M))
    assert {name: "torch" in wanted.split(",") for name, wanted in extras.items()} == {"cpu": False, "cuda": True}
    for name in extras:
        assert f"FROM runtime AS {name}\nCOPY --from=build-{name} " in DOCKERFILE
