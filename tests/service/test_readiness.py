"""Whether a server is ready: /readyz and gRPC health, which say the same, and what does not change either."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engram_service.observability.health import Health

ServerProcess = Any
Status = health_pb2.HealthCheckResponse

WAIT_S = 30.0
NAMES = ("", "engram.v1.EngramService")


def readyz(server: ServerProcess, path: str = "/readyz") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until_readyz(server: ServerProcess, status: int) -> str:
    deadline = time.monotonic() + WAIT_S
    while (said := readyz(server))[0] != status:
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    return said[1]


def test_not_ready_while_redis_is_away_and_ready_again_by_itself(
    redis_process: Any, server_with: Callable[..., ServerProcess], server_wire: str
) -> None:
    redis_process.kill()
    with server_with("--redis-url", redis_process.url) as server, server.channel() as channel:
        assert readyz(server)[0] == 503, "from its very start"
        redis_process.start()
        until_readyz(server, 200)
        health = health_pb2_grpc.HealthStub(channel)

        def check(name: str) -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status)

        def soon(status: int) -> bool:
            """gRPC's health says so: of the fallback, whose process is another than that of /readyz, within a second."""
            deadline = time.monotonic() + (1.0 if server_wire == "python" else 0.0)
            while (said := {check(name) for name in NAMES}) != {status} and time.monotonic() < deadline:
                time.sleep(0.01)
            return said == {status}

        watched: queue.SimpleQueue[int] = queue.SimpleQueue()

        def watch() -> None:
            with contextlib.suppress(grpc.RpcError):
                for said in health.Watch(health_pb2.HealthCheckRequest(service=NAMES[1])):
                    watched.put(said.status)

        assert soon(Status.SERVING)
        threading.Thread(target=watch, daemon=True).start()
        assert watched.get(timeout=WAIT_S) == Status.SERVING
        assert readyz(server) == (200, "ready\n")
        for away, back in ((redis_process.kill, redis_process.start), (redis_process.pause, redis_process.go_on)):
            away()
            first, *failures = until_readyz(server, 503).splitlines()
            assert first == "not ready" and len(failures) == 1 and failures[0].startswith("redis: ")
            assert soon(Status.NOT_SERVING)
            assert readyz(server, "/healthz") == (200, "ok\n") and check("liveness") == Status.SERVING
            assert watched.get(timeout=WAIT_S) == Status.NOT_SERVING
            back()
            assert until_readyz(server, 200) == "ready\n"
            assert soon(Status.SERVING)
            assert watched.get(timeout=WAIT_S) == Status.SERVING
        server.terminate()
        assert watched.get(timeout=WAIT_S) == Status.NOT_SERVING, "it drains"
        assert server.stop() == 0


def test_watchers_of_health_have_a_limit_and_cannot_hold_a_server(server: ServerProcess) -> None:
    """They need no token. One that takes nothing that is sent to it must not keep the server from telling others, or from its end."""
    deaf = watch_and_take_nothing(server.port)
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(server.channel()) for _ in range(4)]  # each takes a hundred calls
        health, *others = map(health_pb2_grpc.HealthStub, channels)
        request = health_pb2.HealthCheckRequest()
        calls = [stub.Watch(request) for _ in range(75) for stub in (health, *others)]
        refused = 0
        for call in calls:
            try:
                assert next(call).status == Status.SERVING
            except grpc.RpcError:
                assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "Check" in call.details()
                refused += 1
        assert 0 < refused < 100
        assert health.Check(request, timeout=10).status == Status.SERVING
        assert server.stop() == 0
    deaf.close()


def watch_and_take_nothing(port: int) -> socket.socket:
    """A call of Watch whose caller allows not one byte to be sent on it, by HTTP/2's flow control."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    headers = {
        b":method": b"POST", b":scheme": b"http", b":path": b"/grpc.health.v1.Health/Watch", b":authority": b"here",
        b"content-type": b"application/grpc", b"te": b"trailers",
    }  # fmt: skip
    block = b"".join(b"\0" + text(name) + text(value) for name, value in headers.items())
    window = struct.pack(">HI", 4, 0)
    caller = socket.create_connection(("127.0.0.1", port), WAIT_S)
    caller.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, window) + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5))
    )
    caller.recv(1)  # it has been heard
    return caller


def test_a_failure_counts_after_its_grace_and_warnings_never() -> None:
    health = Health()
    health.fail("a", "late", grace_s=60)
    health.warn("b", "odd")
    assert health.failures() == []
    health.fail("c", "now")
    health.tell("d", "told")
    assert health.failures() == ["c: now", "d: told"] and health.warnings() == ["b: odd"]
    health.clear("c")
    health.tell("d", "")
    health.warn("b", "")
    assert health.failures() == health.warnings() == []
