"""A real Redis Cluster of three primaries: sessions spread over them, slots that move, a node that fails over or comes back
empty, listing, and what is told when the URL names the wrong kind of Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram_service.store import (
    ClaimStatus,
    MemoryHead,
    Store,
    StoreError,
    StoreUnavailableError,
    Verdict,
    Written,
    session_tag,
)
from engram_service.store.keys import meta_key
from engram_service.store.nodes import slot, tag_slots

Cluster = Any
MakeHolder = Callable[..., Any]
OpenStore = Callable[..., Store]
OK, FENCED = Verdict.OK, Verdict.FENCED
NAMES = [f"s{n}" for n in range(120)]


@pytest.fixture(scope="module")
def shared(start_module_cluster: Callable[[], Cluster]) -> Cluster:
    return start_module_cluster()


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """The module's cluster, emptied."""
    for process in shared.processes[:3]:
        process.client.execute_command("FLUSHALL")
    return shared


def test_slots_are_those_of_redis() -> None:
    from redis.crc import key_slot

    tags = [session_tag(name) for name in NAMES]
    columns = np.array([np.frombuffer(tag, np.uint8) for tag in tags])
    expected = [key_slot(meta_key(tag)) for tag in tags]
    assert tag_slots(columns).tolist() == expected == [slot(meta_key(tag)) for tag in tags]


def test_sessions_on_all_nodes(cluster: Cluster, open_store: OpenStore, holder: MakeHolder) -> None:
    store, other = open_store(cluster.url), open_store(cluster.url)
    owner = holder(store, *NAMES).claim()
    assert owner.commit(1) == [OK] * 120 and owner.commit_by("native", 2).wait() == [OK] * 120
    assert owner.commit_by("python", 3).wait() == [OK] * 120
    assert all(process.client.dbsize() > 40 for process in cluster.processes), "they are spread"
    assert owner.stored() == [3] * 120 and owner.loaded().seq.tolist() == [3] * 120
    taker = holder(other, *NAMES[::2]).claim()
    assert [claim.epoch for claim in taker.claims] == [2] * 60
    assert owner.commit(3) == [FENCED, OK] * 60 and taker.commit(3) == [OK] * 60
    info = store.describe("s1", with_record=True)
    assert info is not None
    assert store.create("copy", "m/1", "f" * 32, info.record, 60_000, "0" * 16)
    assert store.rewrite(info, "m/2", "f" * 32, info.record, "1" * 16)
    store.delete(["s2", "s3", "s4"])
    found, cursor = [], 0
    while True:
        cursor, page = store.page(cursor, 30)
        found += [one.session_id for one in page]
        if not cursor:
            break
    assert sorted(found) == sorted({*NAMES, "copy"} - {"s2", "s3", "s4"})
    assert store.losses == other.losses == 0


@pytest.mark.promise(3)
def test_a_slot_moves_while_its_session_is_stepped(
    cluster: Cluster, open_store: OpenStore, holder: MakeHolder, troubles: Any
) -> None:
    store = open_store(cluster.url)
    told = troubles(store)
    owner = holder(store, *NAMES).claim()
    assert owner.commit(1) == [OK] * 120
    key = meta_key(session_tag("s5"))
    at, source = slot(key), cluster.owner(slot(key))
    target = (source + 1) % 3
    cluster.begin_move(at, source, target)
    assert owner.commit(2) == [OK] * 120, "nothing has moved yet"
    record = key + b":" + owner.tokens[5].encode()
    cluster.move_keys(source, target, record)
    assert owner.commit(3) == [OK] * 120, "the record is asked for where it is"
    with pytest.raises(StoreUnavailableError, match="during rehashing"):
        holder(store, "s5").claim()
    cluster.move_keys(source, target, key)
    assert owner.commit(4) == [OK] * 120 and owner.stored() == [4] * 120
    cluster.end_move(at, target)
    taker = holder(store, "s5").claim()
    assert taker.claims[0].status is ClaimStatus.CARRIED, "a session is not started over because it moves"
    assert taker.layout.unpack([taker.claims[0].record]).seq.tolist() == [4]
    assert taker.commit(5) == [OK] and taker.stored() == [5], "MOVED is followed"
    assert owner.commit(5) == [FENCED if n == 5 else OK for n in range(120)]
    assert not any(told.told), "none of this is trouble"


@pytest.mark.promise(9)
def test_memories_on_all_nodes_and_in_a_slot_that_moves(
    cluster: Cluster, open_store: OpenStore, holder: MakeHolder
) -> None:
    store = open_store(cluster.url)
    owner = holder(store, *NAMES[:12], "plain").claim()
    owner.commit(1)

    def head(name: str) -> MemoryHead:
        found = store.memories.look(name)
        assert found is not None
        return found

    one, two = b"one" + b"1" * 16, b"two" + b"2" * 16
    for name in NAMES[:12]:
        assert store.memories.write(name, head(name), [one]) is Written.DONE
    info = store.describe("s1", with_record=True)
    assert info is not None
    assert store.create("elsewhere", "m/1", "f" * 32, info.record, 60_000, "0" * 16, store.memories.copy("s1"))
    assert store.memories.copy("elsewhere") == [one]
    key = meta_key(session_tag("s5"))
    at, source = slot(key), cluster.owner(slot(key))
    target = (source + 1) % 3
    cluster.begin_move(at, source, target)
    assert store.memories.write("s5", head("s5"), [two]) is Written.DONE, "all keys are there still"
    cluster.move_keys(source, target, key + b":m")
    with pytest.raises(StoreUnavailableError, match="during rehashing"):
        store.memories.look("s5")
    with pytest.raises(StoreUnavailableError, match="during rehashing"):
        holder(store, "s5").claim()
    cluster.move_keys(source, target, key, key + b":" + owner.tokens[5].encode())
    cluster.end_move(at, target)
    assert store.memories.copy("s5") == [one, two]
    store.delete([*NAMES[:12], "elsewhere", "plain"])
    left = [node.client.keys("engram:{*") for node in cluster.processes[:3]]
    assert left == [[], [], []]


