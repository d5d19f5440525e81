"""Scripts are asked for by their digests; a Redis that does not know one is given them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engram_service.store import ClaimStatus, Store, Verdict
from engram_service.store.keys import meta_key, session_tag
from engram_service.store.scripts import ALL, DELETE, Script

MakeHolder = Callable[..., Any]


def asked(redis_process: Any, command: str) -> int:
    """How often Redis has been asked for this, whatever became of it."""
    return int(redis_process.client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def test_redis_is_not_asked_whether_it_knows_a_script(store: Store, redis_process: Any, holder: MakeHolder) -> None:
    holder(store, "first").claim()
    redis_process.client.config_resetstat()
    for number in range(5):
        one = holder(store, f"one-{number}", f"two-{number}").claim()
        store.delete(one.ids)
    assert asked(redis_process, "evalsha") == 20
    assert not asked(redis_process, "script|exists") and not asked(redis_process, "script|load")


def test_scripts_that_redis_has_forgotten_are_loaded(store: Store, redis_process: Any, holder: MakeHolder) -> None:
    first = holder(store, "a", "b").claim()
    redis_process.client.script_flush()
    redis_process.client.config_resetstat()
    second = holder(store, "a", "b", "c").claim()
    kinds = [claim.status for claim in second.claims]
    assert kinds == [ClaimStatus.CARRIED, ClaimStatus.CARRIED, ClaimStatus.CREATED]
    assert first.commit(1) == [Verdict.FENCED] * 2 and second.commit(1) == [Verdict.OK] * 3
    assert asked(redis_process, "script|load") == len(ALL)
    redis_process.client.script_flush()
    store.delete(["a"])
    assert not store.exists("a")


def test_only_what_redis_did_not_do_is_asked_again(store: Store, redis_process: Any, holder: MakeHolder) -> None:
    """Another client has it forget them between two commands of ours."""
    holder(store, "early", "late").claim()
    script, keys = Script(DELETE), [meta_key(session_tag(name)) for name in ("early", "count", "flush", "late")]
    commands = (
        lambda pipe: script([keys[0]], [b""], pipe),
        lambda pipe: pipe.incr("count"),
        lambda pipe: pipe.execute_command("SCRIPT FLUSH"),
        lambda pipe: script([keys[3]], [b""], pipe),
    )
    redis_process.client.config_resetstat()
    counted = store._commands.pipelined(keys, lambda pipe, at: commands[at](pipe), counted=True)
    assert counted == [1, 1, True, 1]
    assert int(redis_process.client.get("count")) == 1 and asked(redis_process, "evalsha") == 3
    assert not store.exists("early") and not store.exists("late")
    assert not store.losses
