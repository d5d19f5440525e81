"""Rules of shape for proto/ that protolint does not have: buf's standard ones, and that everything public is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"
FILES = sorted(PROTO.rglob("*.proto"))


def _code(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def _blocks(text: str, kind: str) -> list[tuple[str, str]]:
    """(name, body) of every message, enum or service, nested ones too."""
    found = []
    for match in re.finditer(rf"\b{kind}\s+(\w+)\s*\{{", text):
        depth, at = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found.append((match.group(1), text[match.end() : at - 1]))
    return found


def test_there_are_protos() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_package_is_the_directory_and_has_a_version(path: Path) -> None:
    package = re.search(r"^package ([\w.]+);", path.read_text(), re.M)
    assert package is not None
    assert package.group(1).replace(".", "/") == str(path.parent.relative_to(PROTO))
    assert re.fullmatch(r"[a-z.]+\.v\d+", package.group(1))
    assert 'syntax = "proto3";' in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_rpc_has_a_request_and_a_response_of_its_own(path: Path) -> None:
    seen: set[str] = set()
    for service, body in _blocks(_code(path), "service"):
        assert service.endswith("Service")
        for name, request, response in re.findall(
            r"rpc (\w+)\((?:stream )?(\w+)\) returns \((?:stream )?(\w+)\)", body
        ):
            assert (request, response) == (f"{name}Request", f"{name}Response")
            assert not {request, response} & seen
            seen |= {request, response}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_enums_start_at_unspecified_and_carry_their_prefix(path: Path) -> None:
    for name, body in _blocks(_code(path), "enum"):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() + "_"
        values = re.findall(r"(\w+)\s*=\s*(\d+)", body)
        assert values[0] == (prefix + "UNSPECIFIED", "0")
        assert all(value.startswith(prefix) for value, _ in values), name
        assert len({number for _, number in values}) == len(values), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_fields_are_snake_case_and_numbered_once(path: Path) -> None:
    for name, body in _blocks(_code(path), "message"):
        flat = re.sub(r"\b(?:enum|message)\s+\w+\s*\{[^}]*\}", "", body)
        fields = re.findall(r"(\w+)\s*=\s*(\d+)\s*;", flat)
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", field) for field, _ in fields), name
        assert len({number for _, number in fields}) == len(fields), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_float_of_double_and_no_any_map_of_messages(path: Path) -> None:
    """Numbers on the wire are columns of bytes, or floats where a person may write them; nothing is untyped."""
    assert not re.search(r"\b(double|google\.protobuf\.Any|google\.protobuf\.Struct)\b", _code(path))


def test_error_reasons_are_grouped_by_status_with_room_between() -> None:
    body = dict(_blocks((PROTO / "engram/v1/error.proto").read_text(), "enum"))["ErrorReason"]
    numbers = [int(number) for number in re.findall(r"=\s*(\d+)\s*;", body)]
    assert numbers == sorted(numbers)
