"""Memories' logs in a real Redis, and in a cluster: written if they are what the writer knew, and gone with their session."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from engram_service.store import MemoryHead, Store, StoreUnavailableError, Written
from engram_service.store.keys import memory_key, meta_key, session_tag

MakeHolder = Callable[..., Any]
OpenStore = Callable[..., Store]


def chunk(text: str) -> bytes:
    """The store looks at a chunk's last 16 bytes alone."""
    return text.encode() + (text * 16).encode()[:16]


def head(store: Store, name: str) -> MemoryHead:
    found = store.memories.look(name)
    assert found is not None
    return found


@pytest.mark.promise(9)
def test_a_log_is_written_by_who_knows_it(store: Store, holder: MakeHolder) -> None:
    logs = store.memories
    assert logs.look("a") is None and logs.copy("a") == []
    holder(store, "a").claim()
    start = head(store, "a")
    assert (start.model, start.version, start.revision, start.length) == ("m", "1", b"", 0)
    one, two, three = chunk("one"), chunk("two"), chunk("six")
    assert logs.write("a", start, [one, two]) is Written.DONE
    assert logs.write("a", start, [one, two]) is Written.DONE, "asked again after a lost answer"
    assert logs.chunks("a") == [one, two] and head(store, "a").revision == two[-16:]
    assert logs.write("a", start, [three]) is Written.CHANGED
    now = head(store, "a")
    other = MemoryHead(now.model, now.version, "0" * 32, now.revision, now.length, now.created_ms)
    assert logs.write("a", other, [three]) is Written.CHANGED, "the session was moved meanwhile"
    assert logs.write("a", now, [three]) is Written.DONE
    assert logs.chunks("a", 2) == [three] and logs.copy("a") == [one, two, three]
    assert logs.write("a", head(store, "a"), [two], replace=True) is Written.DONE
    assert logs.copy("a") == [two]
    assert logs.write("nobody", start, [one]) is Written.NO_SESSION
    many = [chunk(f"{number:04}") for number in range(200)]
    assert logs.write("a", head(store, "a"), many) is Written.DONE and logs.copy("a") == [two, *many]


def test_a_log_goes_where_its_session_goes(store: Store, holder: MakeHolder, redis_process: Any) -> None:
    logs, redis = store.memories, redis_process.client
    owner = holder(store, "a", ttl_ms=60_000).claim()
    owner.commit(1)
    assert logs.write("a", head(store, "a"), [chunk("one")]) is Written.DONE
    assert redis.pttl(memory_key(session_tag("a"))) > 110_000
    holder(store, "a", ttl_ms=90_000).claim()
    assert redis.pttl(memory_key(session_tag("a"))) > 170_000, "a claim renews it"
    assert [info.session_id for info in store.page(0, 100)[1]] == ["a"], "it is not listed as a session"
    info = store.describe("a", with_record=True)
    assert info is not None
    assert store.create("b", "m/1", "f" * 32, info.record, 60_000, "1" * 16, logs.copy("a"))
    assert store.rewrite(info, "m/2", "e" * 32, info.record, "2" * 16)
    assert logs.copy("a") == logs.copy("b") == [chunk("one")]
    store.delete(["a", "b"])
    assert redis.exists(memory_key(session_tag("a")), memory_key(session_tag("b"))) == 0


def test_a_log_does_not_outlive_its_record(store: Store, holder: MakeHolder, redis_process: Any) -> None:
    logs, redis = store.memories, redis_process.client
    for name in ("reopened", "created", "left"):
        holder(store, name, ttl_ms=150).claim()
        assert logs.write(name, head(store, name), [chunk("one")]) is Written.DONE
    info = store.describe("created", with_record=True)
    assert info is not None
    time.sleep(0.2)
    assert logs.look("left") is None and logs.write("left", _none(), [chunk("two")]) is Written.NO_SESSION
    holder(store, "reopened").claim()
    assert head(store, "reopened").revision == b"" and not redis.exists(memory_key(session_tag("reopened")))
    assert store.create("created", "m/1", "f" * 32, info.record, 60_000, "1" * 16)
    assert head(store, "created").revision == b"" and not redis.exists(memory_key(session_tag("created")))
    time.sleep(0.3)
    assert not redis.exists(memory_key(session_tag("left")), meta_key(session_tag("left")))


def _none() -> MemoryHead:
    return MemoryHead("m", "1", "f" * 32, b"", 0, 0)


def test_a_write_waits_for_what_redis_ack_asks(open_store: OpenStore, holder: MakeHolder, redis_process: Any) -> None:
    plain = open_store(redis_process.url)
    holder(plain, "a").claim()
    strict = open_store(redis_process.url, ack="replicated", replicas=1, ack_timeout_ms=50)
    with pytest.raises(StoreUnavailableError):
        strict.memories.write("a", head(plain, "a"), [chunk("one")])
    with pytest.raises(StoreUnavailableError):
        strict.memories.write("a", head(plain, "a"), [chunk("one")])
    assert plain.memories.copy("a") == [chunk("one")], "written once, and never said to be safe"
