"""A Redis that may lose what it is given: what is said of it, and that one which is as it should be is not suspected."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from engram_service.observability.health import Health
from engram_service.store import UNSAFE, Store, StoreError, StoreSettings, safety
from engram_service.store.private import PrivateRedis, PrivateSettings

OpenStore = Callable[..., Store]

SAFE = {
    "role": "master", "aof_enabled": 1, "maxmemory_policy": "noeviction", "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok", "rdb_last_bgsave_status": "ok",
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        ((), []),
        (("--maxmemory", "1gb", "--maxmemory-policy", "noeviction"), []),
        (("--appendonly", "no"), ["persistence"]),
        (("--maxmemory-policy", "allkeys-lru"), ["eviction"]),
        (("--maxmemory-policy", "volatile-ttl", "--appendonly", "no"), ["eviction", "persistence"]),
        (("--replicaof", "127.0.0.1", "1"), ["replica"]),
    ],
)
def test_what_is_said_of_a_redis(
    start_redis: Any, open_store: OpenStore, caplog: Any, flags: tuple[str, ...], reasons: list[str]
) -> None:
    process = start_redis(*flags)
    store = open_store(process.url)
    assert sorted(store.unsafe) == reasons
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(UNSAFE[n] for n in range(len(UNSAFE)) if any(f"({UNSAFE[n]})" in line for line in warned)) == reasons
    for required in (False, True):
        wanted = open_store(process.url, start=False, require_safe=required)
        if required and reasons:
            with pytest.raises(StoreError, match=r"does not keep what it is given.*require_safe_redis"):
                wanted.start()
        else:
            wanted.start()


def test_one_that_becomes_unsafe_is_noticed_and_one_that_is_safe_again_too(
    start_redis: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    from engram_service.store import watch as module

    monkeypatch.setattr(module, "_SAFETY_S", 0.0)
    process, health = start_redis(), Health()
    store = Store(StoreSettings(process.url, require_safe=True), health=health)
    store.start()
    try:
        assert health.warnings() == health.failures() == []
        process.client.config_set("maxmemory-policy", "volatile-lru")
        eventually(lambda: store.unsafe_as_to("eviction"))
        eventually(health.failures)
        assert "volatile-lru" in health.warnings()[0] and "volatile-lru" in health.failures()[0]
        process.client.config_set("maxmemory-policy", "noeviction")
        eventually(lambda: not health.failures())
        assert health.warnings() == [] and not store.unsafe
    finally:
        store.close()


def test_a_disk_that_is_full_is_told_while_writes_are_refused(
    start_redis: Any, open_store: OpenStore, eventually: Any
) -> None:
    """Its snapshots cannot be written, for what should be a file is a directory; Redis then refuses writes."""
    process = start_redis("--appendonly", "no")
    process.client.config_set("save", "3600 1")
    store = open_store(process.url)
    assert not store.unsafe_as_to("disk") and "last snapshot" in store.unsafe["persistence"]
    (process.directory / "dump.rdb").mkdir()
    with process.client as client:
        client.execute_command("BGSAVE")
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    eventually(lambda: store.unsafe_as_to("disk"))
    (process.directory / "dump.rdb").rmdir()
    with process.client as client:
        eventually(lambda: client.execute_command("BGSAVE"))
    eventually(lambda: not store.unsafe_as_to("disk"))


def test_a_user_without_the_right_to_look_is_served_and_told_what_could_not_be_checked(
    start_redis: Any, open_store: OpenStore, caplog: Any
) -> None:
    process = start_redis("--appendonly", "no")
    client = process.client
    rights = (
        "on",
        ">secret",
        "~engram:*",
        "resetchannels",
        "-@all",
        "+@read",
        "+@write",
        "+@scripting",
        "+@connection",
    )
    client.execute_command("ACL", "SETUSER", "engram", *rights, "-@dangerous", "+info", "+client|id", "+client|kill")
    store = open_store(f"unix://engram:secret@{process.socket}")
    assert list(store.unsafe) == ["persistence"], "INFO tells that; CONFIG may not be asked"
    assert "no snapshot has" in store.unsafe["persistence"]


@pytest.mark.parametrize("name", ["aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status"])
def test_a_disk_that_takes_nothing(name: str) -> None:
    assert safety.unsafe(SAFE, None) == {}
    found = safety.unsafe({**SAFE, name: "err"}, None)
    assert list(found) == ["disk"] and name in found["disk"]


def test_a_managed_redis_that_hides_things_is_not_accused() -> None:
    bare = {"redis_version": "7.0.0"}
    assert safety.unsafe(bare, None) == {}
    assert "maxmemory-policy" in safety.unchecked(bare) and safety.unchecked(SAFE) == ""


def test_what_cannot_be_checked_is_said_once(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(safety, "look", lambda client: ({}, "could not be checked of Redis: its role"))
    for _ in range(3):
        store._watch.check_safety()
    assert caplog.text.count("could not be checked") == 1


def test_the_private_redis_is_safe(tmp_path: pathlib.Path, open_store: OpenStore, caplog: Any) -> None:
    private = PrivateRedis(PrivateSettings(tmp_path / "data", maxmemory_mb=64))
    private.start()
    try:
        store = open_store(private.url, require_safe=True)
        assert store.unsafe == {} and "REDIS" not in caplog.text
    finally:
        private.stop()
