"""A Redis that is not what it should be, under a real server: older than it was, damaged in one session, unsafe, slow in one call."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import copies
import numpy as np
import pytest
from wires import Wire

from engram.v1 import session_pb2, stream_pb2
from engram_service.store.keys import meta_key, session_tag

Raw = Any
Connect = Callable[[Any], Raw]
ServerWith = Callable[..., Any]

INPUTS = np.random.default_rng(6).random((20, 8), dtype=np.float32)


def _handles(opened: Any) -> list[int]:
    assert not opened.errors, opened.errors
    return [int(handle) for handle in np.frombuffer(opened.handles, np.uint32)]


def _step(raw: Raw, handle: int, seq: int) -> bytes:
    acked = np.array([seq - 1], np.uint64).tobytes()
    return bytes(raw.step(handle, seq, INPUTS[seq - 1], acknowledged_seqs=acked, timeout_ms=20_000))


def test_sessions_go_on_where_they_were_when_redis_comes_back_older(
    server_with: ServerWith, redis_process: Any, connect: Connect, tmp_path: pathlib.Path
) -> None:
    """Those that were stepped since, those that were made since, one that was opened since and not stepped, and one of
    durability interval that nobody steps: all are there again, for others too. One that had left the arena is told its place."""
    with server_with("--redis-url", redis_process.url, "--resident-idle-s", "3") as server:
        raw, other = connect(server), connect(server)
        old, idle, gone = _handles(raw.open("old", "idle", "gone"))
        expected = [_step(raw, old, seq) for seq in range(1, 6)]
        assert _step(raw, idle, 1) == _step(raw, gone, 1) == expected[0]
        copies.take(redis_process, tmp_path / "copy")
        assert _step(raw, gone, 2) == expected[1]
        deadline = time.monotonic() + 20
        while server.series()['engram_sessions{residency="stored"}'] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert _step(raw, idle, 2) == expected[1]
        new, opened = _handles(raw.open("new", "opened"))
        assert _step(raw, new, 1) == expected[0]
        copies.put_back(redis_process, tmp_path / "copy")
        assert _step(raw, new, 2) == expected[1]
        deadline = time.monotonic() + 10
        while not server.series()["engram_redis_losses"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        seqs = np.frombuffer(other.open("idle", "new", "opened").seqs, np.uint64).tolist()
        assert seqs == [2, 2, 0]
        raw.steps([gone], [3], INPUTS[2][None], timeout_ms=20_000)
        assert raw.refusal() == ("TAKEN_OVER", [3]), "it is not gone on with from step 1 under another number"
        raw.send(attach=stream_pb2.AttachFrame(request_id=2, model="digits-reader", session_ids=["gone"], client_id=5))
        attached = raw.next("opened")
        assert np.frombuffer(attached.seqs, np.uint64).tolist() == [1], "and learns that by asking"
        (again,) = _handles(attached)
        assert _step(raw, again, 2) == expected[1]
        assert opened >= 0 and server.series()["engram_redis_losses"] >= 1


def test_a_damaged_session_is_refused_alone_listed_not_at_all_and_can_be_closed(
    server_with: ServerWith, redis_process: Any, connect: Connect
) -> None:
    with server_with("--redis-url", redis_process.url) as server:
        raw = connect(server)
        raw.open("sound", "hash", "field", "record")
        raw.close()
        client = redis_process.client
        keys = {name: meta_key(session_tag(name)) for name in ("hash", "field", "record")}
        client.delete(keys["hash"])
        client.rpush(keys["hash"], "x")
        client.hset(keys["field"], "e", "one")
        record = keys["record"] + b":" + bytes(client.hget(keys["record"], "t"))
        client.delete(record)
        client.hset(record, "x", "y")
        again = connect(server)
        listed = again.unary("ListSessions", session_pb2.ListSessionsRequest(), session_pb2.ListSessionsResponse)
        assert [session.id for session in listed.sessions] == ["sound"]
        opened = again.open("new-1", "hash", "new-2", "field", "sound", "record")
        assert [(row.row, row.error.reason) for row in opened.errors] == [(n, "RECORD_CORRUPTED") for n in (1, 3, 5)]
        for name in keys:
            closed = session_pb2.CloseSessionRequest(session_id=name)
            again.unary("CloseSession", closed, session_pb2.CloseSessionResponse)
        assert len(_handles(again.open(*keys))) == 3


def test_a_redis_that_is_not_safe_is_told_by_a_metric_and_refused_where_that_is_wanted(
    server_with: ServerWith, start_redis: Any
) -> None:
    process = start_redis("--appendonly", "no", "--maxmemory-policy", "allkeys-lru")
    with server_with("--redis-url", process.url) as server:
        series = server.series()
        unsafe = {reason: series[f'engram_redis_unsafe{{reason="{reason}"}}'] for reason in _REASONS}
        assert unsafe == {"persistence": 1, "eviction": 1, "replica": 0, "disk": 0}
        assert "allkeys-lru" in server.tail() and "appendonly is off" in server.log.read_text()
    with (
        pytest.raises(AssertionError, match=r"require_safe_redis"),
        server_with("--redis-url", process.url, "--require-safe-redis", "true"),
    ):
        pass


_REASONS = ("persistence", "eviction", "replica", "disk")


@pytest.mark.single_redis("the wire is before one Redis")
def test_an_interval_commit_does_not_wait_for_the_renewal_of_idle_sessions(
    server_with: ServerWith, start_redis: Any, connect: Connect, tmp_path: pathlib.Path
) -> None:
    wire = Wire(tmp_path / "w.sock", start_redis().socket)
    try:
        with server_with("--redis-url", wire.url) as server:
            raw = connect(server)
            (handle,) = _handles(raw.open("flushed", durability=stream_pb2.DURABILITY_INTERVAL))
            wire.hold(b"PEXPIRE\r\n$48\r\n")  # of a record: a renewal
            raw.open("idle", ttl_ms=2000)
            assert wire.held.wait(10)
            began = time.monotonic()
            _step(raw, handle, 1)
            durable = raw.next("durable")
            assert np.frombuffer(durable.durable_seqs, np.uint64).tolist() == [1]
            assert time.monotonic() - began < 3.0, "the renewal is given up after five seconds"
    finally:
        wire.close()
