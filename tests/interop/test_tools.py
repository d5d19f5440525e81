"""grpcurl and ghz, which are grpc-go, against `engram serve` on each of its wires: all that they know, they ask it by reflection."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

pytestmark = [pytest.mark.both_wires, pytest.mark.timeout(900)]  # the first of them builds the programs

MODEL, INPUTS, WAIT_S = "digits-reader", 8, 60
SERVICE = "engram.v1.EngramService"


def grpcurl(programs: Path, server: Any, *arguments: str, data: Any = None) -> str:
    given = ["-d", json.dumps(data)] if data is not None else []
    command = [programs / "grpcurl", "-plaintext", "-max-time", "30", *given, server.address, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def next_message(answers: IO[str]) -> Any:
    """The next of grpcurl's answers, which are JSON over several lines."""
    text = ""
    for line in answers:
        text += line
        if line == "}\n":
            return json.loads(text)
    raise AssertionError(text)


def test_grpcurl_lists_and_describes(programs: Path, engram_server: Any) -> None:
    assert {SERVICE, "grpc.health.v1.Health"} <= set(grpcurl(programs, engram_server, "list").split())
    assert f"{SERVICE}.Stream" in grpcurl(programs, engram_server, "list", SERVICE).split()
    described = grpcurl(programs, engram_server, "describe", f"{SERVICE}.Stream")
    assert "rpc Stream ( stream .engram.v1.StreamRequest ) returns ( stream .engram.v1.StreamResponse );" in described


def test_grpcurl_asks_for_health_and_steps(programs: Path, engram_server: Any) -> None:
    health = grpcurl(programs, engram_server, "grpc.health.v1.Health/Check", data={"service": SERVICE})
    assert json.loads(health) == {"status": "SERVING"}
    step = {"session_id": "by-grpcurl", "model": MODEL, "inputs": [0.5] * INPUTS}
    for seq in ("1", "2"):
        response = json.loads(grpcurl(programs, engram_server, f"{SERVICE}/Step", data=step))
        assert (response["seq"], len(response["outputs"])) == (seq, 10)


def test_grpcurl_streams(programs: Path, engram_server: Any) -> None:
    command = [programs / "grpcurl", "-plaintext", "-d", "@", engram_server.address, f"{SERVICE}/Stream"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as caller:
        assert caller.stdin is not None
        assert caller.stdout is not None
        frame = {"request_id": 1, "model": MODEL, "session_ids": ["streamed"], "client_id": 5}
        print(json.dumps({"open": frame}), file=caller.stdin)
        handles = next_message(caller.stdout)["opened"]["handles"]
        for seq in (1, 2, 3):
            text = {
                "seqs": base64.b64encode(np.uint64(seq).tobytes()).decode(),
                "inputs": base64.b64encode(np.full(INPUTS, 0.5, np.float32).tobytes()).decode(),
            }
            print(json.dumps({"steps": {"handles": handles, **text}}), file=caller.stdin)
            outputs = next_message(caller.stdout)["outputs"]
            assert (outputs["seqs"], len(base64.b64decode(outputs["outputs"]))) == (text["seqs"], 40)
        caller.stdin.close()
        assert (caller.stdout.read(), caller.wait(WAIT_S)) == ("", 0)


@pytest.mark.parametrize("connections", [1, 4])
def test_ghz_steps(programs: Path, engram_server: Any, connections: int) -> None:
    """Eight sessions, 400 steps, and each of them once."""
    name = f"ghz-{connections}"
    step = {"session_id": f"{name}-{{{{.WorkerID}}}}", "model": MODEL, "inputs": [0.5] * INPUTS}
    command = [
        programs / "ghz",
        "--insecure",
        "--call",
        f"{SERVICE}/Step",
        "--data",
        json.dumps(step),
        "--format",
        "json",
    ]
    command += ["--total", "400", "--concurrency", "8", "--connections", str(connections), engram_server.address]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert (report["count"], report["statusCodeDistribution"]) == (400, {"OK": 400}), report["errorDistribution"]
    listed = json.loads(grpcurl(programs, engram_server, f"{SERVICE}/ListSessions", data={"page_size": 1000}))
    seqs = [int(one["seq"]) for one in listed["sessions"] if one["id"].startswith(name)]
    assert (len(seqs), sum(seqs)) == (8, 400)
