"""Proxies of the environment, which companies set on every machine: never on the way to this machine, elsewhere only where they are
asked for, and never with a token in plain text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import engram
from engram._options import stays_here

AWAY = "engram.invalid:50051"  # a name that only the proxy can reach
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")


class Proxy:
    """Tunnels whatever is asked for to one server, and notes what it was asked."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.asked: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self.listener.accept()
            except OSError:
                return
            self.asked.append(inner.recv(65536).split(b"\r\n")[0])
            outer = socket.create_connection(self.target)
            inner.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for one, other in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass


@pytest.fixture
def proxy(shared_server: Any) -> Iterator[Proxy]:
    one = Proxy(("127.0.0.1", shared_server.port))
    yield one
    one.listener.close()


def run(proxy: Proxy, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**kept, **dict.fromkeys(VARIABLES, proxy.url)}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_loopback_is_reached_without_a_proxy(shared_server: Any, proxy: Proxy) -> None:
    for more in ((), ("--proxy",)):
        done = run(proxy, "-m", "engram", "sessions", "list", "--limit", "1", "--address", shared_server.address, *more)
        assert (done.returncode, done.stderr) == (0, "")
    name = shared_server.address.replace("127.0.0.1", "localhost")
    done = run(proxy, "-m", "engram", "sessions", "list", "--limit", "1", "--address", name, "--proxy")
    assert (done.returncode, done.stderr) == (0, "")
    assert proxy.asked == []


def test_elsewhere_only_where_it_is_asked_for(proxy: Proxy) -> None:
    listing = ("-m", "engram", "sessions", "list", "--limit", "1", "--address", AWAY)
    assert run(proxy, *listing).returncode == 1
    assert proxy.asked == []
    done = run(proxy, *listing, "--proxy")
    assert (done.returncode, done.stderr) == (0, "")
    assert proxy.asked == [f"CONNECT {AWAY} HTTP/1.1".encode()]


def test_no_token_in_plain_text_through_a_proxy() -> None:
    for options in (engram.ClientOptions(proxy=True), engram.ClientOptions(proxy=True, token_in_plain_text=True)):
        with pytest.raises(engram.InvalidInputError, match="proxy") as refused:
            engram.AsyncClient(AWAY, options, token="secret")
        assert refused.value.reason == "TOKEN_IN_PLAIN_TEXT" and "secret" not in str(refused.value)
        engram.AsyncClient("127.0.0.1:50051", options, token="secret")
        engram.AsyncClient(AWAY, options, token="secret", tls=True)


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:5", True), ("127.9.9.9:5", True), ("localhost:5", True), ("LOCALHOST.:5", True), ("localhost", True),
        ("[::1]:5", True), ("[::1]", True), ("::1", True), ("[::ffff:127.0.0.1]:5", True), ("ipv4:127.0.0.1:5", True),
        ("ipv6:[::1]:5", True), ("dns:localhost:5", True), ("dns:///localhost:5", True), ("dns://9.9.9.9/localhost:5", True),
        ("unix:/run/engram", True), ("10.0.0.1:5", False), ("[2001:db8::1]:5", False), ("engram.example:5", False),
        ("localhost.example:5", False), ("127.0.0.1.example:5", False), ("dns://127.0.0.1/engram.example:5", False),
        ("", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(address: str, here: bool) -> None:
    assert stays_here(address) == here
