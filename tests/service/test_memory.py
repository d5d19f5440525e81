"""Memories of sessions: stored on one server and recalled on another, applied once, carried along and removed with the session."""

from __future__ import annotations

import asyncio
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import engram
from engram.v1 import memory_pb2 as pb
from engram_models import DBN, NTM, RBM, Hopfield, content_addressing, load_cell, write_bundle
from engram_service.store.keys import memory_key, meta_key, session_tag

SIZE = 96
QUICK = ("--shipped-models", "false", "--batch-rows-max", "32")  # which makes a start quick
PATIENT = engram.ClientOptions(backoff_initial_s=0.02, backoff_max_s=0.3)


def patterns(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1, 1], (count, size))


def flipped(pattern: np.ndarray, bits: int) -> np.ndarray:
    return np.where(np.arange(len(pattern)) < bits, -pattern, pattern)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models")
    own = Hopfield.of(patterns(3, seed=9), ["own0", "own1", "own2"])
    write_bundle(path, "dense", "1", Hopfield(SIZE))
    write_bundle(path, "small", "1", Hopfield(SIZE, patterns_max=5))
    write_bundle(path, "hebb", "1", Hopfield(SIZE, rule="hebb"))
    write_bundle(path, "lettered", "1", own)
    write_bundle(path, "lettered", "2", Hopfield.of(patterns(2, seed=8), ["own1", "new"]))
    write_bundle(path, "ntm", "1", NTM(9, 8, 30, slots=32, width=10, read_heads=2))
    write_bundle(path, "rbm", "1", RBM(12, 7))
    write_bundle(path, "dbn", "1", DBN([12, 7, 5], 3))
    return path


@pytest.fixture(scope="module")
def pair(
    models: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, module_redis: Any, shared_server: Any,
) -> Iterator[list[Any]]:  # fmt: skip
    """Two servers on one Redis; their `redis` is it."""
    flags = ("--models", str(models), "--redis-url", module_redis.url, *QUICK)
    one, two = (type(shared_server)(tmp_path_factory.mktemp(name), *flags) for name in ("one", "two"))
    with one, two:
        one.redis = two.redis = module_redis
        yield [one, two]


@pytest.fixture
def clients(pair: list[Any]) -> Iterator[list[engram.Client]]:
    with engram.Client(pair[0].address, PATIENT) as one, engram.Client(pair[1].address, PATIENT) as two:
        yield [one, two]


@pytest.fixture
def name() -> str:
    return f"memory-{secrets.token_hex(4)}"


def reason(work: Callable[[], object]) -> str:
    with pytest.raises(engram.EngramError) as caught:
        work()
    assert caught.value.message
    return caught.value.reason


def test_what_one_server_stored_another_recalls_and_nobody_is_disturbed(
    clients: list[engram.Client], pair: list[Any], name: str
) -> None:
    stored = patterns(40)
    session = clients[0].open("dense", name)
    before = session.step(stored[0].astype(np.float32))
    assert session.store(stored, [f"label {row}" for row in range(40)]) == engram.Stored(
        [f"label {row}" for row in range(40)], 40, pytest.approx(40 / SIZE), ""
    )
    epoch = clients[1].sessions.get(name).epoch
    hits = clients[1].sessions.recall(name, [flipped(pattern, 20) for pattern in stored])
    assert [hit.label for hit in hits] == [f"label {row}" for row in range(40)]
    assert all(np.array_equal(hit.pattern, pattern) for hit, pattern in zip(hits, stored, strict=True))
    assert all((hit.overlap, hit.distance, hit.converged, hit.spurious) == (1.0, 0, True, False) for hit in hits)
    assert all(len(hit.energies) == hit.sweeps + 1 and (np.diff(hit.energies) <= 0).all() for hit in hits)
    clients[1].sessions.store(name, stored[:1] * -1, ["more"])
    assert session.recall(-stored[0]).label == "more", "the first server sees what the second one stored"
    assert clients[1].sessions.get(name).epoch == epoch == 1
    series = pair[1].series()
    assert series['engram_recalls_total{model="dense",outcome="stored"}'] == 40
    assert series['engram_patterns_total{what="stored"}'] == 1
    assert series["engram_recall_seconds_count"] == 1 and series["engram_memory_cache_bytes"] > 0
    assert np.array_equal(session.step(np.zeros(SIZE)), before), "its stream goes on"


