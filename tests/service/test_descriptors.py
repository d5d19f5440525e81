"""No more files than the process may open: `streams_max` fits them, and connections that use them up disturb nobody else."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import engram_models
from engram.v1 import service_pb2_grpc, session_pb2, stream_pb2

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]
FILES = 320
WAIT_S = 20.0
H2 = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0"
)  # settings, and the answer to the other's


@pytest.fixture(scope="module")
def narrow(server_type: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that may open FILES files, in whose models directory `good` is."""
    directory = tmp_path_factory.mktemp("narrow")
    engram_models.write_bundle(directory / "models", "good", "1", engram_models.LSTM(3, 4))
    server = server_type(directory, "--models", str(directory / "models"))
    server.prefix = ("prlimit", f"--nofile={FILES // 2}:{FILES}")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 3 * FILES:
        pytest.skip("this process may not open as many files as it takes to use up the server's")
    with server:
        yield server


def streams_max(server: ServerProcess) -> int:
    """What the server says it lowered the setting to."""
    return int(server.log.read_text().partition("streams_max = 65536: lowered to ")[2].partition(",")[0])


@contextlib.contextmanager
def flood(server: ServerProcess, hello: bytes) -> Iterator[list[socket.socket]]:
    """More connections than the server may have files, none of which asks for anything."""
    held: list[socket.socket] = []
    try:
        for _ in range(FILES + 100):
            one = socket.create_connection(("127.0.0.1", server.port), timeout=2)
            held.append(one)
            with contextlib.suppress(OSError):
                one.sendall(hello)
        yield held
    finally:
        for one in held:
            one.close()


def refused(server: ServerProcess) -> float:
    """As soon as there is a file for who asks: the HTTP port takes connections again a second after there was none."""
    end = time.monotonic() + 3 * WAIT_S
    while True:
        try:
            return float(server.series()["engram_connections_refused_total"])
        except OSError:
            assert time.monotonic() < end, "the HTTP port comes back"


def status(server: ServerProcess, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/{path}", timeout=WAIT_S) as answer:
        return int(answer.status)


@pytest.mark.promise(11)
@pytest.mark.parametrize("hello", [b"", H2], ids=["raw", "http2"])
def test_connections_that_use_up_the_files_disturb_nobody(
    narrow: ServerProcess, connect: Connect, hello: bytes
) -> None:
    raw = connect(narrow)
    handle = int(np.frombuffer(raw.open(f"kept-{len(hello)}", model="good").handles, np.uint32)[0])
    raw.step(handle, 1, np.zeros(3, np.float32))
    before = refused(narrow)
    with flood(narrow, hello):
        deadline = time.monotonic() + 4 * WAIT_S
        while refused(narrow) == before:
            assert time.monotonic() < deadline, "the connections that are too many are ended"
            time.sleep(0.05)
        raw.step(handle, 2, np.zeros(3, np.float32))
        assert status(narrow, "readyz") == status(narrow, "healthz") == 200
        models = narrow.directory / "models"
        engram_models.write_bundle(models, "later", str(len(hello)), engram_models.LSTM(3, 4))
        request = session_pb2.ReloadModelsRequest()
        answer = raw.unary("ReloadModels", request, session_pb2.ReloadModelsResponse)
        assert str(len(hello)) in {model.version for model in answer.models if model.name == "later"}, answer.errors
        if not narrow.on_cluster:
            narrow.redis().client_kill_filter(_type="normal", skipme=True)
        raw.step(handle, 3, np.zeros(3, np.float32))
    newcomer = connect(narrow)
    assert newcomer.get(f"kept-{len(hello)}").seq == 3
    assert "connections without a stream were ended" in narrow.log.read_text()
    assert not [name for name in narrow.series() if name.startswith("engram_task_failures_total{")]


def test_streams_fit_the_files(narrow: ServerProcess, connect: Connect) -> None:
    """Ordinary clients, each with a connection of its own, until there is no room: the next is told so, and the others go on."""
    limit = streams_max(narrow)
    assert FILES // 3 < limit < FILES, "the soft limit, half of the hard one, was raised"
    raw = connect(narrow)
    handle = int(np.frombuffer(raw.open("first", model="good").handles, np.uint32)[0])
    channels = []
    try:
        calls = []
        for number in range(limit + 3):
            channels.append(grpc.insecure_channel(narrow.address, options=[("grpc.use_local_subchannel_pool", 1)]))
            frame = stream_pb2.OpenFrame(request_id=1, model="good", session_ids=[f"many-{number}"], client_id=7)
            requests = iter([stream_pb2.StreamRequest(open=frame)])
            calls.append(service_pb2_grpc.EngramServiceStub(channels[-1]).Stream(_held_open(requests)))
        reasons = [_reason(call) for call in calls]
        assert reasons.count("") == limit - 1, "beside the first"
        assert reasons.count("TOO_MANY_STREAMS") == 4
        raw.step(handle, 1, np.zeros(3, np.float32))
        assert status(narrow, "readyz") == 200
    finally:
        for channel in channels:
            channel.close()


def _held_open(requests: Iterator[stream_pb2.StreamRequest]) -> Iterator[stream_pb2.StreamRequest]:
    yield from requests
    time.sleep(WAIT_S)


def _reason(call: Any) -> str:
    """Why a stream was refused; empty: it was let in and its session is open."""
    try:
        return "" if next(call).opened.handles else "no session"
    except grpc.RpcError as error:
        metadata: Any = error
        return next((word for word in ("TOO_MANY_STREAMS",) if word in str(metadata.trailing_metadata())), str(error))


def test_too_few_files_are_said_at_the_start(server_with: Callable[..., ServerProcess]) -> None:
    server = server_with()
    server.prefix = ("prlimit", "--nofile=100:100")
    with pytest.raises(AssertionError, match="the server ended with 2"):
        server.start()
    assert "may open 100 files, and a server needs 256" in server.log.read_text()


FULL = """
import contextlib, os, resource, socket, sys, threading
from engram_service.descriptors import Descriptors
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics

resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
descriptors = Descriptors(Metrics(), Health())
clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(40)]
accepted = [listener.accept()[0] for _ in clients]
kept = {accepted[0].getpeername()}

def take():  # as gRPC's listener does, whatever file becomes free
    while True:
        with contextlib.suppress(OSError):
            os.dup(0)

with contextlib.suppress(OSError):
    while True:
        os.dup(0)
sys.setswitchinterval(1e-6)
threading.Thread(target=take, daemon=True).start()
print(descriptors._end(port, kept, 1), flush=True)
print([one.recv(1) for one in clients[1:]] == 39 * [b""], flush=True)
clients[0].setblocking(False)
try:
    clients[0].recv(1)
except BlockingIOError:
    print("kept", flush=True)
os._exit(0)
"""


def test_connections_are_ended_also_where_whatever_becomes_free_is_taken_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["39", "True", "kept"], done.stderr
