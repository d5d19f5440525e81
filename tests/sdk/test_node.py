"""The example in clients/node against a real server: it steps a session, and goes on where it stands. Needs node, and npm's registry."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import engram

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The example with its packages."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    directory = tmp_path_factory.mktemp("node")
    for name in ("package.json", "stream.js"):
        shutil.copy(ROOT / "clients" / "node" / name, directory)
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    installed = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=100)
    if installed.returncode:
        pytest.skip(f"npm could not install the packages: {installed.stderr[-200:]}")
    return directory


def stream(example: pathlib.Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", "stream.js", address, *arguments], cwd=example, capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "ENGRAM_PROTOS": str(ROOT / "proto")},
    )  # fmt: skip


def test_it_streams_and_goes_on(example: pathlib.Path, server_with: Callable[..., Any]) -> None:
    with server_with() as server:
        done = stream(example, server.address, "digits-reader", "cam", "3")
        assert done.returncode == 0, done.stderr
        more = stream(example, server.address, "digits-reader", "cam", "2")
        assert more.returncode == 0, more.stderr
        lines = [json.loads(line) for line in (done.stdout + more.stdout).splitlines()]
        assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5]
        with engram.Client(server.address) as client:
            session = client.open("digits-reader", "twin")
            twin = session.run(np.repeat(np.arange(1, 6, dtype=np.float32)[:, None], 8, axis=1))
            assert client.sessions.get("cam").seq == 5
        assert np.array_equal(np.array([line["output"] for line in lines], np.float32), twin), (
            "the same bits as the SDK's"
        )


def test_it_says_what_was_wrong(example: pathlib.Path, server_with: Callable[..., Any]) -> None:
    with server_with() as server:
        done = stream(example, server.address, "no-such-model", "cam", "1")
    assert done.returncode == 1 and done.stderr.startswith("MODEL_NOT_FOUND: ")