def test_one_node_that_comes_back_empty_is_written_to_again(
    cluster: Cluster, open_store: OpenStore, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    store = open_store(cluster.url)
    told = troubles(store)
    owner = holder(store, *NAMES).claim()
    assert owner.commit(1) == [OK] * 120
    lost = [n for n, name in enumerate(NAMES) if cluster.owner(slot(meta_key(session_tag(name)))) == 2]
    well = next(n for n in range(120) if n not in lost)
    cluster.processes[2].client.execute_command(
        "FLUSHALL"
    )  # a restart without its file, but for the map of the cluster
    eventually(lambda: told.losses == 1)
    assert [n for n, seq in enumerate(owner.stored()) if seq == -1] == lost
    store.delete([NAMES[well]])
    verdicts = owner.commit(2)
    assert verdicts == [Verdict.GONE if n == well else OK for n in range(120)], "what was closed elsewhere stays closed"
    assert owner.stored() == [-1 if n == well else 2 for n in range(120)]


def test_the_wrong_kind_of_url_is_told(
    cluster: Cluster, redis_process: Any, start_redis: Any, open_store: OpenStore, free_port: Any
) -> None:
    with pytest.raises(StoreError, match=r"redis\+cluster://"):
        open_store(f"redis://127.0.0.1:{cluster.ports[0]}")
    port = free_port()
    start_redis("--port", str(port))
    with pytest.raises(StoreError, match="give a redis:// URL"):
        open_store(f"redis+cluster://127.0.0.1:{port}")
    with pytest.raises(StoreError, match="redis_url"):
        open_store("redis+cluster+nonsense://127.0.0.1:1")


def test_a_password_for_a_cluster(cluster: Cluster, open_store: OpenStore, holder: MakeHolder) -> None:
    clients = [process.client for process in cluster.processes[:3]]
    try:
        for client in clients:
            client.config_set("requirepass", "sesame")
            client.execute_command("AUTH", "sesame")
        address = cluster.url.removeprefix("redis+cluster://")
        for wrong in (cluster.url, f"redis+cluster://:swordfish@{address}"):
            with pytest.raises(StoreError, match="credentials"):
                open_store(wrong)
        assert holder(open_store(f"redis+cluster://:sesame@{address}"), *NAMES).claim().commit(1) == [OK] * 120
    finally:
        for client in clients:
            client.config_set("requirepass", "")


def test_a_cluster_that_is_away_at_the_start_is_found_later(
    cluster: Cluster, open_store: OpenStore, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    for process in cluster.processes:
        process.kill()
    store = open_store(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.ports[2]}", start=False)
    told = troubles(store)
    store.start()
    assert told.told and told.told[0]
    for process in cluster.processes:
        process.start()

    def claimed() -> bool:
        try:
            return holder(store, *NAMES).claim().commit(1) == [OK] * 120
        except StoreUnavailableError:
            return False

    eventually(claimed)
    eventually(lambda: told.told[-1] == "")


@pytest.mark.slow
def test_a_primary_with_a_replica_waits_for_it_and_fails_over_to_it(
    start_cluster: Callable[[], Cluster], open_store: OpenStore, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    """redis_ack = replicated: rows of the nodes that have no replica wait, those of the one that has are told, and outlive it."""
    own_cluster = start_cluster()
    own_cluster.add_replica(of=0)
    careful = open_store(own_cluster.url, ack="replicated", ack_timeout_ms=300)
    told = troubles(careful)
    owner = holder(careful, *NAMES)
    with pytest.raises(StoreUnavailableError, match="fewer copies"):
        owner.claim()
    owner.store = open_store(own_cluster.url)
    owner.claim()
    owner.store = careful
    first = [own_cluster.owner(slot(meta_key(session_tag(name)))) == 0 for name in NAMES]
    commit = owner.submit(1)
    eventually(lambda: commit.verdicts == [OK if mine else None for mine in first])
    eventually(lambda: any("fewer copies" in why for why in told.told))
    careful.close()
    store = open_store(own_cluster.url)
    told = troubles(store)
    owner.store = store
    own_cluster.processes[0].kill()
    assert owner.submit(2).wait(20) == [OK] * 120
    assert owner.stored() == [2] * 120 and store.losses == 0
    eventually(lambda: not told.told or told.told[-1] == "")
    assert holder(store, *NAMES[:30]).claim().commit(3) == [OK] * 30
