"""What runs models holds up: a batch without an end, a model that ends the process, rows that may not share a call, what is kept."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from looping import write_looping, write_pooling
from numpy.typing import NDArray
from robots import SCHEMA, graph, step, write

from engram_models.batching import ALONE, Batching
from engram_models.bundle import BundleError, load_bundle
from engram_models.examination import TILE_ROWS, Examination
from engram_models.graph_step import GraphError, GraphStep
from engram_models.spec import Schema, TensorSpec
from engram_service import pauses
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.runtimes import findings
from engram_service.runtimes.findings import Findings
from engram_service.scheduling.columns import Steps
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.table import SessionTable
from engram_service.steps.loop import StepLoop

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]

SHORT_RUNS = """
from engram_service.runtimes import watchdog
watchdog.RUN_S_MAX = 1.0
"""
SHORT_PAUSES = (
    SHORT_RUNS
    + """
from engram_service import pauses
pauses.PAUSE_S = 3.0
"""
)
ENDLESS = 1e15
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


def opened(raw: Any, model: str, session: str = "a") -> int:
    return int(np.frombuffer(raw.open(f"{session}-{model}", model=model).handles, np.uint32)[0])


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


def refused(raw: Any, handle: int, seq: int, number: float) -> Any:
    raw.steps([handle], [seq], value(number))
    return raw.next("errors").errors[0]


def test_a_model_whose_batches_are_stopped_again_and_again_does_not_hold_up_the_others(
    server: ServerProcess, connect: Connect
) -> None:
    server.faults = SHORT_PAUSES
    with server:
        raw, other = connect(server), connect(server)
        looping, good, waiting = opened(raw, "looping"), opened(raw, "good"), opened(other, "looping", "b")
        assert np.frombuffer(raw.step(looping, 1, value(3)), np.float32) == 1
        assert refused(raw, looping, 2, ENDLESS).reason == "INTERNAL"
        assert np.frombuffer(raw.step(looping, 2, value(3)), np.float32) == 2, "the first one has no pause"
        assert "warning" not in server.ready()
        raw.steps([looping], [3], value(ENDLESS))
        time.sleep(0.3)
        again = refused(other, waiting, 1, 3)  # it waits for the only thread, and is told when that is free
        assert (again.reason, again.metadata["applied"]) == ("MODEL_PAUSED", "no"), again
        assert raw.next("errors").errors[0].reason == "INTERNAL"
        began = time.monotonic()
        for number in (3, ENDLESS):
            error = refused(raw, looping, 3, number)
            assert (error.code, error.reason, error.metadata["applied"]) == (14, "MODEL_PAUSED", "no")
            assert "looping/1" in error.message and 0 < error.retry_after_ms <= 3000, error
        assert np.frombuffer(raw.step(good, 1, value(3)), np.float32) == 1
        raw.steps([looping], [2], value(3))
        assert np.frombuffer(raw.next("outputs").outputs, np.float32) == 2, "what was computed before is answered"
        assert time.monotonic() - began < 1.0
        assert "warning: model looping/1: 2 of its batches" in server.ready() and server.ready().startswith("ready")
        assert "refused for 3 s" in server.log.read_text()
        time.sleep(error.retry_after_ms / 1000)
        assert np.frombuffer(raw.step(looping, 3, value(3)), np.float32) == 3
        assert refused(raw, looping, 4, ENDLESS).reason == "INTERNAL"
        assert 3000 < refused(raw, looping, 4, 3).retry_after_ms <= 6000, "twice as long, though one was computed"
        assert server.series()['engram_batches_stopped_total{model="looping"}'] == 3


@pytest.fixture
def stuck(tmp_path: Path, server_type: type, connect: Connect) -> Iterator[ServerProcess]:
    """A server of which the step loop is in an operator that takes an hour."""
    write_pooling(tmp_path / "models", "pooling")
    flags = ("--drain-timeout-s", "2", "--cache-dir", str(tmp_path / "cache"))
    with server_type(tmp_path, "--models", str(tmp_path / "models"), *flags) as server:
        raw = connect(server)
        pooling = opened(raw, "pooling")
        assert np.frombuffer(raw.step(pooling, 1, value(1)), np.float32) == 1
        raw.steps([pooling], [2], value(3e6))
        time.sleep(0.5)
        yield server


def redis_ends(server: ServerProcess) -> bool:
    pid, deadline = int((server.directory / "data" / "redis.pid").read_text().split()[0]), time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.single_redis("it is about the private Redis")
def test_a_server_ends_though_an_operator_of_a_model_does_not(stuck: ServerProcess) -> None:
    began = time.monotonic()
    assert stuck.stop() == 0
    assert 2 < time.monotonic() - began < 8, "what was accepted had its time"
    left = [line for line in stuck.log.read_text().splitlines() if "left behind" in line]
    assert len(left) == 1 and "model pooling/1" in left[0], left
    assert redis_ends(stuck)


@pytest.mark.single_redis("it is about the private Redis")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(stuck: ServerProcess, number: signal.Signals) -> None:
    for _ in range(2):  # one and the same, that came on two ways
        stuck.signal(number)
        time.sleep(0.1)
    time.sleep(0.7)
    began = time.monotonic()
    stuck.signal(number)
    assert stuck.ended() == 128 + number and time.monotonic() - began < 1
    assert "a second signal" in stuck.log.read_text() and redis_ends(stuck)


@dataclass
class Model:
    bundle: Any
    index: int = 0


def test_pauses_double_to_a_limit_and_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(pauses.time, "monotonic", lambda: now[0])
    health = Health()
    known, model = Pauses(Metrics(), health), Model(load_bundle(write(tmp_path)))

    def stop() -> int:
        """How long its steps are refused then, in seconds."""
        known.stopped(model, now[0])
        now[0] += 0.001
        refusal = known.refusal(0)
        return round(refusal.retry_after_ms / 1000) if refusal else 0

    found = []
    for _ in range(9):
        found.append(stop())
        assert known.bars(0, running=False) == (found[-1] > 0), "none, while they are refused"
        known.stopped(model, now[0] - 1)  # which ran beside it
        now[0] += found[-1]
        assert known.refusal(0) is None and not known.bars(0, running=False)
        assert known.bars(0, running=True) == (len(found) > 1), "and one at a time afterwards"
    assert found == [0, 10, 20, 40, 80, 160, 300, 300, 300]

    assert known.refusal(1) is None and not known.bars(1, running=False), "another model's are its own"
    known.forget(now[0])
    assert len(health.warnings()) == 1
    known.forget(now[0] + 600)
    assert not health.warnings() and not known.bars(0, running=True)
    assert stop() == 0


@dataclass
class Lines:
    """Of commits."""

    full: bool = False


@dataclass(eq=False)
class Served:
    rows_max: int


@dataclass
class Models:
    models: list[Served]


def test_a_model_that_is_paused_has_no_batch_and_the_others_have_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(pauses.time, "monotonic", lambda: now[0])
    known, model = Pauses(Metrics(), Health()), Model(load_bundle(write(tmp_path)))
    scheduler, table, lines = Scheduler(16), SessionTable(), Lines()

    async def looping() -> StepLoop:
        none: Any = None
        catalog: Any = Models([Served(2), Served(3)])
        commits: Any = lines
        return StepLoop(none, none, none, scheduler, catalog, table, commits, *(none,) * 9, known, none)

    loop = asyncio.run(looping())

    def taken() -> tuple[int, list[int]] | None:
        batch = loop._next_batch(now[0])
        return None if batch is None else (loop._catalog.models.index(batch[0]), batch[1].steps.rows.tolist())

    def waits(which: int, *rows: int) -> None:
        count = len(rows)
        scheduler.add(which, Steps(
            np.array(rows, np.int32), np.ones(count, np.uint32), np.arange(count, dtype=np.uint32), np.ones(count, np.uint64),
            np.zeros(count, np.uint8), np.full(count, np.inf), np.zeros((count, 4)), np.zeros((count, 4), np.uint8),
        ))  # fmt: skip

    for _ in range(2):
        known.stopped(model, now[0])
        now[0] += 0.001
    waits(0, 0, 1, 2)
    waits(1, 3, 4, 5, 6)
    lines.full = True
    assert taken() is None, "there is no line for its commit"
    lines.full = False
    assert [taken() for _ in range(3)] == [(1, [3, 4, 5]), (1, [6]), None]
    assert known.refusal(0) is not None and scheduler.waiting_rows == 3
    now[0] += 10
    assert [taken() for _ in range(3)] == [(0, [0, 1]), (0, [2]), None]
    table.busy[:] = False
    waits(0, 0)
    waits(1, 3)
    found = [taken(), taken()]
    assert sorted(found) == [(0, [0]), (1, [3])], "it has its turns again"  # type: ignore[type-var]


def test_a_model_that_ends_the_process_twice_is_refused_by_name_and_the_others_are_served(
    server: ServerProcess, connect: Connect
) -> None:
    server.faults = CRASHING
    with server:
        for times in (1, 2):
            raw = connect(server)
            raw.steps([opened(raw, "looping")], [1], value(99))
            deadline = time.monotonic() + 20
            while server.log.read_text().count("ended (signal SIGSEGV)") < times or server.ready() != "ready\n":
                assert time.monotonic() < deadline
                time.sleep(0.05)
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
    assert kept.of(bundle, 64, "1") == Examination(1, 1)
    monkeypatch.setattr(findings, "examine", lambda *_: Examination(None, TILE_ROWS))
    assert kept.of(bundle, 64, "1") == Examination(1, 1), "not looked at again"
    assert kept.of(bundle, 65, "1") == Examination(None, TILE_ROWS), "other batches were not tried"
    for file in (tmp_path / "cache").iterdir():
        file.write_text('{"floor": ')
    assert kept.of(bundle, 64, "1") == Examination(None, TILE_ROWS)
    unusable = tmp_path / "file"
    unusable.write_text("")
    assert Findings(unusable / "cache").of(bundle, 64, "1") == Examination(None, TILE_ROWS)


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
