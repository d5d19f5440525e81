"""The yardstick computes what it claims to: one session's outputs are those of plain torch, and its state is in Redis."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engram_service.bench.plain import STYLES
from engram_service.store.private import PrivateRedis, PrivateSettings

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_the_plain_server_computes_w_and_keeps_its_state(tmp_path: Path, style: str) -> None:
    store = PrivateRedis(PrivateSettings(tmp_path / "redis"))
    store.start()
    server = subprocess.Popen(
        [sys.executable, HERE / "plain_server.py", "--style", style, "--redis-url", store.url],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = "127.0.0.1:" + server.stdout.readline().split()[-1]
        command = [
            sys.executable,
            HERE / "plain_client.py",
            "--address",
            address,
            "--seconds",
            "0.5",
            "--warm-up",
            "0.2",
        ]
        answer = subprocess.run(
            [*command, "--sessions", "4", "--check"], capture_output=True, text=True, check=True, timeout=60
        )
        found = json.loads(answer.stdout)
        assert found["steps"] > 0
        assert 0 <= found["difference"] < 1e-5
    finally:
        server.terminate()
        server.wait(10)
        if server.stdout is not None:
            server.stdout.close()
        store.stop()
