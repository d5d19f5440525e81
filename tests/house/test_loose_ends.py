"""What is declared is used: reasons are given, events sent, settings and options read, metrics observed, anchors lead somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from engram import ClientOptions
from engram.v1 import error_pb2, stream_pb2
from engram_service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "service/engram_service"
SDK = ROOT / "clients/python/engram"
REASONS = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.DESCRIPTOR.values_by_name} - {
    "UNSPECIFIED"
}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])


def _source(directory: Path, *without: str) -> str:
    paths = [path for path in directory.rglob("*.py") if path.name not in without and "v1" not in path.parts]
    return "\n".join(path.read_text() for path in paths)


def test_every_reason_is_given_by_the_server() -> None:
    text = _source(SERVICE)
    assert sorted(reason for reason in REASONS if f'"{reason}"' not in text) == []


def test_the_rules_ask_for_reasons_that_there_are() -> None:
    rules = (ROOT / "deploy/observability/rules.yml").read_text()
    asked = {reason for group in re.findall(r'reason=~?"([A-Z_|]+)"', rules) for reason in group.split("|")}
    assert asked, "the rules name reasons no more: remove this test"
    assert asked - REASONS == set()


def test_every_event_is_sent_and_understood() -> None:
    for name in stream_pb2.EventFrame.Type.DESCRIPTOR.values_by_name:
        if name != "TYPE_UNSPECIFIED":
            assert name in _source(SERVICE), f"{name} is never sent"
            assert name in _source(SDK), f"the SDK does not know {name}"


def test_every_setting_is_read() -> None:
    text = _source(SERVICE)
    assert [item.name for item in fields(Settings) if not re.search(rf"\.{item.name}\b|\"{item.name}\"", text)] == []


def test_every_option_of_the_client_is_read() -> None:
    text = _source(SDK)
    assert [item.name for item in fields(ClientOptions) if not re.search(rf"\.{item.name}\b", text)] == []


def test_every_metric_is_observed() -> None:
    declared = re.findall(
        r"self\.(\w+) = (?:counter|gauge|histogram|deferred|DeferredHistogram|StageSeconds)\(",
        (SERVICE / "observability/metrics.py").read_text(),
    )
    assert len(declared) > 20
    text = _source(SERVICE, "observability/metrics.py")
    assert [name for name in declared if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert anchor in _anchors(target), f"{page.relative_to(ROOT)}: {path}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
