"""The generated code of engram.v1 is what proto/ generates, file by file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_up_to_date() -> None:
    pytest.importorskip("grpc_tools", reason="the generator comes with the dev extra")
    command = [sys.executable, ROOT / "tools" / "generate.py", "--check", ROOT / "clients" / "python"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr


def test_references_are_up_to_date() -> None:
    pytest.importorskip("grpc_tools", reason="the generator comes with the dev extra")
    command = [sys.executable, ROOT / "tools" / "reference.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
