"""Runs the plain server of tests/yardstick beside the bench: what the same model does in a server written in a day.

The yardstick is no part of the installed package. It is found in the checkout this module runs from, or in the directory that
ENGRAM_YARDSTICK names; elsewhere the bench goes without it and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from engram_service.bench.types import Progress
from engram_service.bench.workload import has_torch
from engram_service.store.private import PrivateRedis, PrivateSettings

STYLES = ("threads", "asyncio")
_WARM_UP_S = 2.0
_LATE_S = 60.0


@dataclass(frozen=True)
class PlainResult:
    steps_per_s: float
    p50_ms: float
    p99_ms: float


def yardstick() -> Path | None:
    """The directory of plain_server.py, if there is one."""
    named = os.environ.get("ENGRAM_YARDSTICK")
    directory = Path(named) if named else Path(__file__).resolve().parents[3] / "tests" / "yardstick"
    return directory if (directory / "plain_server.py").is_file() else None


def measure_plain(
    sessions: int, seconds: float, processes: int, scratch: Path, progress: Progress
) -> PlainResult | None:
    """Closed loop against the plain server in each of its styles; the faster one counts. None: not to be found.

    Its Redis is a private one of the same settings as Engram's.
    """
    directory = yardstick()
    if directory is None:
        progress("the plain server is not here (it is in the repository's tests/yardstick): no ratio to it")
        return None
    if not has_torch():
        progress("the plain server computes with torch, which is not installed: no ratio to it")
        return None
    store = PrivateRedis(PrivateSettings(scratch / "plain-redis"))
    store.start()
    try:
        found = []
        for style in STYLES:
            progress(f"the plain server ({style}), {sessions} sessions")
            found.append(_measure(directory, style, store.url, sessions, seconds, min(processes, sessions)))
        return max(found, key=lambda one: one.steps_per_s)
    finally:
        store.stop()


def _measure(directory: Path, style: str, url: str, sessions: int, seconds: float, processes: int) -> PlainResult:
    command = [sys.executable, str(directory / "plain_server.py"), "--style", style, "--redis-url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split()[-1]
            return _load(directory, f"127.0.0.1:{port}", sessions, seconds, processes)
        finally:
            server.terminate()


def _load(directory: Path, address: str, sessions: int, seconds: float, processes: int) -> PlainResult:
    clients = [
        subprocess.Popen(
            [
                sys.executable, directory / "plain_client.py", "--address", address, "--seconds", str(seconds),
                "--sessions", str(sessions // processes + (number < sessions % processes)),
                "--warm-up", str(_WARM_UP_S), "--seed", str(number + 1),
            ],
            stdout=subprocess.PIPE, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    found = [json.loads(client.communicate(timeout=seconds + _WARM_UP_S + _LATE_S)[0]) for client in clients]
    steps = sum(one["steps"] for one in found)
    p50, p99 = (sum(one["latencies_ms"][at] for one in found) / len(found) for at in (0, 1))
    return PlainResult(steps / seconds, p50, p99)
