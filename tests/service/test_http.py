"""The HTTP port: what is there, what may be sent to it, and what those who misuse it take from others."""

from __future__ import annotations

import contextlib
import http.client
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from prometheus_client import generate_latest

import engram
from engram_models import shipped_models_dir
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.protocols.http.get import get
from engram_service.protocols.http.server import HttpServer
from engram_service.settings import Settings
from engram_service.supervision import Supervisor
from engram_service.top.scrape import scrape

ServerProcess = Any

CONNECTIONS, REQUEST_S, WAIT_S = 32, 1.0, 20.0
GET = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_type: type[ServerProcess]) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("http")
    models = directory / "models"
    models.mkdir()
    (models / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    flags = ("--http-connections-max", str(CONNECTIONS), "--http-request-timeout-s", str(REQUEST_S))
    with server_type(directory, "--models", str(models), *flags) as one:
        yield one


class Caller:
    """A connection to the HTTP port, to send anything on."""

    def __init__(self, server: ServerProcess, buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(WAIT_S)
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.connect(("127.0.0.1", server.http_port))
        self._reader = self.socket.makefile("rb")

    def say(self, data: bytes) -> Caller:
        self.socket.sendall(data)
        return self

    def status(self) -> int:
        """That of the next answer."""
        status = int(self._reader.readline().split()[1])
        headers = http.client.parse_headers(self._reader)
        self._reader.read(int(headers["content-length"]))
        return status

    def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while data := self._reader.read1():
                found += data
        return found

    def goes_on(self, data: bytes, pause_s: float = 0.0) -> int:
        """Says the same again and again; how often, until the server ended the connection."""
        for times in range(10_000):
            try:
                self.say(data)
            except ConnectionError:
                return times
            time.sleep(pause_s)
        raise AssertionError("the server listens for ever")

    def close(self) -> None:
        self._reader.close()
        self.socket.close()


def ask(server: ServerProcess, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, Any, str]:
    connection = http.client.HTTPConnection(host, server.http_port, timeout=WAIT_S)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def dropped(server: ServerProcess, why: str) -> float:
    return float(server.series().get(f'engram_http_connections_dropped_total{{why="{why}"}}', 0.0))


# What is there


def test_methods_queries_and_paths(server: ServerProcess) -> None:
    assert ask(server, "/healthz")[::2] == ask(server, "/healthz?from=lb&x")[::2] == (200, "ok\n")
    assert ask(server, "/readyz?verbose")[::2] == (200, "ready\n")
    for path in ("/healthz", "/readyz", "/metrics"):
        status, headers, body = ask(server, path, "HEAD")
        assert (status, body) == (200, "") and int(headers["content-length"]) > 2
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            status, headers, _ = ask(server, path, method)
            assert status == 405 and set(headers["allow"].split(", ")) == {"GET", "HEAD"}
    for path in ("/", "/healthz/", "/metrics/..", "//healthz", "/nowhere?x", "/%ff", "/" + "a" * 8000):
        status, _, body = ask(server, path)
        assert status == 404 and "only /metrics, /healthz and /readyz" in body
    assert ask(server, "/metrics?name=x")[1]["content-type"].startswith("text/plain; version=")


def test_keep_alive_and_pipelines(server: ServerProcess) -> None:
    caller = Caller(server)
    for _ in range(3):
        assert caller.say(GET).status() == 200
    many = caller.say(GET * 50 + b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").rest()
    assert many.count(b"HTTP/1.1 200 OK") == 51 and b"engram_sessions" in many
    assert b"200 OK" in Caller(server).say(b"GET /healthz HTTP/1.0\r\n\r\n").rest(), "and ended, as 1.0 has it"
    small = b"GET /healthz HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\nhello"
    upgrade = b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert Caller(server).say(upgrade).status() == 200
    caller = Caller(server).say(small + small)
    assert [caller.status() for _ in range(2)] == [200, 200]


def test_a_scrape_tells_what_was_before_it(server: ServerProcess) -> None:
    """However many scrapes there are at once: none is given one that was begun before it was asked for."""
    with engram.Client(server.address) as client:
        session = client.open("digits-reader", "scraped")
        for seq in range(1, 20):
            session.step([0.0] * 8)
            callers = [Caller(server).say(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n") for _ in range(4)]
            assert server.series()['engram_steps_total{model="digits-reader",outcome="ok"}'] == seq
            for caller in callers:
                caller.close()


def test_ipv6(tmp_path: pathlib.Path, digits_alone: tuple[str, ...], server_type: type[ServerProcess]) -> None:
    """Of the HTTP port, the gRPC port, the SDK and `engram top`."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")

    class OnSix(server_type):  # type: ignore[misc]
        @property
        def address(self) -> str:
            return f"[::1]:{self.port}"

    one = OnSix(tmp_path, *digits_alone)
    one.flags = (*one.flags, "--http", f"[::1]:{one.http_port}")
    with one:
        assert ask(one, "/readyz", host="::1")[0] == 200
        assert f"metrics on [::1]:{one.http_port}" in one.tail()
        with engram.Client(one.address) as client:
            client.open("digits-reader", "six").step([0.0] * 8)
        (seen,) = scrape([f"[::1]:{one.http_port}"])
        assert not seen.error and seen.sum("engram_steps_total") == 1


def test_the_port_answers_before_models_are_loaded(
    tmp_path: pathlib.Path, digits_alone: tuple[str, ...], server_type: type[ServerProcess]
) -> None:
    """It is there first, so that a port in use is told at once, and a probe sees why a server is not ready."""
    one = server_type(tmp_path, *digits_alone)
    seen: list[str] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                seen.append(ask(one, "/healthz")[2] + ask(one, "/readyz")[2])
            time.sleep(0.005)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with one:
            over.set()
            looking.join()
            assert seen[0] == "ok\nnot ready\nserver: it is starting\n"
            assert ask(one, "/readyz")[2] == "ready\n"
    finally:
        over.set()


class Own:
    """The metrics of this process."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics.registry

    async def text(self) -> bytes:
        return generate_latest(self._registry)


def test_it_begins_again_after_a_failure_and_shows_warnings(caplog: pytest.LogCaptureFixture) -> None:
    metrics, health = Metrics(), Health()
    server = HttpServer(Settings(http="127.0.0.1:0"), Own(metrics), metrics, health, Supervisor(metrics, health))
    address = server.address
    try:
        health.warn("redis", "it may\nforget")
        assert get(address, "/readyz") == "ready\nwarning: redis: it may forget\n"
        with pytest.raises(OSError, match=f"http = {address}: Address already in use"):
            HttpServer(Settings(http=address), Own(metrics), metrics, health, Supervisor(metrics, health))
        assert server._server is not None
        server._server.should_exit = True  # nobody has told it to
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError):
                if 'engram_task_failures_total{task="http"} 1.0' in get(address, "/metrics"):
                    break
            assert time.monotonic() < deadline
        assert "background task http failed" in caplog.text
    finally:
        server.stop()
    with pytest.raises(OSError, match="refused"):
        get(address, "/healthz")


# What may be sent


def test_half_written_requests_are_ended_and_keep_nobody_out(server: ServerProcess) -> None:
    before = dropped(server, "sending"), dropped(server, "full")
    halves = [Caller(server).say(b"GET /metrics HTTP/1.1\r\nX: ") for _ in range(CONNECTIONS * 3)]
    assert ask(server, "/readyz")[0] == 200
    for half in halves:
        assert half.rest() == b""
    after = dropped(server, "sending"), dropped(server, "full")
    assert after[1] > before[1], "one more connection ends the one that waits longest"
    assert sum(after) - sum(before) >= CONNECTIONS * 3 - 4, "and the others' time was up"


def test_a_byte_now_and_then_does_not_buy_time(server: ServerProcess) -> None:
    pause_s = 0.05
    assert Caller(server).say(b"GET /").goes_on(b"a", pause_s) < 10 * REQUEST_S / pause_s


def test_a_connection_that_is_used_outlives_that_time(server: ServerProcess) -> None:
    caller = Caller(server)
    end = time.monotonic() + 2.5 * REQUEST_S
    while time.monotonic() < end:
        assert caller.say(GET).status() == 200
        time.sleep(REQUEST_S / 5)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000, 431),
        (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n", 431),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: here\r\nContent-Length: -5\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 3, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        (b"\0" * 100_000, 400),
        (b"POST /metrics HTTP/1.1\r\nHost: here\r\nContent-Length: 10000000000\r\n\r\n", 413),
        (b"GET /healthz HTTP/1.1\r\nHost: here\r\nContent-Length: 99999999999999999\r\nExpect: 100-continue\r\n\r\n", 413),
        (b"GET /healthz HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\nhalf a body", 200),
        (b"GET /healthz HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n" + b"x" * 2_000_000, 200),
        (b"POST /healthz HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", 400),
    ],
    ids=lambda given: given[:30].decode("latin-1").strip() if isinstance(given, bytes) else str(given),
)  # fmt: skip
def test_what_is_no_request_or_too_long(server: ServerProcess, sent: bytes, status: int) -> None:
    """It is told so, its connection is ended, and the log has no line for it."""
    log = server.log.stat().st_size
    caller = Caller(server)
    with contextlib.suppress(ConnectionError):
        caller.say(sent)
    said = caller.rest()
    assert said == b"" or said.startswith(f"HTTP/1.1 {status} ".encode()), said[:200]
    assert said or len(sent) > 50_000, "what is sent by the megabyte may be cut off before it is told why"
    assert server.log.stat().st_size == log, server.tail()


def test_a_body_that_goes_on_for_ever(server: ServerProcess) -> None:
    caller = Caller(server).say(b"POST /metrics HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert caller.goes_on(b"10000\r\n" + b"x" * 0x10000 + b"\r\n") < 5000
    assert ask(server, "/readyz")[0] == 200


@pytest.mark.promise(6)
def test_ten_times_as_many_connections_as_there_may_be(server: ServerProcess) -> None:
    descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
    idle = [Caller(server) for _ in range(CONNECTIONS * 10)]
    assert ask(server, "/readyz")[0] == 200
    assert len(os.listdir(f"/proc/{server.pid}/fd")) <= descriptors + CONNECTIONS + 8
    with engram.Client(server.address) as client:
        client.open("digits-reader", "beside").step([0.0] * 8)
    for one in idle:
        assert one.rest() == b""


def test_answers_that_nobody_reads_take_no_memory_and_keep_nobody_out(server: ServerProcess) -> None:
    before = psutil.Process(server.pid).memory_info().rss
    callers = [Caller(server, 4096) for _ in range(CONNECTIONS)]
    for caller in callers:
        caller.socket.setblocking(False)
        caller.socket.send(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 200)
    time.sleep(1.5)  # until each has an answer under way that it does not take
    refused = dropped(server, "full")
    held = [Caller(server, 4096) for _ in range(8)]
    assert ask(server, "/readyz")[::2] == (200, "ready\n")
    assert dropped(server, "full") > refused
    assert psutil.Process(server.pid).memory_info().rss - before < 64 << 20
    for caller in callers + held:
        caller.close()


def test_a_flood_has_a_share_of_a_core_and_no_more(server: ServerProcess) -> None:
    """The port's thread shares the interpreter with the steps: what is asked of it is put off, not done at their cost."""
    end = time.monotonic() + 2.5
    callers = [Caller(server) for _ in range(4)]
    process = psutil.Process(server.pid)
    used, began = sum(process.cpu_times()[:2]), time.monotonic()
    for caller in callers:
        caller.socket.setblocking(False)
    while time.monotonic() < end:
        for caller in callers:
            with contextlib.suppress(BlockingIOError):
                caller.socket.send(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 100)
            with contextlib.suppress(BlockingIOError):
                caller.socket.recv(1 << 20)
        time.sleep(0.002)
    share = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)
    for caller in callers:
        caller.close()
    assert share < 0.6
    assert ask(server, "/readyz")[0] == 200
