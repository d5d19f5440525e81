"""Nothing grows with churn; in small. At length: tools/soak.py --churn."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import engram
from chaos.churn import Churn, Plan, tokens
from chaos.histories import MODEL
from chaos.proxy import Wires
from engram_models import shipped_models_dir

PLAN = Plan(opens=4000, each=50, quota=1500, over_s=12.0)
TOKEN = "engram_churn"
MB = 1 << 20


@pytest.fixture(scope="module")
def churned_server(tmp_path_factory: pytest.TempPathFactory, server_type: type[Any]) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("churn")
    (directory / "models").mkdir()
    (directory / "models" / MODEL).symlink_to(shipped_models_dir() / MODEL)
    file = directory / "tokens.toml"
    file.write_text(tokens(hashlib.sha256(TOKEN.encode()).hexdigest(), PLAN.quota))
    flags = ("--session-ttl-s", "2", "--resident-idle-s", "1", "--models", str(directory / "models"))
    with server_type(directory, "--tokens-file", str(file), *flags) as server:
        yield server


def test_what_was_let_go_is_let_go(churned_server: Any, free_port: Callable[[], int]) -> None:
    """Opens, closes and detaches, most of them called off or on streams that break: then there is no session left, no row in
    flight, and the whole quota to be used."""
    seed, wires, port = secrets.randbelow(1_000_000), Wires(), free_port()
    proxy = wires.proxy(port, churned_server.port)
    try:
        http = f"127.0.0.1:{churned_server.http_port}"
        churn = Churn(PLAN, churned_server.address, http, proxy, f"127.0.0.1:{port}", TOKEN, seed)
        churned = asyncio.run(churn.run())
    finally:
        proxy.close()
        wires.stop()
    assert not churned.problems, f"seed {seed}: {churned}"


def test_a_client_on_which_sessions_come_and_go_does_not_grow(churned_server: Any) -> None:
    """Its server names ever new sessions to it, on one stream."""
    with engram.Client(churned_server.address, engram.ClientOptions(token=TOKEN)) as client:
        tracemalloc.start()
        try:
            for number in range(20):
                sessions = client.open_many(MODEL, [f"come-{number}-{n}" for n in range(20)])
                (client.close_many if number % 2 else client.detach_many)(sessions)
            grown = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert grown < 4 * MB, f"{grown / MB:.0f} MB for 20 sessions at a time"
