"""A memory's log without servers: chunks as bytes, the chain that they make, and what is kept of them at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_models import PatternError, PatternMemory
from engram_service.patterns.cache import Cache
from engram_service.patterns.chunks import (
    FORGET,
    NUMBERS_MAX,
    STORE,
    WHOLE,
    Chunk,
    ChunkError,
    Operation,
    chain,
    pack_chunk,
    unpack_chunk,
)
from engram_service.patterns.held import Held, unfold

SIZE = 21
OWN = PatternMemory(SIZE)


def bits(count: int, seed: int = 0) -> np.ndarray:
    return np.packbits(np.random.default_rng(seed).integers(0, 2, (count, SIZE), np.uint8), axis=1)


def store(held: Held, *labels: str, id: bytes = b"i" * 16) -> list[bytes]:
    return held.stored(Operation(id, 0, len(labels), STORE), bits(len(labels), len(held.memory.labels)), labels, 0)


@given(
    labels=st.lists(st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable()), max_size=9, unique=True),
    ids=st.lists(st.binary(min_size=16, max_size=16), max_size=3),
    before=st.binary(min_size=16, max_size=16),
    kind=st.sampled_from([WHOLE, STORE, FORGET]),
    numbers=st.integers(0, NUMBERS_MAX),
)
@settings(deadline=None, max_examples=60)
def test_what_is_packed_is_unpacked(
    labels: Sequence[str], ids: Sequence[bytes], before: bytes, kind: int, numbers: int
) -> None:
    operations = [Operation(one, numbers, 7, STORE) for one in ids]
    rows = np.empty((0, 3), np.uint8) if kind == FORGET else bits(len(labels)).reshape(-1, 3)
    chunk = Chunk(kind, SIZE, before, numbers, operations, labels, rows)
    data = pack_chunk(chunk)
    found = unpack_chunk(data)
    assert np.array_equal(found.bits, rows)
    assert replace(found, bits=rows) == replace(chunk, bits=rows, labels=list(labels), operations=operations)


@pytest.mark.promise(9)
@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_a_damaged_chunk_is_refused(place: int, value: int) -> None:
    data = bytearray(pack_chunk(Chunk(STORE, SIZE, b"", 0, [], ["a", "b"], bits(2))))
    data[place % len(data)] ^= value
    with pytest.raises(ChunkError):
        unpack_chunk(bytes(data))
    with pytest.raises(ChunkError):
        unpack_chunk(bytes(data[: place % len(data)]))


@pytest.mark.promise(9)
def test_a_log_is_followed_and_another_one_is_not() -> None:
    one, other = Held(OWN), Held(OWN)
    first = store(one, "a", "b")
    assert one.follow(first) and other.follow(first)
    second = store(one, "c")
    assert one.follow(second) and not other.follow(store(one, "d")), "a chunk is missing before it"
    assert other.follow(second) and other.revision == one.revision
    assert not other.follow(first), "it has been applied"
    assert list(other.memory.labels) == ["a", "b", "c"] and other.length == 3, "the model's own, and two stores"
    apart, away = Held(OWN), Held(OWN)
    assert apart.follow(store(apart, "a")) and away.follow(store(away, "x"))
    assert not away.follow(store(apart, "b")), "as long, and of another history"


def test_a_whole_log_says_what_the_long_one_said() -> None:
    held = Held(OWN)
    for number in range(40):
        held.follow(store(held, f"a{number}", f"b{number}", id=bytes([number]) * 16))
        held.follow(held.forgot(Operation(bytes([100 + number]) * 16, 0, 1, FORGET), [f"a{number}"]))
    again = unfold(OWN, held.whole())
    assert list(again.memory.labels) == list(held.memory.labels) == [f"b{number}" for number in range(40)]
    assert np.array_equal(again.memory.bits, held.memory.bits)
    assert list(again.operations) == list(held.operations) and again.length == 1
    empty = unfold(OWN, held.emptied(Operation(b"\xff" * 16, 0, 40, FORGET)))
    assert empty.memory.count == 0 and len(empty.operations) == 81


def test_a_log_that_does_not_fit_the_model_is_refused() -> None:
    log = chain([Chunk(WHOLE, SIZE, b"", 0, [], ["a"], bits(1)), Chunk(STORE, SIZE, b"", 0, [], ["a"], bits(1))])
    with pytest.raises(ChunkError, match="'a'"):
        unfold(OWN, log)
    with pytest.raises(ChunkError, match="21 bits"):
        unfold(PatternMemory(SIZE + 1), log[:1])
    with pytest.raises(ChunkError):
        unfold(OWN, log[1:])
    with pytest.raises(ChunkError, match="limit"):
        unfold(PatternMemory(SIZE, patterns_max=1), chain([Chunk(WHOLE, SIZE, b"", 0, [], ["a", "b"], bits(2))]))


def test_the_longest_unused_memory_is_let_go_of_first() -> None:
    held = Held(OWN)
    held.follow(store(held, "a"))
    one = held.memory.nbytes
    cache = Cache(3 * one)
    for number in (0, 1, 2, 0, 3):
        slot = cache.slot(f"s{number}")
        slot.held = held
        cache.used(f"s{number}", slot)
    assert cache.nbytes == 3 * one
    assert [cache.slot(f"s{number}").held is held for number in (0, 2, 3, 1)] == [True, True, True, False]
    large = Cache(one // 2)
    slot = large.slot("large")
    slot.held = held
    large.used("large", slot)
    assert large.nbytes == one, "one that is larger than the limit is kept alone"
    slot.held = None
    large.used("large", slot)
    assert large.nbytes == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"numbers": 2**64 - 1}, "numbered"),
        ({"labels": ["a", "b" * 257]}, "labels do not fit"),
        ({"labels": ["a", ""]}, "labels do not fit"),
    ],
)
def test_a_forged_chunk_is_refused(change: dict[str, object], why: str) -> None:
    """Whoever forges a chunk computes its digest too."""
    chunk = Chunk(WHOLE, SIZE, b"", 0, [], ["a", "b"], bits(2))
    with pytest.raises(ChunkError, match=why):
        unpack_chunk(pack_chunk(replace(chunk, **change)))  # type: ignore[arg-type]


def test_labels_that_are_not_utf8_or_not_where_they_should_be() -> None:
    data = pack_chunk(Chunk(WHOLE, SIZE, b"", 0, [], ["ab", "cd"], bits(2)))
    lengths = data.index(b"\2\0\2\0")
    for at, value, why in (
        (data.index(b"abcd"), b"\x87", "UTF-8"),
        (lengths, b"\1", "lengths"),
        (lengths, b"\3", "lengths"),
    ):
        body = data[:at] + value + data[at + 1 : -16]
        with pytest.raises(ChunkError, match=why):
            unpack_chunk(body + hashlib.blake2b(body, digest_size=16).digest())


def test_numbers_that_have_run_out_are_said_and_not_written() -> None:
    """Found by fuzzing: a log at its limit could be written to, and then not be read."""
    held = unfold(OWN, [pack_chunk(Chunk(WHOLE, SIZE, b"", NUMBERS_MAX, [], ["a"], bits(1)))])
    with pytest.raises(PatternError) as caught:
        held.stored(Operation(b"i" * 16, NUMBERS_MAX, 1, STORE), bits(1, 2), ["p"], NUMBERS_MAX + 1)
    assert caught.value.reason == "MEMORY_FULL"
    assert held.follow(held.stored(Operation(b"i" * 16, 0, 1, STORE), bits(1, 2), ["own"], NUMBERS_MAX))


def test_a_log_that_stands_where_it_stood_before_is_known() -> None:
    held, revisions = Held(OWN), [b""]
    for label in ("a", "b", "c"):
        chunks = store(held, label)
        if not held.revision:
            held.restart(chunks)
        else:
            held.follow(chunks)
        revisions.append(held.revision)
    assert [held.outgrew(revision) for revision in revisions] == [False, True, True, False]
    assert not held.outgrew(b"r" * 16), "somebody else's is newer"
