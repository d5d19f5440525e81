"""Models that lie or never end, and what is kept about them: no server waits for one, stops for one, or believes one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from looping import write_looping
from onnx import TensorProto, helper
from robots import write

from engram_models.batching import ALONE, Batching
from engram_models.bundle import load_bundle
from engram_models.bundle_writing import write_graph_bundle
from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
from engram_models.examination import TILE_ROWS, Examination, examine
from engram_models.graph_step import GraphError, GraphStep
from engram_models.spec import Schema, TensorSpec
from engram_service.runtimes import findings
from engram_service.runtimes.devices import CPU
from engram_service.runtimes.findings import Findings
from engram_service.runtimes.loader import Loader
from engram_service.settings import Settings

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]
ServerOf = Callable[..., ServerProcess]

ENDLESS = 1e15
SHORT_PATIENCE = "from engram_service import catalog\ncatalog._PATIENCE_S = 1.0, 60.0\n"
CRASHING_CHECK = """
import ctypes
from engram_models.graph_step import GraphStep

real = GraphStep.__call__

def crash(self, inputs, states, options=None):
    if (inputs[0] == 7).any():
        ctypes.string_at(0)
    return real(self, inputs, states, options)

GraphStep.__call__ = crash
"""


@pytest.fixture
def server_of(server_type: type) -> ServerOf:
    def make(tmp_path: Path, faults: str = "") -> ServerProcess:
        server = server_type(tmp_path, "--models", str(tmp_path / "models"), "--cache-dir", str(tmp_path / "cache"))
        server.faults = faults
        return server

    return make


def first_step(raw: Any, model: str) -> float:
    handle = int(np.frombuffer(raw.open(f"a-{model}", model=model).handles, np.uint32)[0])
    return float(np.frombuffer(raw.step(handle, 1, np.array([3], np.float32)), np.float32)[0])


@pytest.mark.parametrize("batching", [Batching(), Batching(None, 4), ALONE])
def test_outcomes_of_another_number_of_rows_are_an_error_and_never_spread_over_the_batch(batching: Batching) -> None:
    """y = x and h' = h, but of as many rows only as the largest number says."""
    spec = [TensorSpec(name, "float32", (2,)) for name in "xy"]
    schema = Schema((spec[0],), (spec[1],), (TensorSpec("h", "float32", (2,), "recurrent"),))
    node, tensor = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=1), node("Cast", ["most"], ["many"], to=TensorProto.INT64),
        node("Reshape", ["many", "one"], ["rows"]), node("Slice", ["x", "zero", "rows", "zero"], ["y"]),
        node("Slice", ["h", "zero", "rows", "zero"], ["next_h"]),
    ]  # fmt: skip
    values = [
        [tensor(name, TensorProto.FLOAT, shape) for name in names]
        for names, shape in ((("x", "h"), ["batch", 2]), (("y", "next_h"), None))
    ]
    numbers = [helper.make_tensor(name, TensorProto.INT64, [1], [number]) for name, number in (("zero", 0), ("one", 1))]
    made = helper.make_graph(nodes, "lying", values[0], values[1], numbers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    step = GraphStep(model.SerializeToString(), schema, batching)
    states = np.zeros((4, 2), np.float32)
    outputs, _ = step([np.full((4, 2), 4, np.float32)], [states])
    assert outputs[0].shape == (4, 2)
    for rows in (0, 1, 3):
        if batching != ALONE or not rows:
            with pytest.raises(GraphError, match="came out as"):
                step([np.full((4, 2), rows, np.float32)], [states])


def test_a_row_that_a_model_fails_on_disturbs_no_other_row(
    server_of: ServerOf, tmp_path: Path, connect: Connect
) -> None:
    """y = table[x], h' = h + y: an x beyond the table is an error of the whole batch to whoever runs it."""
    schema = Schema(
        (TensorSpec("x", "int64", ()),),
        (TensorSpec("y", "float32", ()),),
        (TensorSpec("h", "float32", (), "recurrent"),),
    )
    node, tensor = helper.make_node, helper.make_tensor_value_info
    nodes = [node("Gather", ["table", "x"], ["y"]), node("Add", ["h", "y"], ["next_h"])]
    values = [tensor(name, TensorProto.FLOAT, ["batch"]) for name in ("h", "y", "next_h")]
    inputs = [tensor("x", TensorProto.INT64, ["batch"]), values[0]]
    table = helper.make_tensor("table", TensorProto.FLOAT, [5], [1, 2, 4, 8, 16])
    made = helper.make_graph(nodes, "words", inputs, values[1:], [table])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    words = [np.arange(CHECK_STEPS * CHECK_ROWS).reshape(CHECK_STEPS, CHECK_ROWS) % 5]
    check = CheckVector.record(schema, GraphStep(model, schema), words, [np.zeros(CHECK_ROWS, np.float32)])
    write_graph_bundle(tmp_path / "models", "words", "1", model, schema, check)
    with server_of(tmp_path) as server:
        raw = connect(server)
        handles = np.frombuffer(raw.open(*(f"w{n}" for n in range(40)), model="words").handles, np.uint32)
        for seq in (1, 2):
            given = np.arange(40) % 5
            if seq == 1:
                given[[3, 17]] = 9
            raw.steps(handles.tolist(), [1 + (seq == 2 and n not in (3, 17)) for n in range(40)], given.tobytes())
            good, bad = {}, set()
            while len(good) + len(bad) < 40:
                frame = raw.next()
                if frame.WhichOneof("frame") == "errors":
                    bad |= set(np.frombuffer(frame.errors.handles, np.uint32).tolist())
                elif frame.WhichOneof("frame") == "outputs":
                    outputs = np.frombuffer(frame.outputs.outputs, np.float32).tolist()
                    good |= dict(zip(np.frombuffer(frame.outputs.handles, np.uint32).tolist(), outputs, strict=True))
            assert bad == (set(handles[[3, 17]].tolist()) if seq == 1 else set())
            expected = {int(handle): 2.0 ** (n % 5) for n, handle in enumerate(handles) if int(handle) not in bad}
            assert good == expected


def test_a_server_that_examines_a_model_stops_at_once(server_of: ServerOf, tmp_path: Path) -> None:
    write_looping(tmp_path / "models", "endless", ENDLESS)
    server = server_of(tmp_path)
    command = [
        sys.executable,
        "-m",
        "engram",
        "serve",
        "--listen",
        server.address,
        "--http",
        f"127.0.0.1:{server.http_port}",
    ]
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(tmp_path / "data"), *server.flags], stdout=log, stderr=log
        )
    until(lambda: server.ready().startswith("not ready"))
    process.terminate()
    assert process.wait(5) == 0


