"""Rules and dashboard: their metrics are there, every alert has its entry in the runbook, and promtool agrees where it is installed."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import urllib.request
from typing import Any

import installed
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "observability"
RULES = FOLDER / "rules.yml"
NOT_OURS = {"up"}

ServerProcess = Any


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    board = json.loads((FOLDER / "grafana" / "engram.json").read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.fixture(scope="module")
def exposed(shared_server: ServerProcess) -> dict[str, set[str]]:
    """Of each metric of a live server, the labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{shared_server.http_port}/metrics") as answer:
        text = answer.read().decode()
    found = {name: set() for name in re.findall(r"^# TYPE (\S+) counter$", text, re.M)}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M):
        names = [f"{name}_bucket", f"{name}_sum", f"{name}_count"] if kind == "histogram" else [name]
        found |= {one: {"le"} if one.endswith("_bucket") else set() for one in names}
    return found


def test_every_metric_that_is_asked_for_is_exposed_or_recorded(exposed: dict[str, set[str]]) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for expression in expressions():
        names = set(re.findall(r"\b((?:engram|process)_\w+|\w+:engram_\w+:\w+)\b", expression))
        assert names or "up{" in expression, f"{expression}: it asks for no metric"
        wrong = names - exposed.keys() - recorded
        assert not wrong, f"{expression}: nobody exposes {wrong}"


def test_names_that_are_wrong_would_be_found(exposed: dict[str, set[str]]) -> None:
    assert "engram_steps_total" in exposed and "engram_step_total" not in exposed
    assert "engram_stage_seconds_bucket" in exposed


def test_every_alert_has_its_entry_and_every_entry_an_alert() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    entries = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.M))
    assert {rule["alert"] for rule in alerts} == entries
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]


def test_the_dashboard_is_what_its_tool_makes() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "dashboard.py", "--check"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr


def test_promtool_takes_the_rules_and_they_fire() -> None:
    for command in (["check", "rules", RULES], ["test", "rules", pathlib.Path(__file__).parent / "rules_test.yml"]):
        done = installed.run("promtool", *command, hint="Debian's package prometheus has it")
        assert done.returncode == 0, done.stdout + done.stderr
