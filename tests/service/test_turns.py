"""Listings and other calls that look at Redis for themselves, and calls that wait for a step: a bounded share, behind opens and steps."""

from __future__ import annotations

import asyncio
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status

from engram.v1 import memory_pb2, service_pb2_grpc, session_pb2
from engram_models import Hopfield, shipped_models_dir, write_bundle
from engram_service.auth.tenants import key_of
from engram_service.errors import DeadlineExceededError, ResourceExhaustedError
from engram_service.protocols.engram.turns import Turns
from engram_service.store.keys import session_tag, tally_key

ServerProcess = Any
Connect = Callable[..., Any]

TOKENS = {tenant: f"engram_{tenant}" for tenant in ("few", "many", "net")}
STORED, LISTS = 1500, 30
SIZE = 16


@pytest.fixture(scope="module")
def redis(module_redis: Any) -> Any:
    return module_redis


@pytest.fixture(scope="module")
def server(server_type: Any, redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of three tenants, one of which has many sessions stored."""
    directory = tmp_path_factory.mktemp("turns")
    tokens, models = directory / "tokens.toml", directory / "models"
    _write_tokens(tokens)
    models.mkdir()
    (models / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    write_bundle(models, "net", "1", Hopfield(SIZE, "hebb"))
    flags = ("--models", str(models), "--tokens-file", str(tokens), "--redis-url", redis.url)
    with server_type(directory, *flags) as process:
        yield process


def _write_tokens(path: pathlib.Path) -> None:
    lines = []
    for tenant, token in TOKENS.items():
        digest = hashlib.sha256(token.encode()).hexdigest()
        rights = '["read", "step", "manage"]'
        lines.append(f'[tokens.{tenant}]\ntenant = "{tenant}"\nrights = {rights}\nsha256 = "{digest}"')
    path.write_text("\n".join(lines))


class Tenant:
    """Calls of one tenant over a connection of its own."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        self.channel = server.channel()
        self.stub = service_pb2_grpc.EngramServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {TOKENS[name]}"),)

    def ask(self, method: str, request: Any) -> Any:
        return getattr(self.stub, method)(request, metadata=self.metadata, timeout=30)

    def begin(self, method: str, request: Any, timeout: float = 30) -> Any:
        return getattr(self.stub, method).future(request, metadata=self.metadata, timeout=timeout)

    def listed(self) -> tuple[list[str], int]:
        """The ids of all its sessions, and in how many pages."""
        found, token, pages = [], "", 0
        while pages == 0 or token:
            page = self.ask("ListSessions", session_pb2.ListSessionsRequest(page_size=1000, page_token=token))
            found += [session.id for session in page.sessions]
            token, pages = page.next_page_token, pages + 1
        return found, pages


@pytest.fixture(scope="module")
def stored(server: ServerProcess) -> None:
    """Sessions of the tenant `many`."""
    from engram import Client

    with Client(server.address, token=TOKENS["many"]) as client:
        sessions = client.open_many("digits-reader", [f"stored-{n}" for n in range(STORED)])
        assert len(sessions) == STORED


@pytest.fixture
def tenant(server: ServerProcess) -> Iterator[Callable[[str], Tenant]]:
    made: list[Tenant] = []

    def make(name: str) -> Tenant:
        made.append(Tenant(server, name))
        return made[-1]

    yield make
    for one in made:
        one.channel.close()


def _commands(redis: Any, *names: str) -> int:
    """How often Redis was asked these."""
    found = redis.client.info("commandstats")
    nodes = (
        list(found.values())
        if all(isinstance(value, dict) and "calls" not in value for value in found.values())
        else [found]
    )
    return sum(node.get(f"cmdstat_{name}", {}).get("calls", 0) for node in nodes for name in names)


def test_a_list_costs_what_its_tenant_has(stored: None, redis: Any, tenant: Callable[[str], Tenant]) -> None:
    few = tenant("few")
    for name in ("a", "b"):
        few.ask("Step", session_pb2.StepRequest(session_id=name, model="digits-reader", inputs=[0.0] * 8))
    before = _commands(redis, "hmget", "scan")
    found, pages = few.listed()
    assert sorted(found) == ["a", "b"] and pages == 1
    assert _commands(redis, "hmget", "scan") - before < 10
    found, pages = tenant("many").listed()
    assert set(found) == {f"stored-{n}" for n in range(STORED)} and pages > 1
    assert not tenant("net").listed()[0]


def test_an_open_does_not_wait_behind_listings(
    stored: None, server: ServerProcess, tenant: Callable[[str], Tenant]
) -> None:
    from engram import Client

    many = tenant("many")
    with Client(server.address, token=TOKENS["few"]) as client:
        client.open("digits-reader", "first").close()
        lists = [many.begin("ListSessions", session_pb2.ListSessionsRequest(page_size=1000)) for _ in range(LISTS)]
        client.open("digits-reader", "second").close()
        done = sum(call.done() for call in lists)
        assert done < LISTS / 2, f"an open and a close took as long as {done} listings"
        for call in lists:
            call.result()


def test_listings_beyond_the_queue_are_refused_and_others_take_turns(
    stored: None, tenant: Callable[[str], Tenant]
) -> None:
    request = session_pb2.ListSessionsRequest(page_size=300)
    peers = [tenant("many") for _ in range(2)]
    lists = [peer.begin("ListSessions", request, 60) for _ in range(60) for peer in peers]
    assert tenant("few").ask("ListSessions", request) is not None
    assert not all(call.done() for call in lists), "the other tenant's came in between"
    codes = [call.code() for call in lists]
    refused = [call for call, code in zip(lists, codes, strict=True) if code is not grpc.StatusCode.OK]
    assert refused, "more wait than may"
    for call in refused:
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(call)
        assert status is not None and len(status.details) == 2, "it says when to try again"


def test_waits_for_steps_share_their_looks(redis: Any, tenant: Callable[[str], Tenant]) -> None:
    few = tenant("few")
    step = session_pb2.StepRequest(session_id="waited", model="digits-reader", inputs=[0.0] * 8)
    few.ask("Step", step)
    waits = [
        few.begin("GetSessionState", session_pb2.GetSessionStateRequest(session_id="waited", min_seq=seq))
        for seq in (2, 2, 3, 3, *[10**9] * 60)
    ]
    time.sleep(1.0)
    before, begun = _commands(redis, "hmget"), time.monotonic()
    time.sleep(2.0)
    looks = (_commands(redis, "hmget") - before) / (time.monotonic() - begun)
    assert looks < 30, "a second, for all of them"
    few.ask("Step", step)
    assert [wait.result().seq for wait in waits[:2]] == [2, 2]
    assert not any(wait.done() for wait in waits[2:])
    few.ask("Step", step)
    assert [wait.result().seq for wait in waits[2:4]] == [3, 3]
    few.ask("CloseSession", session_pb2.CloseSessionRequest(session_id="waited"))
    assert {wait.code() for wait in waits[4:]} == {grpc.StatusCode.NOT_FOUND}


def test_a_session_that_recalls_alone_keep_is_listed(redis: Any, tenant: Callable[[str], Tenant]) -> None:
    """Its place in the tally is over by then, and the recall makes it anew."""
    net = tenant("net")
    pattern = np.packbits(np.arange(SIZE) % 2).tobytes()
    net.ask("Step", session_pb2.StepRequest(session_id="taught", model="net", inputs=[1.0] * SIZE))
    store = memory_pb2.StorePatternsRequest(session_id="taught", size=SIZE, patterns=pattern, operation_id=bytes(16))
    net.ask("StorePatterns", store)
    net.ask("ForkSession", session_pb2.ForkSessionRequest(session_id="taught", new_session_id="recalled"))
    assert sorted(net.listed()[0]) == ["recalled", "taught"]
    redis.client.zrem(tally_key("net"), session_tag(key_of("net", "recalled")))
    assert net.listed()[0] == ["taught"]
    net.ask("Recall", memory_pb2.RecallRequest(session_id="recalled", size=SIZE, cues=pattern))
    assert sorted(net.listed()[0]) == ["recalled", "taught"]


def test_sessions_that_a_lost_redis_got_back_are_listed(redis: Any, server: ServerProcess) -> None:
    from engram import Client

    with Client(server.address, token=TOKENS["few"]) as client:
        sessions = client.open_many("digits-reader", [f"back-{n}" for n in range(5)])
        for _ in range(2):
            for session in sessions:
                session.step(np.zeros(8, np.float32))
        redis.lose_data()
        redis.start()
        for session in sessions:
            session.step(np.zeros(8, np.float32))
        deadline = time.monotonic() + 10
        while not {f"back-{n}" for n in range(5)} <= set(Tenant(server, "few").listed()[0]):
            assert time.monotonic() < deadline
            time.sleep(0.1)


# Turns by themselves


def test_tenants_take_turns() -> None:
    async def main() -> list[str]:
        turns, order = Turns("calls", 2, 1, 100, 50), []

        async def work(tenant: str) -> None:
            async with turns.turn(tenant, 10):
                order.append(tenant)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(work("a") for _ in range(20)), *(work("b") for _ in range(3)), work("c"))
        return order

    order = asyncio.run(main())
    assert sorted(order) == ["a"] * 20 + ["b"] * 3 + ["c"]
    assert set(order[:4]) == {"a", "b", "c"}, "nobody waits for all of another's"


def test_a_turn_that_is_not_taken_is_another_s() -> None:
    async def main() -> None:
        turns = Turns("calls", 1, 1, 3, 2)

        async def work(tenant: str, left_s: float = 10.0) -> None:
            async with turns.turn(tenant, left_s):
                pass

        async with turns.turn("a", 1):
            gone = [asyncio.create_task(work("a")), asyncio.create_task(work("b"))]
            await asyncio.sleep(0)
            with pytest.raises(DeadlineExceededError):
                await work("b", 0.01)
            late = asyncio.create_task(work("b"))
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhaustedError) as refused:
                await work("c")
            assert refused.value.retry_after_ms
            for task in gone:
                task.cancel()
        await late
        await work("a")

    asyncio.run(asyncio.wait_for(main(), 10))
