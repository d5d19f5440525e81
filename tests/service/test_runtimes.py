"""What runs models holds up: a batch without an end, a model that ends the process, rows that may not share a call, what is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from looping import write_looping
from numpy.typing import NDArray
from robots import SCHEMA, graph, step, write

from engram_models.bundle import BundleError, load_bundle
from engram_models.examination import TILE_ROWS, Examination
from engram_models.graph_step import ALONE, Batching, GraphError, GraphStep
from engram_models.spec import Schema, TensorSpec
from engram_service.runtimes import findings
from engram_service.runtimes.findings import Findings

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]

SHORT_RUNS = """
from engram_service.runtimes import watchdog
watchdog.RUN_S_MAX = 1.0
"""
CRASHING = """
import ctypes
from engram_models.graph_step import GraphStep

real = GraphStep.__call__

def crash(self, inputs, states, options=None):
    if options is not None and (inputs[0] == 99).any():
        ctypes.string_at(0)
    return real(self, inputs, states, options)

GraphStep.__call__ = crash
"""


@pytest.fixture
def server(tmp_path: Path, server_type: type) -> ServerProcess:
    write_looping(tmp_path / "models", "looping")
    write_looping(tmp_path / "models", "good")
    return server_type(tmp_path, "--models", str(tmp_path / "models"), "--cache-dir", str(tmp_path / "cache"))


def opened(raw: Any, model: str) -> int:
    return int(np.frombuffer(raw.open(f"a-{model}", model=model).handles, np.uint32)[0])


def value(number: float) -> NDArray[np.float32]:
    return np.array([number], np.float32)


def test_a_batch_without_an_end_is_stopped_and_the_others_are_served_on(
    server: ServerProcess, connect: Connect
) -> None:
    server.faults = SHORT_RUNS
    with server:
        raw = connect(server)
        looping, good = opened(raw, "looping"), opened(raw, "good")
        assert np.frombuffer(raw.step(looping, 1, value(3)), np.float32) == 1
        raw.steps([looping], [2], value(1e15))
        errors = raw.next("errors")
        assert errors.errors[0].reason == "INTERNAL" and "looping/1" in errors.errors[0].message, errors
        assert "was stopped" in errors.errors[0].message
        assert np.frombuffer(raw.step(good, 1, value(3)), np.float32) == 1
        assert np.frombuffer(raw.step(looping, 2, value(3)), np.float32) == 2, (
            "nothing of the stopped batch was applied"
        )


def test_a_model_that_ends_the_process_twice_is_refused_by_name_and_the_others_are_served(
    server: ServerProcess, connect: Connect
) -> None:
    server.faults = CRASHING
    for _ in range(2):
        server.start()
        raw = connect(server)
        raw.steps([opened(raw, "looping")], [1], value(99))
        assert server.ended() == -signal.SIGSEGV
    with server:
        raw = connect(server)
        assert np.frombuffer(raw.step(opened(raw, "good"), 1, value(3)), np.float32) == 1
        refused = raw.open("a-looping", model="looping").errors[0].error
        assert refused.reason == "MODEL_NOT_FOUND"
        assert "looping/1" in server.log.read_text() and "ended this server's process 2 times" in server.log.read_text()


def test_a_process_that_was_killed_counts_against_no_model(tmp_path: Path) -> None:
    bundle = load_bundle(write(tmp_path / "models"))
    fingerprint, thread = bundle.fingerprint.encode(), 0x7F00
    running = b"%016x%s\1" % (thread, fingerprint)
    trace = b"Fatal Python error: Segmentation fault\n\nThread 0x00000000001 (most recent call first):\n\nCurrent thread 0x%016x (most"
    cases = {"1": b"", "2": trace % thread, "3": trace % 0x1234}  # killed; crashed; crashed in another thread
    for pid, written in cases.items():
        (tmp_path / f"{pid}.trace").write_bytes(written)
        (tmp_path / f"{pid}.running").write_bytes(running.ljust(64, b"\0"))
    script = f"""
import sys
from pathlib import Path
from engram_models.bundle import load_bundle
from engram_service.runtimes.watchdog import Crashes
print(Crashes(Path({str(tmp_path)!r})).of(load_bundle(Path({str(bundle.path)!r}))))
"""
    for _ in range(2):  # what was counted once is not counted again
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert found.stdout == "1\n", found
    assert json.loads((tmp_path / "crashes.json").read_text()) == {bundle.fingerprint: 1}


def test_what_was_found_out_is_kept_and_what_cannot_be_read_is_found_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(write(tmp_path / "models"))
    kept = Findings(tmp_path / "cache")
    assert kept.of(bundle, 64) == Examination(1, 1)
    monkeypatch.setattr(findings, "examine", lambda *_: Examination(None, TILE_ROWS))
    assert kept.of(bundle, 64) == Examination(1, 1), "not looked at again"
    assert kept.of(bundle, 65) == Examination(None, TILE_ROWS), "other batches were not tried"
    for file in (tmp_path / "cache").iterdir():
        file.write_text('{"floor": ')
    assert kept.of(bundle, 64) == Examination(None, TILE_ROWS)
    unusable = tmp_path / "file"
    unusable.write_text("")
    assert Findings(unusable / "cache").of(bundle, 64) == Examination(None, TILE_ROWS)


@pytest.mark.parametrize("batching", [Batching(), Batching(4), Batching(None, 5), ALONE])
def test_rows_share_a_call_only_where_their_shared_tensors_are_equal(batching: Batching) -> None:
    rng = np.random.default_rng(2)
    given = GraphStep(graph().SerializeToString(), SCHEMA, batching)
    rows = 13
    inputs = [rng.integers(-8, 8, rows).astype(np.float16) / 64, rng.integers(-4, 4, (rows, 3)).astype(np.float32)]
    states = [
        rng.choice([8000, 16000, 44100], rows), rng.integers(-4, 4, (rows, 2)).astype(np.float32),
        rng.integers(1, 4, (rows, 2)).astype(np.float32), np.arange(rows),
    ]  # fmt: skip
    for got, want in zip(given(inputs, states), step(inputs, states), strict=True):
        for one, other in zip(got, want, strict=True):
            assert np.array_equal(one, other) and one.dtype == other.dtype


def test_a_graph_that_is_not_what_its_schema_says_is_refused_in_one_line() -> None:
    made = graph()
    fewer = Schema(SCHEMA.inputs, SCHEMA.outputs, SCHEMA.state[:3])
    other = Schema((TensorSpec("gap", "float32", ()), *SCHEMA.inputs[1:]), SCHEMA.outputs, SCHEMA.state)
    broken = onnx.ModelProto()
    broken.CopyFrom(made)
    broken.graph.node[0].op_type = "Nonsense"
    for model, schema, said in [
        (made, fewer, "asks for 5"), (made, other, "asks for tensor(float)"), (broken, SCHEMA, "Nonsense"),
    ]:  # fmt: skip
        with pytest.raises(GraphError) as error:
            GraphStep(model.SerializeToString(), schema)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_a_bundle_whose_graph_was_changed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    file = path / "step.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="is not the graph that"):
        load_bundle(path)
