"""A Redis that comes back with an older copy of its data, under servers that live: found, told from one that has everything, and
written back to, without undoing what others claimed since."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import copies
import pytest

from engram_service.store import ClaimStatus, Store, StoreUnavailableError, Verdict
from engram_service.store.keys import GENERATION

MakeHolder = Callable[..., Any]
OpenStore = Callable[..., Store]
OK, GONE = Verdict.OK, Verdict.GONE
FENCED = (Verdict.FENCED, Verdict.FENCED_LATE)  # what had been sent to the Redis that ended may have been written


@pytest.fixture
def quiet(store: Store) -> Store:
    """A store whose watcher has ended: what is found is found by what is asked."""
    store._watch.ended.set()
    store._watch.thread.join()
    store._watch.ended.clear()
    return store


def test_an_older_copy_is_found_and_what_is_held_is_written_back(
    store: Store, redis_process: Any, holder: MakeHolder, troubles: Any, eventually: Any, tmp_path: pathlib.Path
) -> None:
    told = troubles(store)
    old = holder(store, "old").claim()
    assert old.commit(1) == [OK]
    copies.take(redis_process, tmp_path / "copy")
    assert old.commit(2) == [OK]
    new = holder(store, "new").claim()
    assert new.commit(7) == [OK]
    copies.put_back(redis_process, tmp_path / "copy")
    eventually(lambda: told.losses)
    assert old.stored() == [1] and new.stored() == [-1]
    assert old.commit(2) == [OK] and new.commit(7) == [OK]
    assert old.stored() == [2] and new.stored() == [7] and store.losses == told.losses


def test_a_commit_finds_it_by_itself(
    quiet: Store, redis_process: Any, holder: MakeHolder, tmp_path: pathlib.Path
) -> None:
    """The copy lacks nothing but one commit."""
    owner = holder(quiet, "a", "b").claim()
    assert owner.commit(1) == [OK, OK]
    copies.take(redis_process, tmp_path / "copy")
    assert owner.commit(2) == [OK, OK]
    copies.put_back(redis_process, tmp_path / "copy")
    only = holder(quiet, "a")
    only.tokens = owner.tokens[:1]
    assert only.commit(3) == [OK] and quiet.losses == 1 and owner.stored() == [3, 1]


def test_a_claim_that_is_lost_is_enough(
    quiet: Store, redis_process: Any, holder: MakeHolder, tmp_path: pathlib.Path
) -> None:
    first = holder(quiet, "a").claim()
    assert first.commit(1) == [OK]
    copies.take(redis_process, tmp_path / "copy")
    owner = holder(quiet, "a").claim()
    copies.put_back(redis_process, tmp_path / "copy")
    assert owner.commit(2) == [OK], "the claim in the copy is an older one"
    assert first.commit(2)[0] in FENCED and owner.stored() == [2]
    info = quiet.describe("a")
    assert info is not None and info.token == owner.tokens[0]
    assert len(list(redis_process.client.scan_iter("engram:{*"))) == 2, "the record in the copy is not left behind"


@pytest.mark.parametrize("times", [1, 3])
def test_a_redis_that_has_everything_is_not_taken_for_an_older_one(
    store: Store, open_store: OpenStore, redis_process: Any, holder: MakeHolder, troubles: Any, times: int
) -> None:
    _always(redis_process)
    other = open_store(redis_process.url)
    told, others = troubles(store), troubles(other)
    one, two = holder(store, "a").claim(), holder(other, "b").claim()
    for seq in range(1, times + 1):
        assert one.commit(seq) == [OK] and two.commit(seq) == [OK]
        redis_process.kill()
        stuck = one.submit(seq + 1), two.submit(seq + 1)
        redis_process.start()
        _always(redis_process)
        assert [commit.wait() for commit in stuck] == [[OK], [OK]]
    assert one.stored() == two.stored() == [times + 1]
    assert (told.losses, others.losses, store.losses, other.losses) == (0, 0, 0, 0)


def _always(process: Any) -> None:
    """A Redis that answers before it has written may lose that when it is killed."""
    for one in getattr(process, "processes", [process]):
        one.client.config_set("appendfsync", "always")


def test_what_others_claimed_since_is_theirs(
    quiet: Store, open_store: OpenStore, redis_process: Any, holder: MakeHolder, tmp_path: pathlib.Path
) -> None:
    """Also if whoever claims has never seen the Redis that was before: a server that is started then."""
    one = holder(quiet, "a", "b").claim()
    assert one.commit(1) == [OK, OK]
    copies.take(redis_process, tmp_path / "copy")
    one = holder(quiet, "a", "b").claim()
    assert one.commit(5) == [OK, OK]
    copies.put_back(redis_process, tmp_path / "copy")
    taker = holder(open_store(redis_process.url), "a").claim()
    assert taker.layout.unpack([taker.claims[0].record]).seq.tolist() == [1], "nobody has written it back yet"
    verdicts = one.commit(6)
    assert verdicts[0] in FENCED and verdicts[1] is OK, "b was claimed by nobody since"
    assert taker.commit(2) == [OK] and taker.stored() == [2] and one.stored() == [2, 6]


def test_the_newest_claim_wins_whoever_writes_back_first(
    quiet: Store, open_store: OpenStore, redis_process: Any, holder: MakeHolder, tmp_path: pathlib.Path
) -> None:
    """Three servers have held it, one after the other; the copy knows of the first alone."""
    first = holder(quiet, "a").claim()
    assert first.commit(1) == [OK]
    copies.take(redis_process, tmp_path / "copy")
    stores = [open_store(redis_process.url) for _ in range(2)]
    second, third = (holder(store, "a").claim() for store in stores)
    for epoch, one in ((2, second), (3, third)):
        one.epoch = epoch
    assert third.commit(2) == [OK]
    copies.put_back(redis_process, tmp_path / "copy")
    for store in stores:  # each finds it by its own counter
        while not store.losses:
            with pytest.raises(StoreUnavailableError):
                store.claim([])
    assert second.commit(9) == [OK], "it does not know that it was replaced, and neither does the copy"
    assert third.commit(3) == [OK] and third.stored() == [3]
    assert second.commit(10)[0] in FENCED and third.stored() == [3]


def test_a_session_made_anew_since_the_copy_is_written_back_over_the_one_that_was_closed(
    quiet: Store, redis_process: Any, holder: MakeHolder, tmp_path: pathlib.Path
) -> None:
    holder(quiet, "a").claim()
    holder(quiet, "a").claim().commit(40)
    copies.take(redis_process, tmp_path / "copy")
    quiet.delete(["a"])
    owner = holder(quiet, "a").claim()
    assert owner.claims[0].status is ClaimStatus.CREATED
    owner.created_ms = owner.claims[0].created_ms
    owner.commit(1)
    copies.put_back(redis_process, tmp_path / "copy")
    assert owner.commit(2) == [OK] and owner.stored() == [2]


def test_a_replica_that_was_behind_and_is_promoted(
    start_redis: Any, free_port: Callable[[], int], open_store: OpenStore, holder: MakeHolder, troubles: Any,
    eventually: Any,
) -> None:  # fmt: skip
    """What asynchronous replication had not brought over is lost by a failover, and written back."""
    ports = [str(free_port()) for _ in range(2)]
    primary = start_redis("--port", ports[0], "--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", ports[0])
    eventually(lambda: replica.client.info("replication")["master_link_status"] == "up")
    store = open_store(primary.url)
    told = troubles(store)
    owner = holder(store, "a", "b").claim()
    owner.commit(1)
    with primary.client as client:
        client.set("written", 1)
        assert client.wait(1, 10_000) == 1
    replica.client.replicaof("NO", "ONE")  # from here on it is behind
    assert owner.commit(2) == [OK, OK]
    primary.kill()
    replica.socket.rename(primary.socket)  # the name that the server was given leads to the new primary
    replica.socket = primary.socket
    eventually(lambda: told.losses == 1)
    assert owner.stored() == [1, 1]
    assert owner.commit(2) == [OK, OK] and owner.stored() == [2, 2] and store.losses == 1


def test_each_node_of_a_cluster_is_told_by_itself(
    start_cluster: Any,
    open_store: OpenStore,
    holder: MakeHolder,
    troubles: Any,
    eventually: Any,
    tmp_path: pathlib.Path,
) -> None:
    cluster = start_cluster()
    store = open_store(cluster.url)
    told = troubles(store)
    names = [f"s{n}" for n in range(60)]
    owner = holder(store, *names).claim()
    assert owner.commit(1) == [OK] * 60
    copies.take(cluster.processes[1], tmp_path / "copy")
    assert owner.commit(2) == [OK] * 60
    copies.put_back(cluster.processes[1], tmp_path / "copy")
    eventually(lambda: told.losses == 1)
    eventually(lambda: _stored(owner) != [])
    stored = _stored(owner)
    assert set(stored) == {1, 2} and owner.commit(3) == [OK] * 60
    assert owner.stored() == [3] * 60 and store.losses == 1


def _stored(owner: Any) -> list[int]:
    try:
        return list(owner.stored())
    except StoreUnavailableError:
        return []


def test_counters_are_one_a_server_and_do_not_stay_for_ever(
    store: Store, open_store: OpenStore, redis_process: Any, holder: MakeHolder, eventually: Any
) -> None:
    open_store(redis_process.url)
    holder(store, "a").claim().commit(1)
    client = redis_process.client
    keys = list(client.scan_iter(GENERATION + b"*"))
    assert len(keys) == 2 * len(getattr(redis_process, "processes", [1]))
    eventually(lambda: all(client.pttl(key) > 86_400_000 for key in keys))
