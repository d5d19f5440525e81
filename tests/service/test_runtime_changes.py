"""Sessions that another runtime has stepped are gone on with, which is told and counted; a batch that fails names its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import robots

from engram_service.store.keys import META_PREFIX
from engram_service.store.record import HEADER, checksums

CHANGES = 'engram_runtime_changes_total{from="torch_cells-cuda",model="robot",to="onnx_graphs-cpu"}'
FAILING = """
from engram_service.runtimes.base import RuntimeStoppedError
from engram_service.runtimes.onnx_graphs import OnnxGraphs

real, calls = OnnxGraphs.step, []

def step(self, *arguments):
    calls.append(1)
    if len(calls) == 2:
        raise RuntimeStoppedError("a batch of model robot/1 ran for more than 10 s and was stopped")
    if len(calls) == 4:
        raise RuntimeError("secrets of the machine")
    return real(self, *arguments)

OnnxGraphs.step = step
"""


@pytest.fixture
def flags(tmp_path: Any) -> tuple[str, ...]:
    robots.write(tmp_path / "models")
    return "--models", str(tmp_path / "models"), "--log-format", "json"


def written_by(redis: Any, runtime: int) -> int:
    """Says of all records that this runtime wrote them; how many there are."""
    keys = [key for key in redis.scan_iter(META_PREFIX + b"*") if redis.type(key) == b"string"]
    for key in keys:
        record = np.frombuffer(redis.get(key), np.uint8).reshape(1, -1).copy()
        header = record[:, : HEADER.itemsize].view(HEADER)
        assert header["runtime"] == 1 or header["seq"] == 0
        header["runtime"] = runtime
        header["checksum"] = checksums(record)
        redis.set(key, record.tobytes(), keepttl=True)
    return len(keys)


def test_a_takeover_by_another_runtime_is_allowed_told_once_and_counted(
    server_with: Callable, connect: Callable, flags: tuple[str, ...]
) -> None:
    inputs, ids = robots.some(5), ["a", "b", "c"]
    outputs, _ = robots.run(inputs)
    with server_with(*flags) as server:
        raw = connect(server)
        for seq in (1, 2):
            handles = np.frombuffer(raw.open(*ids, model="robot").handles, np.uint32).tolist()
            raw.steps(handles[:2], [seq] * 2, inputs[seq - 1].tobytes() * 2)
            rows = 0
            while rows < 2:
                rows += len(raw.next("outputs").handles) // 4
            assert written_by(server.redis(), 3) == 3
        handles = np.frombuffer(raw.open(*ids, model="robot").handles, np.uint32).tolist()
        got = b"".join(raw.step(handles[0], seq, inputs[seq - 1 : seq]) for seq in (3, 4, 5))
        assert got == outputs[2:].tobytes()
        assert server.series()[CHANGES] == 4, "two sessions with steps, twice"
        lines = [
            json.loads(line) for line in server.log.read_text().splitlines() if "their next bits may differ" in line
        ]
        assert len(lines) == 1 and "robot/1" in str(lines[0]) and lines[0]["level"].lower() == "warning"


def test_a_batch_that_failed_names_its_model_and_the_sessions_go_on(
    server_with: Callable, connect: Callable, flags: tuple[str, ...]
) -> None:
    inputs = robots.some(3)
    outputs, _ = robots.run(inputs)
    one = server_with(*flags)
    one.faults = FAILING
    with one as server:
        raw = connect(server)
        handle = np.frombuffer(raw.open("s", model="robot").handles, np.uint32).tolist()[0]
        assert raw.step(handle, 1, inputs[:1]) == outputs[:1].tobytes()
        for seq, why in (
            (2, "of model robot/1 ran for more than 10 s"),
            (3, "model robot/1 failed on this session's input"),
        ):
            raw.steps([handle], [seq], inputs[seq - 1].tobytes())
            (error,) = raw.next("errors").errors
            assert (error.reason, error.metadata["model"], error.metadata["applied"]) == ("INTERNAL", "robot", "no")
            assert why in error.message and error.message.endswith("; nothing was applied")
            assert "secrets" not in error.message
            assert raw.step(handle, seq, inputs[seq - 1 : seq]) == outputs[seq - 1 : seq].tobytes()
