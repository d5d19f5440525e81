"""`engram models` as a program sees it: exit codes and JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engram_models import LSTM, load_bundle, write_bundle
from engram_models.commands import models


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    models.configure(parser)
    return models.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def directory(tmp_path: Path, bundle_path: Path) -> Path:
    torch.manual_seed(6)
    write_bundle(tmp_path, "small", "2", LSTM(3, 4, output_size=2))
    write_bundle(tmp_path, "small", "10", LSTM(3, 4, output_size=2))
    return tmp_path


def test_list(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--models", directory, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(m["version"], m["latest"]) for m in found["models"]] == [("1", False), ("2", False), ("10", True)]
    assert found["models"][0]["state_bytes"] == 32
    assert run("list", "--models", directory) == 0
    assert "10 (latest)" in capsys.readouterr().out


def test_list_of_the_shipped_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    assert "digits-reader" in capsys.readouterr().out


def test_list_shows_a_broken_bundle_and_fails(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "small" / "2" / "weights.safetensors").unlink()
    assert run("list", "--models", directory) == 1
    shown = capsys.readouterr()
    assert "does not load" in shown.out
    assert "no such file" in shown.err


@pytest.mark.parametrize(("model", "version"), [("small", "10"), ("small/2", "2")])
def test_show(model: str, version: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", model, "--models", directory, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["version"] == version
    assert found["fingerprint"] == load_bundle(directory / "small" / version).fingerprint
    assert [spec["name"] for spec in found["state"]] == ["h0", "c0"]
    assert run("show", model, "--models", directory) == 0
    assert found["fingerprint"] in capsys.readouterr().out


def test_check(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", directory / "small" / "1", "--json", "--batch-max", 64) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["batch_floor"] in (1, 2, 4, 8, 16, 32)


def test_check_of_a_bad_bundle_fails_with_the_reason(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "small" / "1" / "model.toml").write_text("?")
    assert run("check", "small/1", "--models", directory, "--json") == 1
    shown = capsys.readouterr()
    assert not json.loads(shown.out)["ok"]
    assert "not toml" in shown.err


def test_an_unknown_model_is_told_with_those_that_there_are(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "large", "--models", directory) == 1
    assert "there are: small/1, small/10, small/2" in capsys.readouterr().err
