"""A tenant's tally: places for its sessions, over all servers that share a Redis."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram_service.auth.tenants import key_of
from engram_service.store import Place, Store, StoreSettings
from engram_service.store.tally import Tally

TTL_MS = 60_000


@pytest.fixture
def tally(store: Store) -> Tally:
    return store.tally


def keys(tenant: str, *names: object) -> list[str]:
    return [key_of(tenant, str(name)) for name in names]


def test_servers_that_make_sessions_at_once_keep_to_the_limit(store: Store, redis_process: Any) -> None:
    others = [Store(StoreSettings(redis_process.url)) for _ in range(3)]
    tallies = [one.tally for one in (store, *others)]

    def make(number: int) -> int:
        some = keys("acme", *(f"{number}-{n}" for n in range(7)))
        return len(some) - len(tallies[number % 4].take(some, TTL_MS, 100))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(40))) == 100
    for one in others:
        one.close()


def test_sessions_of_several_tenants_are_asked_for_at_once(tally: Tally) -> None:
    asked = [Place(key, ttl_ms, limit) for key, ttl_ms, limit in (
        *((key, TTL_MS, 2) for key in keys("acme", "a", "b")), (key_of("globex", "a"), TTL_MS, 1), (key_of("", "a"), TTL_MS, 1),
        (key_of("acme", "c"), TTL_MS, 2), (key_of("globex", "b"), 2 * TTL_MS, 1), (key_of("globex", "a"), 2 * TTL_MS, 1),
    )]  # fmt: skip
    assert tally.take_each(asked) == [True, True, True, True, False, False, True]
    assert tally.take_each([]) == []
    assert tally.take(keys("acme", "b", "c"), TTL_MS, 2) == set(keys("acme", "c")), "who had no place has none"


def test_places_are_over_with_the_sessions(tally: Tally) -> None:
    brief = keys("acme", "a", "b")
    assert not tally.take(brief, 1, 3)  # and some seconds, for renewals that are late
    assert tally.take(keys("acme", "c", "d"), TTL_MS, 3) == set(keys("acme", "d"))
    tally.keep(brief[:1], [TTL_MS])
    tally.give_back(keys("acme", "c"))
    assert not tally.take(keys("acme", "d"), TTL_MS, 3)
    deadline = time.monotonic() + 10
    while above := tally.take(keys("acme", "e"), TTL_MS, 3):
        assert above == set(keys("acme", "e")) and time.monotonic() < deadline
        time.sleep(0.2)
    assert tally.take(keys("acme", "f"), TTL_MS, 3), "a, which was kept, d and e are there"


calls = st.lists(
    st.tuples(st.sampled_from(["take", "give back"]), st.sampled_from(["acme", "globex", ""]),
              st.lists(st.integers(0, 9), max_size=4, unique=True), st.integers(0, 4)),
    max_size=20,
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls)
def test_any_calls(tally: Tally, redis_process: Any, made: list[tuple[str, str, list[int], int]]) -> None:
    for key in redis_process.client.keys("engram:stored:*"):
        redis_process.client.delete(key)
    held: dict[str, set[str]] = {"acme": set(), "globex": set()}
    for what, tenant, names, limit in made:
        some = keys(tenant, *names)
        if what == "give back":
            tally.give_back(some)
            held.get(tenant, set()).difference_update(some)
            continue
        above = tally.take(some, TTL_MS, limit)
        expected: set[str] = set()
        for one in some if tenant else ():
            if one in held[tenant] or not limit or len(held[tenant]) < limit:
                held[tenant].add(one)
            else:
                expected.add(one)
        assert above == expected