def test_cues_in_every_way_to_write_them(clients: list[engram.Client], name: str) -> None:
    stored = patterns(8)
    session = clients[0].open("dense", name)
    assert session.store(stored[0]).labels == ["p0"]
    assert session.store((stored[1:5] + 1) // 2).labels == ["p1", "p2", "p3", "p4"]
    assert session.store(stored[5:] > 0, ["p5", "p8", "x"]).count == 8
    hidden = np.arange(SIZE) < SIZE * 3 // 4
    assert session.recall(stored[6], hidden).label == "p8", "three quarters unknown"
    noise = np.where(hidden, 7, stored[7])
    assert session.recall(noise, hidden).label == "x", "what is masked is not looked at"
    as_bits = session.recall((stored[3] + 1) // 2)
    assert as_bits.pattern.tolist() == ((stored[3] + 1) // 2).tolist()
    assert session.recall(stored[4] > 0).pattern.tolist() == (stored[4] > 0).tolist()
    several = session.recall(stored[:3], np.stack([hidden, ~hidden, hidden]))
    assert [hit.label for hit in several] == ["p0", "p1", "p2"]
    assert session.store(-stored[:2]).labels == ["p9", "p10"], "numbers that are taken are passed over"


def test_the_classical_rules_take_turns_as_the_seed_says(clients: list[engram.Client], name: str) -> None:
    stored = patterns(5)
    session = clients[0].open("hebb", name)
    session.store(stored)
    cues = [flipped(pattern, 15) for pattern in stored]
    first, again = (clients[1].sessions.recall(name, cues, seed=3) for _ in range(2))
    assert [hit.label for hit in first] == [f"p{row}" for row in range(5)]
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.energies, two.energies) and (np.diff(one.energies) <= 0).all()
    at_once = session.recall(cues[0], synchronous=True, sweeps_max=1)
    assert at_once.sweeps == 1 and len(at_once.energies) == 2
    warned = session.store(patterns(20, seed=5), [f"too many {row}" for row in range(20)])
    assert warned.load == pytest.approx(25 / SIZE) and "0.138" in warned.warning


def test_bad_input_is_refused_with_a_reason_and_stores_nothing(
    clients: list[engram.Client], pair: list[Any], name: str, connect: Any
) -> None:
    stored = patterns(3)
    session = clients[0].open("small", name)
    assert reason(lambda: session.recall(stored[0])) == "EMPTY_MEMORY"
    session.store(stored, ["a", "b", "c"])
    nan = np.where(np.arange(SIZE) == 5, np.nan, stored[0])
    mixed = stored[0].copy()
    mixed[0], mixed[1:3] = 0, -1
    for bad in (nan, stored[0] * 2, mixed, stored[0][:-1], [[1, -1], [1]], ["a"] * SIZE, np.zeros((0, SIZE)), 1):
        assert reason(lambda bad=bad: session.store(bad)) == "INVALID_PATTERN"
    for bad in (nan, stored[0][:-1], mixed):
        assert reason(lambda bad=bad: session.recall(bad)) == "INVALID_PATTERN"
    assert reason(lambda: session.recall(stored[0], np.ones(SIZE, bool))) == "CUE_ALL_MASKED"
    assert reason(lambda: session.recall(stored[0], np.zeros(SIZE - 1, bool))) == "INVALID_PATTERN"
    assert reason(lambda: session.store(-stored[:2], ["d", "a"])) == "DUPLICATE_LABEL"
    assert reason(lambda: session.store(-stored[:2], ["d", "d"])) == "DUPLICATE_LABEL"
    for labels in (["d"], ["d", ""], ["d", "two\nlines"], ["d", "é" * 129]):
        assert reason(lambda labels=labels: session.store(-stored[:2], labels)) == "INVALID_PATTERN"
    assert reason(lambda: session.store(-stored, ["d", "e", "f"])) == "MEMORY_FULL"
    assert reason(lambda: session.forget(["a", "nobody"])) == "UNKNOWN_LABEL"
    assert reason(lambda: session.forget(["a", "a"])) == "DUPLICATE_LABEL"
    assert reason(session.forget) == "INVALID_ARGUMENT"
    assert reason(lambda: clients[0].sessions.recall("nobody", stored[0])) == "SESSION_NOT_FOUND"
    assert reason(lambda: clients[0].sessions.recall("a b", stored[0])) == "INVALID_SESSION_ID"
    assert reason(lambda: clients[0].open("ntm").store(stored)) == "UNSUPPORTED_OPERATION"
    assert session.patterns().labels == ["a", "b", "c"]
    _raw_requests_are_checked_too(connect(pair[0]), name)
    assert session.patterns().labels == ["a", "b", "c"]


def _raw_requests_are_checked_too(raw: Any, name: str) -> None:
    """What the SDK would not send."""
    good, operation = b"\0" * 12, b"o" * 16
    for request in (
        pb.StorePatternsRequest(session_id=name, operation_id=b"short", size=SIZE, patterns=good),
        pb.StorePatternsRequest(session_id=name, operation_id=operation, size=SIZE, patterns=good[:-1]),
        pb.StorePatternsRequest(session_id=name, operation_id=operation, size=0, patterns=good),
        pb.StorePatternsRequest(session_id=name, operation_id=operation, size=SIZE),
        pb.StorePatternsRequest(session_id=name, operation_id=operation, size=SIZE - 1, patterns=good),
        pb.StorePatternsRequest(session_id=name, operation_id=operation, size=SIZE, patterns=good, labels=["d", "e"]),
    ):
        _refused(lambda request=request: raw.unary("StorePatterns", request, pb.StorePatternsResponse))
    for cues in (
        pb.RecallRequest(session_id=name, size=SIZE),
        pb.RecallRequest(session_id=name, size=SIZE, cues=good, unknown=good * 2),
        pb.RecallRequest(session_id=name, size=SIZE, cues=good, unknown=b"\xff" * 12),
        pb.RecallRequest(session_id=name, size=SIZE, cues=good, sweeps_max=1 << 30),
        pb.RecallRequest(session_id=name, size=SIZE, cues=good * 5000),
    ):
        _refused(lambda cues=cues: raw.unary("Recall", cues, pb.RecallResponse))
    _refused(lambda: raw.unary("StorePatterns", b"\xff\xff", pb.StorePatternsResponse))


def _refused(work: Callable[[], object]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value


@pytest.mark.promise(9)
def test_an_operation_is_applied_once_on_whichever_server(
    clients: list[engram.Client], pair: list[Any], name: str, connect: Any
) -> None:
    clients[0].open("dense", name)
    request = pb.StorePatternsRequest(
        session_id=name, operation_id=secrets.token_bytes(16), size=SIZE,
        patterns=np.packbits(patterns(4) > 0, axis=1).tobytes(),
    )  # fmt: skip
    raws = [connect(server) for server in pair]
    first = raws[0].unary("StorePatterns", request, pb.StorePatternsResponse)
    assert (first.stored, first.first_number, first.count) == (4, 0, 4)
    clients[1].sessions.store(name, -patterns(2))
    for raw in raws:
        again = raw.unary("StorePatterns", request, pb.StorePatternsResponse)
        assert (again.stored, again.first_number, again.count) == (4, 0, 6)
    forget = pb.ForgetPatternsRequest(session_id=name, operation_id=secrets.token_bytes(16), all=True)
    assert raws[1].unary("ForgetPatterns", forget, pb.ForgetPatternsResponse).forgotten == 6
    clients[0].sessions.store(name, patterns(1), ["after"])
    for raw in raws:
        answer = raw.unary("ForgetPatterns", forget, pb.ForgetPatternsResponse)
        assert (answer.forgotten, answer.count) == (6, 1)
        known = raw.unary("StorePatterns", request, pb.StorePatternsResponse)
        assert (known.stored, known.count) == (4, 1), "a new log still knows the calls of the old one"


@pytest.mark.promise(9)
def test_two_servers_storing_at_once_lose_nothing(clients: list[engram.Client], name: str) -> None:
    clients[0].open("dense", name)
    stored = patterns(120, seed=3)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for row in range(number, 120, 6):
                clients[number % 2].sessions.store(name, stored[row], f"label {row}")
                assert clients[(number + 1) % 2].sessions.recall(name, stored[row]).label == f"label {row}"
            clients[number % 2].sessions.forget(name, f"label {number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for client in clients:
        found = client.sessions.patterns(name, values=True)
        assert sorted(found.labels) == sorted(f"label {row}" for row in range(6, 120))
        assert found.patterns is not None
        assert all(
            (stored[int(label[6:])] == row).all() for label, row in zip(found.labels, found.patterns, strict=True)
        )


def test_a_memory_is_forked_exported_imported_and_closed_with_its_session(
    clients: list[engram.Client], pair: list[Any], name: str
) -> None:
    stored = patterns(6)
    session = clients[0].open("lettered", name, version="1")
    assert session.patterns().labels == ["own0", "own1", "own2"], "a session begins with its model's patterns"
    assert session.recall(patterns(3, seed=9)[1]).label == "own1"
    session.store(stored, list("abcdef"))
    session.forget(["own0", "b"])
    labels = ["own1", "own2", *"acdef"]
    copy = session.fork(name + "-copy")
    copy.forget("a")
    data = clients[1].sessions.export(name)
    session.store(-stored, list("ABCDEF"))
    for damaged in (data[:-1], data[:40] + b"x" + data[41:]):
        assert reason(lambda damaged=damaged: clients[1].sessions.import_(damaged, name + "-bad")) == "INVALID_EXPORT"
    clients[1].sessions.import_(data, name + "-import")
    assert clients[0].sessions.patterns(name + "-import").labels == labels
    assert copy.patterns().labels == ["own1", "own2", *"cdef"]
    assert session.patterns().labels == [*labels, *"ABCDEF"]
    listed = {info.id for info in clients[0].sessions.list() if info.id.startswith(name)}
    assert listed == {name, name + "-copy", name + "-import"}
    redis = pair[0].redis.client
    for one in listed:
        assert redis.exists(memory_key(session_tag(one)))
        clients[1].sessions.close(one)
        assert not redis.exists(memory_key(session_tag(one)))
    again = clients[1].open("lettered", name, version="1")
    assert again.patterns().labels == ["own0", "own1", "own2"], "nothing of the former session is left at hand"
    clients[0].sessions.import_(data, name + "-copy")
    assert clients[0].sessions.patterns(name + "-copy").labels == labels


def test_a_session_that_moves_to_another_version_keeps_its_memory(clients: list[engram.Client], name: str) -> None:
    session = clients[0].open("lettered", name, version="1")
    assert clients[0].sessions.move(name, "2").version == "2"
    assert clients[1].sessions.patterns(name).labels == ["own1", "new"], "without a memory of its own"
    clients[0].sessions.store(name, patterns(1), ["mine"])
    clients[0].sessions.move(name, "1")
    assert clients[1].sessions.patterns(name).labels == ["own1", "new", "mine"]
    del session


def test_a_memory_lives_as_long_as_its_session(clients: list[engram.Client], pair: list[Any], name: str) -> None:
    brief = engram.ClientOptions(ttl_s=1.2)
    redis = pair[0].redis.client
    key = memory_key(session_tag(name))
    with engram.Client(pair[0].address, brief) as client:
        client.open("dense", name).store(patterns(2))
        for _ in range(5):
            time.sleep(0.5)
            assert clients[1].sessions.recall(name, patterns(2)[0]).label == "p0", "a recall renews the session's time"
        assert 0 < redis.pttl(key) <= 2400 and 0 < redis.pttl(meta_key(session_tag(name))) <= 2400
    time.sleep(1.3)
    assert reason(lambda: clients[1].sessions.recall(name, patterns(2)[0])) == "SESSION_NOT_FOUND"
    assert clients[0].open("dense", name).patterns().labels == [], "who comes later starts anew"
    assert not redis.exists(key)


def test_a_long_log_is_replaced_by_a_short_one(clients: list[engram.Client], pair: list[Any], name: str) -> None:
    stored = patterns(1000, seed=2)

    async def main() -> None:
        async with engram.AsyncClient(pair[0].address, PATIENT) as client:
            await client.open("dense", name)
            for row in range(540):
                await client.sessions.store(name, stored[row], f"label {row}")

    asyncio.run(main())
    redis = pair[0].redis.client
    assert redis.llen(memory_key(session_tag(name))) < 100
    assert clients[1].sessions.patterns(name).labels == [f"label {row}" for row in range(540)]


def test_a_memory_outlives_a_lost_redis_and_a_killed_server(
    tmp_path: pathlib.Path, redis_process: Any, server_with: Callable[..., Any]
) -> None:
    write_bundle(tmp_path / "models", "dense", "1", Hopfield(SIZE))
    flags = ("--models", str(tmp_path / "models"), "--redis-url", redis_process.url, *QUICK)
    stored, key = patterns(30), memory_key(session_tag("kept"))
    with server_with(*flags) as server, engram.Client(server.address, PATIENT) as client:
        session = client.open("dense", "kept")
        session.step(np.ones(SIZE))
        session.store(stored)
        redis_process.client.flushall()
        time.sleep(1.2)
        session.step(np.ones(SIZE))
        assert session.recall(stored[3]).label == "p3", "the server writes back what it has at hand"
        assert redis_process.client.llen(key) == 1
        redis_process.client.delete(key)
        assert session.recall(stored[3]).label == "p3", "evicted"
        meta, late = meta_key(session_tag("kept")), patterns(3, seed=9)
        copy, revision = redis_process.client.dump(key), redis_process.client.hget(meta, "g")
        session.store(late, ["late 0", "late 1", "late 2"])
        redis_process.client.restore(key, 0, copy, replace=True)
        redis_process.client.hset(meta, "g", revision)
        assert session.recall(late[1]).label == "late 1", "an older copy is written over"
        server.kill()
        with ThreadPoolExecutor(2) as pool:
            hits = pool.submit(client.sessions.recall, "kept", stored)
            more = pool.submit(client.sessions.store, "kept", -stored, [f"minus {row}" for row in range(30)])
            server.start()
            assert [hit.label for hit in hits.result(60)] == [f"p{row}" for row in range(30)]
            assert more.result(60).count == 63
        assert session.recall(-stored[4]).label == "minus 4"
        redis_process.client.delete(key)
        server.restart()
        assert reason(lambda: client.sessions.recall("kept", stored)) == "RECORD_CORRUPTED", "nobody has it any more"


def test_an_ntm_memory_is_addressed_as_the_machine_does_it(clients: list[engram.Client], name: str) -> None:
    rng = np.random.default_rng(4)
    session = clients[0].open("ntm", name, durability="interval")
    session.run(rng.standard_normal((20, 9)).astype(np.float32))
    keys, strengths = rng.standard_normal((3, 10)).astype(np.float32), np.array([0.5, 2.0, 50.0], np.float32)
    weightings, reads = session.address(keys, strengths)
    memory = torch.from_numpy(session.state()["memory"])[None]
    expected = content_addressing(memory, torch.from_numpy(keys)[None], torch.from_numpy(strengths)[None])
    np.testing.assert_allclose(weightings, expected[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(reads, (expected @ memory)[0].numpy(), atol=1e-6)
    one, read = session.address(keys[1], 2.0)
    assert np.array_equal(one, weightings[1]) and np.array_equal(read, reads[1])
    assert session.seq == 20 and clients[1].sessions.get(name).epoch == 1
    assert reason(lambda: session.address(np.full(10, np.nan))) == "NON_FINITE_INPUT"
    assert reason(lambda: session.address(np.ones(9))) == "INVALID_INPUT_WIDTH"
    assert reason(lambda: session.address(keys, strengths[:2])) == "INVALID_ARGUMENT"
    assert reason(lambda: clients[0].open("dense").address(np.ones(10))) == "UNSUPPORTED_OPERATION"


@pytest.mark.parametrize("model", ["rbm", "dbn"])
def test_inputs_are_recreated(clients: list[engram.Client], models: pathlib.Path, model: str) -> None:

    x = np.random.default_rng(5).random((4, 12), np.float32)
    hidden = np.arange(12) < 5
    cell: Any = load_cell(models / model / "1")
    plain, energies = cell.recreate(torch.from_numpy(x), None, 3)
    filled, _ = cell.recreate(torch.from_numpy(x), torch.from_numpy(~hidden).expand(4, -1), 2)
    session = clients[0].open(model)
    found = session.recreate(x, sweeps=3)
    np.testing.assert_allclose(found.values, plain.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(found.energies, energies.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(session.recreate(x, hidden, sweeps=2).values, filled.detach().numpy(), atol=1e-6)
    of_model = clients[1].models.recreate(model, x[0], hidden, sweeps=2)
    assert of_model.values.shape == (12,) and (of_model.values[5:] == x[0, 5:]).all()
    assert reason(lambda: session.recreate(x * 3)) == "INVALID_ARGUMENT"
    assert reason(lambda: session.recreate(np.full(12, np.nan))) == "NON_FINITE_INPUT"
    assert reason(lambda: session.recreate(np.zeros(11))) == "INVALID_INPUT_WIDTH"
    assert reason(lambda: session.recreate(x, np.zeros(3, bool))) == "INVALID_INPUT_WIDTH"
    assert reason(lambda: clients[0].models.recreate("ntm", np.zeros(9))) == "UNSUPPORTED_OPERATION"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_patterns_are_recalled_exactly(clients: list[engram.Client], models: pathlib.Path, name: str) -> None:
    """Top-1 equal to brute force on 1,000 cues of 256 bits, half of them with flipped bits, half with unknown ones."""
    write_bundle(models, "wide", "1", Hopfield(256))
    for client in clients:
        client.models.reload()
    rng = np.random.default_rng(8)
    stored = rng.integers(0, 2, (1_000_000, 256), dtype=np.int8)
    assert clients[0].open("wide", name).store(stored).count == 1_000_000
    chosen = rng.choice(1_000_000, 1000, replace=False)
    odd = (np.arange(1000) % 2 == 1)[:, None]
    cues = stored[chosen] ^ ((rng.random((1000, 256)) < 0.2) & ~odd)
    mask = (rng.random((1000, 256)) < 0.75) & odd
    hits = clients[1].sessions.recall(name, cues, mask)
    packed = np.packbits(stored, axis=1).view(np.uint64)
    for row, (cue, hidden, hit) in enumerate(zip(cues, mask, hits, strict=True)):
        known = np.packbits(~hidden).view(np.uint64)
        distances = np.bitwise_count((packed ^ np.packbits(cue).view(np.uint64)) & known).sum(1, dtype=np.int64)
        assert int(hit.label[1:]) == distances.argmin() == chosen[row]
        assert hit.distance == 0 and (hit.pattern == stored[chosen[row]]).all()
