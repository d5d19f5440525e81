"""Garbage under the keys of one session, in every place and of every kind: that session alone is refused, and can be closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engram_service.auth.tenants import key_of
from engram_service.errors import DataLossError
from engram_service.store import ClaimStatus, MemoryHead, Store, Verdict, Written, session_tag
from engram_service.store.keys import meta_key, tally_key

MakeHolder = Callable[..., Any]
OK = Verdict.OK
NAMES = ["one", "victim", "two"]


def _other_type(client: Any, key: bytes, record: bytes) -> None:
    client.delete(key, record)
    client.set(key, "not a hash")


def _list(client: Any, key: bytes, record: bytes) -> None:
    client.delete(key)
    client.rpush(key, *range(300))


def _empty_of_fields(client: Any, key: bytes, record: bytes) -> None:
    client.delete(key)
    client.hset(key, "i", "victim")


def _field(name: str, value: bytes | None) -> Callable[..., None]:
    def damage(client: Any, key: bytes, record: bytes) -> None:
        client.hset(key, name, value) if value is not None else client.hdel(key, name)

    return damage


def _record_of_another_type(client: Any, key: bytes, record: bytes) -> None:
    client.delete(record)
    client.sadd(record, "x")


HASHES = {
    "another type": _other_type, "a list": _list, "hardly a field": _empty_of_fields, "no token": _field("t", None),
    "no model": _field("m", None), "no epoch": _field("e", None), "no creation": _field("c", None), "no time": _field("l", None),
    "epoch of letters": _field("e", b"one"), "epoch too great": _field("e", b"9" * 30), "time of letters": _field("l", b"long"),
    "creation with a sign": _field("c", b"-5"), "model without version": _field("m", b"m"), "model of bytes": _field("m", b"\xff\xfe/1"),
    "epoch with a nought": _field("e", b"007"), "creation too great": _field("c", b"9" * 5000), "time too great": _field("l", b"9" * 30),
    "fingerprint of bytes": _field("f", b"\xff\xfe"), "record of another type": _record_of_another_type,
}  # fmt: skip
LISTED = {
    **HASHES,
    "id of bytes": _field("i", b"\xff\xfe\x00"),
    "id of another": _field("i", b"one"),
    "record cut": lambda client, key, record: client.set(record, client.get(record)[:40], keepttl=True),
    "record of noise": lambda client, key, record: client.set(record, b"\xff" * 200, keepttl=True),
}


def listed(store: Store) -> list[str]:
    found, cursor = [], 0
    while True:
        cursor, page = store.page(cursor, 100)
        found += [info.session_id for info in page]
        if not cursor:
            return sorted(found)


@pytest.fixture
def owner(store: Store, holder: MakeHolder) -> Any:
    one = holder(store, *NAMES).claim()
    assert one.commit(1) == [OK] * 3
    return one


def _damage(redis_process: Any, owner: Any, kind: str) -> tuple[bytes, bytes]:
    key = meta_key(session_tag("victim"))
    record = key + b":" + owner.tokens[1].encode()
    LISTED[kind](redis_process.client, key, record)
    return key, record


@pytest.mark.parametrize("kind", HASHES)
def test_the_others_of_a_claim_are_claimed_and_nothing_of_it_is_changed(
    store: Store, redis_process: Any, holder: MakeHolder, owner: Any, kind: str
) -> None:
    key, record = _damage(redis_process, owner, kind)
    client = redis_process.client
    before = [client.type(key), client.dump(key), client.type(record)]
    assert store.holders(NAMES)[::2] == owner.tokens[::2]
    taker = holder(store, *NAMES).claim()
    kinds = [claim.status for claim in taker.claims]
    assert kinds == [ClaimStatus.CARRIED, ClaimStatus.DAMAGED, ClaimStatus.CARRIED] and taker.claims[1].why
    assert [client.type(key), client.dump(key), client.type(record)] == before
    assert taker.commit(2)[::2] == [OK, OK]
    assert store.exists("victim")
    store.delete(["victim"])
    assert not store.exists("victim") and not client.exists(key)
    assert [claim.status for claim in holder(store, "victim").claim().claims] == [ClaimStatus.CREATED]


@pytest.mark.parametrize("kind", LISTED)
def test_a_listing_has_the_others(store: Store, redis_process: Any, owner: Any, kind: str, caplog: Any) -> None:
    _damage(redis_process, owner, kind)
    # A listing needs no time to live, and reads an epoch as people do.
    hidden = kind not in ("no time", "time of letters", "time too great", "epoch with a nought")
    assert listed(store) == (["one", "two"] if hidden else sorted(NAMES))
    assert ("damaged" in caplog.text) == hidden
    if hidden:
        with pytest.raises(DataLossError, match="close the session"):
            store.describe("victim")
    assert store.describe("one") is not None


@pytest.mark.parametrize("kind", HASHES)
def test_calls_on_it_are_refused_as_damaged(store: Store, redis_process: Any, owner: Any, kind: str) -> None:
    info = store.describe("victim", with_record=True)
    assert info is not None
    _damage(redis_process, owner, kind)
    head = MemoryHead("m", "1", "f" * 32, b"", 0, 5)
    for call in (
        lambda: store.memories.look("victim"),
        lambda: store.memories.write("victim", head, [b"x" * 20]),
        lambda: store.create("victim", "m/1", "f" * 32, info.record, 60_000, "0" * 16),
        lambda: store.rewrite(info, "m/2", "f" * 32, info.record, "1" * 16),
    ):
        with pytest.raises(DataLossError) as refused:
            call()
        assert refused.value.reason == "RECORD_CORRUPTED"
    store.delete(["victim"])
    assert store.create("victim", "m/1", "f" * 32, info.record, 60_000, "0" * 16)


def test_a_record_of_another_type_is_no_trouble_for_the_loads_of_others(
    store: Store, redis_process: Any, owner: Any
) -> None:
    _damage(redis_process, owner, "record of another type")
    assert [len(value or b"") > 0 for value in store.load(owner.tags, owner.token_rows)] == [True, False, True]
    assert store.diagnose(owner.tags, owner.token_rows)[1] is Verdict.GONE
    _damage(redis_process, owner, "a list")
    assert store.diagnose(owner.tags[1:2], owner.token_rows[1:2]) == [Verdict.FENCED], "so it is asked, and told"


def test_a_commit_whose_record_and_hash_are_garbage_is_settled(store: Store, redis_process: Any, owner: Any) -> None:
    _damage(redis_process, owner, "another type")
    assert owner.commit(2) == [OK, Verdict.FENCED, OK] and owner.commit(3)[::2] == [OK, OK]


def test_a_memory_of_another_type(store: Store, redis_process: Any, owner: Any) -> None:
    head = store.memories.look("victim")
    assert head is not None
    assert store.memories.write("victim", head, [b"one" + b"1" * 16]) is Written.DONE
    key = meta_key(session_tag("victim")) + b":m"
    redis_process.client.delete(key)
    redis_process.client.set(key, "not a list")
    for call in (lambda: store.memories.look("victim"), lambda: store.memories.chunks("victim")):
        with pytest.raises(DataLossError):
            call()
    assert store.memories.look("one") is not None
    store.delete(["victim"])
    assert not redis_process.client.exists(key)


def test_a_tally_of_another_type_is_begun_anew(store: Store, redis_process: Any) -> None:
    redis_process.client.set(tally_key("acme"), "no sorted set")
    mine = [key_of("acme", name) for name in ("a", "b", "c")]
    assert store.page_of("acme", 0, 10) == (0, [])
    store.tally.give_back(mine)
    assert len(store.tally.take(mine, 60_000, 2)) == 1


def test_keys_that_are_nobodys(store: Store, redis_process: Any, owner: Any) -> None:
    client = redis_process.client
    client.set("engram:{}", "x")
    client.rpush(b"engram:{\xff\xfe}", "x")
    client.hset("engram:{AAAAAAAAAAAAAAAAAAAAAA}", mapping={"i": "x", "m": "y"})
    assert listed(store) == sorted(NAMES)


def test_a_tenants_listing_has_the_others_too(store: Store, redis_process: Any, holder: MakeHolder) -> None:
    names = [key_of("acme", name) for name in ("a", "b", "c")]
    store.tally.take(names, 60_000, 0)
    holder(store, *names).claim()
    client = redis_process.client
    client.delete(meta_key(session_tag(names[1])))
    client.set(meta_key(session_tag(names[1])), "not a hash")
    client.hset(meta_key(session_tag(names[2])), "l", "long")
    assert sorted(info.session_id for info in store.page_of("acme", 0, 10)[1]) == [names[0], names[2]]
    for name in names:
        store.tally.renew(name)
