"""`engram top` against real servers, and its arithmetic."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import engram
from engram_service.top.figures import STAGES, figures
from engram_service.top.page import page
from engram_service.top.scrape import Scrape, scrape, servers_of

ServerProcess = Any
MODEL = "digits-reader"


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engram", "top", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def stepping(server_with: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """A server with five sessions that step all the time, and one that never does."""
    stop = threading.Event()

    def drive(client: engram.Client, sessions: list[Any]) -> None:
        while not stop.is_set():
            client.step_many(sessions, np.zeros((5, 8), np.float32))

    with server_with() as server, engram.Client(server.address) as client:
        *sessions, _ = client.open_many(MODEL, [f"s{number}" for number in range(6)])
        thread = threading.Thread(target=drive, args=(client, sessions))
        thread.start()
        yield server
        stop.set()
        thread.join()


def test_what_does_not_speak_http_is_told_and_no_proxy_is_asked(
    shared_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def babble() -> None:
            with stranger.accept()[0] as caller:
                caller.recv(1000)
                caller.sendall(b"what?\r\n\r\n")

        threading.Thread(target=babble, daemon=True).start()
        strange = f"127.0.0.1:{stranger.getsockname()[1]}"
        real, other, grpc_port = scrape([f"127.0.0.1:{shared_server.http_port}", strange, shared_server.address])
    assert not real.error and real.samples
    assert "does not speak HTTP" in other.error and grpc_port.error


def test_it_says_what_servers_do(stepping: ServerProcess) -> None:
    address, away = f"127.0.0.1:{stepping.http_port}", "127.0.0.1:9"
    done = top(address, away, "--once", "--json", "--interval", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here, gone = found["servers"]
    assert (here["address"], here["up"], here["redis_up"]) == (address, True, True)
    assert (gone["address"], gone["up"]) == (away, False) and "refused" in gone["error"]
    assert (here["sessions"], here["streams"]) == ({"known": 6, "device": 5, "stored": 1}, 1)
    assert here["steps_per_s"] > 5 and here["rows_per_batch"] == 5
    assert 0 < here["busy"] < 1 and here["memory_bytes"] > 1 << 20 and here["commit_bytes_per_s"] > 0
    assert found["total"]["models"] == {MODEL: {"ok": pytest.approx(here["steps_per_s"])}}
    assert set(found["total"]["latency_ms"]) == set(STAGES)
    assert all(0 < one["p50"] <= one["p99"] for one in found["total"]["latency_ms"].values())

    shown = top(address, away, "--once", "--interval", "1")
    assert "\x1b" not in shown.stdout, "no terminal, no drawing"
    assert "1 of 2 servers up   6 sessions   1 streams" in shown.stdout and MODEL in shown.stdout


def test_wrong_use_and_nobody_there() -> None:
    assert (top("nonsense", "--once").returncode, top("127.0.0.1:9", "--once", "--interval", "0").returncode) == (2, 2)
    done = top("127.0.0.1:9", "--once", "--interval", "0.1")
    assert done.returncode == 1 and "down" in done.stdout


def scraped(at: float, **samples: float) -> Scrape:
    """Samples by name, with labels after two underscores: steps__model_outcome."""
    labels = {"steps": (("model", "m"), ("outcome", "ok")), "late": (("model", "m"), ("outcome", "late"))}
    names = {"steps": "engram_steps_total", "late": "engram_steps_total"}
    found = {(names.get(key, f"engram_{key}"), labels.get(key, ())): value for key, value in samples.items()}
    edges = {"0.01": samples.get("fast", 0.0), "0.1": samples.get("slow", 0.0), "+Inf": samples.get("slow", 0.0)}
    for edge, value in edges.items():
        found["engram_stage_seconds_bucket", (("le", edge), ("stage", "total"))] = value
    return Scrape("a:1", at, found)


def test_rates_are_of_the_time_between_and_a_new_start_has_none() -> None:
    old, new = scraped(10.0, steps=100, late=0, fast=0, slow=0), scraped(12.0, steps=150, late=4, fast=90, slow=100)
    found = figures([old], [new])
    assert found["total"]["models"] == {"m": {"ok": 25.0, "late": 2.0}}
    # 90 of 100 within 10 ms, the rest spread over what is left of 100 ms.
    assert found["servers"][0]["latency_ms"]["total"] == {
        "p50": pytest.approx(5.5556, abs=1e-3),
        "p99": pytest.approx(91),
    }
    assert found["servers"][0]["latency_ms"]["wait"] is None
    again = figures([new], [scraped(14.0, steps=3)])
    assert again["servers"][0]["steps_per_s"] is None and again["total"]["steps_per_s"] == 0
    assert any("down" in line for line in page(figures([old], [Scrape("a:1", 12.0, error="no answer")])))


def test_a_name_with_several_addresses_is_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def lookup(host: str, port: int, **_: Any) -> list[Any]:
        if host == "unknown":
            raise OSError("no such name")
        names = ["10.0.0.2", "10.0.0.1", "fd00::1"] if host == "engram" else [host]
        return [(None, None, None, None, (name, port)) for name in names]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert servers_of(["engram:9464"]) == ["10.0.0.1:9464", "10.0.0.2:9464", "[fd00::1]:9464"]
    assert servers_of(["127.0.0.1:1", "unknown:2", "127.0.0.1:1"]) == ["127.0.0.1:1", "unknown:2"]
    with pytest.raises(ValueError, match="HOST:PORT"):
        servers_of(["engram"])
