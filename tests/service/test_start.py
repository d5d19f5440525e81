"""How a server starts and stops, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import pathlib
import queue
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram.v1 import session_pb2, stream_pb2

pytestmark = pytest.mark.usefixtures("server_wire")

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engram", "serve", *flags], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_bad_setting_stops_the_start() -> None:
    done = serve("--listen", "nonsense")
    assert done.returncode == 2 and "listen = 'nonsense'" in done.stderr and "Traceback" not in done.stderr
    done = serve(ENGRAM_DURABILITY="never")
    assert done.returncode == 2 and "durability = 'never'" in done.stderr


def test_a_port_in_use(tmp_path: pathlib.Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = f"127.0.0.1:{listener.getsockname()[1]}"
        for flags in (("--listen", taken, "--http", "127.0.0.1:0"), ("--http", taken, "--listen", "127.0.0.1:0")):
            done = serve(*flags, "--data-dir", str(tmp_path / "data"))
            assert done.returncode == 1 and taken in done.stderr and "Traceback" not in done.stderr


@pytest.mark.single_redis("it is about the private Redis")
def test_a_data_directory_in_use_or_unusable(shared_server: ServerProcess, tmp_path: pathlib.Path) -> None:
    free = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    done = serve(*free, "--data-dir", str(shared_server.directory / "data"))
    assert done.returncode == 1 and "in use by another server" in done.stderr
    (tmp_path / "file").write_text("not a directory")
    done = serve(*free, "--data-dir", str(tmp_path / "file" / "data"))
    assert done.returncode == 1 and "cannot be used" in done.stderr
    done = serve(*free, "--redis-url", "http://nowhere")
    assert done.returncode == 1 and "redis_url" in done.stderr


@pytest.mark.single_redis("it is about the private Redis")
def test_it_stops_cleanly_and_takes_its_redis_along(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server)
    handle = int(np.frombuffer(raw.open("kept").handles, np.uint32)[0])
    raw.step(handle, 1)
    assert server.stop() == 0
    assert not (server.directory / "data" / "redis.sock").exists()
    server.start()
    assert connect(server).get("kept").seq == 1


def test_metrics_and_health(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server)
    handle = int(np.frombuffer(raw.open("counted").handles, np.uint32)[0])
    for seq in range(1, 11):
        raw.step(handle, seq)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as response:
        text = response.read().decode()
    assert 'engram_steps_total{model="digits-reader",outcome="ok"} 10.0' in text
    assert 'engram_sessions{residency="device"} 1.0' in text
    assert 'engram_sessions_opened_total{how="created"} 1.0' in text
    for name in (
        "engram_batch_rows_bucket",
        "engram_stage_seconds_count",
        "engram_commit_bytes_total",
        "engram_redis_up 1.0",
        'engram_device_memory_bytes{device="cpu"}',
    ):
        assert name in text
    assert "counted" not in text, "no label grows with users"
    assert _status(server, "healthz") == _status(server, "readyz") == 200


def _status(server: ServerProcess, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/{path}") as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_models_come_and_are_refused_while_it_runs(
    tmp_path: pathlib.Path, connect: Connect, server_with: Callable[..., ServerProcess]
) -> None:
    import engram_models

    models = tmp_path / "models"
    engram_models.write_bundle(models, "own", "1", engram_models.LSTM(3, 4))
    with server_with("--models", str(models)) as server:
        raw = connect(server)

        def reload() -> Any:
            return raw.unary("ReloadModels", session_pb2.ReloadModelsRequest(), session_pb2.ReloadModelsResponse)

        first = raw.open("a", model="own")
        raw.step(int(np.frombuffer(first.handles, np.uint32)[0]), 1, np.zeros(3, np.float32))
        engram_models.write_bundle(models, "own", "2", engram_models.LSTM(3, 4))
        broken = engram_models.write_bundle(models, "own", "3", engram_models.LSTM(3, 4))
        (broken / "weights.safetensors").write_bytes(b"nonsense")
        shutil.copytree(models / "own" / "1", models / "swapped" / "1")
        shutil.copy(models / "own" / "2" / "weights.safetensors", models / "swapped" / "1")
        answer = reload()
        assert {(model.name, model.version) for model in answer.models if model.name == "own"} == {
            ("own", "1"),
            ("own", "2"),
        }
        assert len(answer.errors) == 2 and any("own/3" in error for error in answer.errors)
        again = connect(server)
        response = again.open("a", "b", model="own")
        assert [row.error.reason for row in response.errors] == ["SESSION_OF_OTHER_MODEL"], "one frame, one version"
        assert not again.open("b", model="own").errors
        assert again.get("a").version == "1", "a living session stays on its version"
        assert again.get("b").version == "2"
        moved = again.unary(
            "MoveSession", session_pb2.MoveSessionRequest(session_id="a", version="2"), session_pb2.MoveSessionResponse
        )
        assert (moved.session.version, moved.session.seq) == ("2", 1)
        response = again.open("a", model="own")
        assert np.frombuffer(response.seqs, np.uint64).tolist() == [1]
        assert len(again.step(int(np.frombuffer(response.handles, np.uint32)[0]), 2, np.zeros(3, np.float32))) == 16


def test_what_is_examined_and_files_that_are_not_those_served_are_in_the_log(
    tmp_path: pathlib.Path, connect: Connect, server_with: Callable[..., ServerProcess]
) -> None:
    import engram_models

    models, flags = tmp_path / "models", ("--cache-dir", str(tmp_path / "cache"), "--models-poll-s", "3600")
    for name in "abc":
        engram_models.write_bundle(models, name, "1", engram_models.LSTM(3, 4))
    other = engram_models.write_bundle(tmp_path / "others", "b", "1", engram_models.LSTM(3, 4))
    with server_with("--models", str(models), *flags) as server:
        raw = connect(server)

        def told(of_what: str) -> list[str]:
            lines = [json.loads(line)["message"] for line in server.log.read_text().splitlines()]
            return [line for line in lines if of_what in line]

        def reload() -> list[str]:
            asked = session_pb2.ReloadModelsRequest()
            return list(raw.unary("ReloadModels", asked, session_pb2.ReloadModelsResponse).errors)

        examined = told("is examined")
        assert [line.split()[1] for line in examined] == ["a/1", "b/1", "c/1"]
        assert [int(line.split()[-1]) for line in examined] == [2, 1, 0], "how many are behind it"
        served = models / "b" / "1"
        for file in served.iterdir():
            os.utime(file)
        assert reload() == told("are not those") == [], "the same files, copied again"
        served.rename(tmp_path / "served")
        other.rename(served)
        for _ in range(2):
            (error,) = reload()
            assert "b/1" in error and "are not those" in error
            assert len(told("are not those")) == 1
        (served / "model.toml").write_text("nonsense")
        assert len(reload()) == len(told("are not those")) == 1
        served.rename(tmp_path / "other")
        (tmp_path / "served").rename(served)
        assert reload() == []


@pytest.mark.parametrize("durability", [stream_pb2.DURABILITY_STEP, stream_pb2.DURABILITY_INTERVAL])
def test_a_drain_finishes_what_was_accepted(
    durability: stream_pb2.Durability, redis_process: Any, server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    with server_with("--redis-url", redis_process.url) as server:
        raw = connect(server)
        handle = int(np.frombuffer(raw.open("drained", durability=durability).handles, np.uint32)[0])
        redis_process.pause()  # so that there is something to finish
        rows = 32
        raw.steps([handle] * rows, list(range(1, rows + 1)), np.zeros((rows, 8), np.float32))
        time.sleep(0.05)
        server.terminate()
        while _status(server, "readyz") != 503:
            assert _status(server, "healthz") == 200
        redis_process.go_on()
        answered, draining = 0, False
        while answered < rows or not draining:
            response = raw.next()
            assert response is not None
            answered += len(response.outputs.seqs) // 8
            draining = draining or response.event.type == 3
        assert server.stop() == 0
        server.start()
        assert connect(server).get("drained").seq == rows, "what was answered is durable"


def test_log_lines_carry_session_and_trace_and_no_inputs(shared_server: ServerProcess, connect: Connect) -> None:
    import grpc

    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with grpc.insecure_channel(shared_server.address) as channel:
        stream = channel.stream_stream(
            "/engram.v1.EngramService/Stream", response_deserializer=stream_pb2.StreamResponse.FromString
        )
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = stream(iter(requests.get, None), metadata=(("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),))
        frame = stream_pb2.OpenFrame(request_id=1, model="digits-reader", session_ids=["logged"], client_id=1)
        requests.put(stream_pb2.StreamRequest(open=frame).SerializeToString())
        next(call)
        connect(shared_server).open("logged", client_id=2)
        assert next(call).event.type == stream_pb2.EventFrame.TYPE_TAKEN_OVER
        requests.put(None)
    lines = [json.loads(line) for line in shared_server.log.read_text().splitlines()]
    told = [line for line in lines if "taken over" in line["message"] and line.get("session") == "logged"]
    assert [line["trace"] for line in told] == [trace]
    assert any(line.get("trace") == trace and line["message"] == "stream opened" for line in lines)


def test_sessions_of_unary_callers_are_let_go(connect: Connect, server_with: Callable[..., ServerProcess]) -> None:
    with server_with("--resident-idle-s", "0.5") as server:
        raw = connect(server)

        def step() -> Any:
            asked = session_pb2.StepRequest(session_id="now-and-then", model="digits-reader", inputs=[0.5] * 8)
            return raw.unary("Step", asked, session_pb2.StepResponse)

        def known() -> float:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as response:
                lines = response.read().decode().splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("engram_sessions{"))

        assert step().seq == 1
        assert known() == 1
        deadline = time.monotonic() + 10
        while known():
            assert time.monotonic() < deadline, "an idle session must cost the server nothing"
            time.sleep(0.1)
        assert step().seq == 2