def test_a_model_that_takes_its_time_does_not_hold_up_the_others(
    server_of: ServerOf, tmp_path: Path, connect: Connect
) -> None:
    write_looping(tmp_path / "models", "good")
    write_looping(tmp_path / "models", "to-the-end", ENDLESS)
    server = server_of(tmp_path, SHORT_PATIENCE).start()
    raw = connect(server)
    until(lambda: not raw.open("there", model="good").errors)
    assert first_step(raw, "good") == 1
    assert "models: some are still being loaded" in server.ready()
    began = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - began < 10


def until(there: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_model_that_ends_the_process_as_it_is_loaded_is_refused_after_the_second_time(
    server_of: ServerOf, tmp_path: Path, connect: Connect
) -> None:
    write_looping(tmp_path / "models", "good")
    write_looping(tmp_path / "models", "mean", 7.0)
    server = server_of(tmp_path, CRASHING_CHECK)
    with server:  # which has started its data process three times
        assert server.log.read_text().count("ended (signal SIGSEGV)") == 2
        raw = connect(server)
        assert first_step(raw, "good") == 1
        assert "mean/1" in server.log.read_text() and "delete" in server.log.read_text()


def test_two_servers_whose_processes_have_one_number_share_a_directory(tmp_path: Path) -> None:
    """As in containers. The second one would have waited for the first one's lock for ever."""
    script = f"""
import os, sys
os.getpid = lambda: 1
from pathlib import Path
from engram_service.runtimes.watchdog import Crashes
crashes = Crashes(Path({str(tmp_path)!r}))
place = crashes.place()
crashes.name(place, "f" * 32)
crashes.running(place, True)
print("there", flush=True)
sys.stdin.read()
"""
    run = [sys.executable, "-c", script]
    first = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"there\n"
    subprocess.run(run, stdin=subprocess.DEVNULL, check=True, timeout=20)
    first.communicate(b"", timeout=10)
    assert len(list(tmp_path.glob("1-*.running"))) == 2
    assert all(file.stat().st_blocks for file in tmp_path.glob("*.running")), "a hole ends the process on a full disk"


@pytest.mark.parametrize("kept", ["[" * 4000, "[]", '{"floor": 0, "tile": 1}', '{"floor": "1", "tile": 1}',
                                  '{"floor": null, "tile": 0}', '{"floor": 1, "tile": true}', '{"floor": 3, "tile": 1}'])  # fmt: skip
def test_what_no_examination_finds_is_found_out_again(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(write(tmp_path / "models"))
    monkeypatch.setattr(findings, "examine", lambda *_: Examination(None, TILE_ROWS))
    known = Findings(tmp_path / "cache")
    known.of(bundle, 64, "1")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(kept)
    assert known.of(bundle, 64, "1") == Examination(None, TILE_ROWS)


@pytest.mark.parametrize("kept", ["[" * 100_000, "[]", '{"f": 1e999}', '{"f": []}', "\x00"])
def test_what_no_server_left_in_its_directory_is_passed_over(kept: str, tmp_path: Path) -> None:
    (tmp_path / "crashes.json").write_text(kept)
    (tmp_path / "1.trace").mkdir()
    os.mkfifo(tmp_path / "2.trace")
    (tmp_path / "3.trace").write_bytes(bytes(range(256)))
    script = f"""
from pathlib import Path
from engram_service.runtimes.watchdog import Crashes
crashes = Crashes(Path({str(tmp_path)!r}))
place = crashes.place()
crashes.name(place, "f" * 32)
crashes.running(place, True)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(list(tmp_path.glob("*.running"))) == 1


@pytest.mark.parametrize(("rounds", "expected"), [(3e5, Examination(None, TILE_ROWS)), (3, Examination(1, 1))])
def test_a_slow_model_is_not_probed_for_ever(rounds: float, expected: Examination, tmp_path: Path) -> None:
    """One call of it takes long, however many rows it has."""
    write_looping(tmp_path, "slow", rounds)
    found = examine(load_bundle(tmp_path / "slow" / "1"), 1024)
    assert found == expected and (found.row_s > 0.001) == (rounds > 3)


def test_a_model_that_is_slow_by_the_row_is_served_one_by_one_in_short_batches(tmp_path: Path) -> None:
    loader = Loader(Settings(cache_dir=str(tmp_path / "cache")), CPU)
    bundle = loader.look(write_heavy(tmp_path / "models"))
    runtime = loader.load(bundle, examine(bundle, loader.rows_max(bundle)))
    assert runtime.batching == "one by one"
    assert 1 <= loader.rows_max(bundle, runtime.row_s) < 1024 == loader.rows_max(bundle)


def write_heavy(directory: Path) -> Path:
    """y = h' = h + x, and much to compute beside it."""
    specs = [
        TensorSpec("x", "float32", (32,)),
        TensorSpec("y", "float32", (32,)),
        TensorSpec("h", "float32", (32,), "recurrent"),
    ]
    schema = Schema((specs[0],), (specs[1],), (specs[2],))
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["rows"], start=0, end=1), node("Concat", ["rows", "many"], ["wide"], axis=0),
        node("Unsqueeze", ["x", "one"], ["thin"]), node("Expand", ["thin", "wide"], ["v0"]),
        *(node(*parts) for n in range(3) for parts in (("MatMul", [f"v{n}", "w"], [f"m{n}"]), ("Tanh", [f"m{n}"], [f"v{n + 1}"]))),
        node("ReduceMean", ["v3", "one"], ["mean"], keepdims=0), node("Mul", ["mean", "nought"], ["none"]),
        node("Add", ["h", "x"], ["sum"]), node("Add", ["sum", "none"], ["y"]), node("Identity", ["y"], ["next_h"]),
    ]  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 32]) for name in ("x", "h", "y", "next_h")
    ]
    numbers = [
        helper.make_tensor("many", TensorProto.INT64, [2], [4096, 32]), helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("w", TensorProto.FLOAT, [32, 32], [0.1] * 1024), helper.make_tensor("nought", TensorProto.FLOAT, [], [0.0]),
    ]  # fmt: skip
    made = helper.make_graph(nodes, "heavy", values[:2], values[2:], numbers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    inputs, before = np.ones((CHECK_STEPS, CHECK_ROWS, 32), np.float32), np.zeros((CHECK_ROWS, 32), np.float32)
    check = CheckVector.record(schema, GraphStep(model, schema), [inputs], [before])
    return write_graph_bundle(directory, "heavy", "1", model, schema, check)
