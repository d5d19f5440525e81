"""Redis absent, paused, killed, emptied, full, or holding damaged records: nothing acknowledged is lost, reasons are given."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engram.v1 import session_pb2, stream_pb2
from engram_service.store.keys import meta_key, session_tag

ServerProcess = Any
Raw = Any
RedisProcess = Any
Connect = Callable[[ServerProcess], Raw]

INPUTS = np.random.default_rng(5).random((60, 8), dtype=np.float32)


@pytest.fixture
def server(server_with: Callable[..., ServerProcess], redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """A server on the test's own Redis."""
    with server_with("--redis-url", redis_process.url) as process:
        yield process


def handle_of(raw: Raw, session_id: str = "", **fields: Any) -> int:
    response = raw.open(session_id, **fields)
    assert not response.errors, response.errors
    return int(np.frombuffer(response.handles, np.uint32)[0])


def reference(raw: Raw, steps: int) -> list[bytes]:
    """What an undisturbed session answers."""
    handle = handle_of(raw)
    return [_step(raw, handle, seq) for seq in range(1, steps + 1)]


def _step(raw: Raw, handle: int, seq: int, **fields: Any) -> bytes:
    acked = np.array([seq - 1], np.uint64).tobytes()
    return bytes(raw.step(handle, seq, INPUTS[seq - 1], acknowledged_seqs=acked, **fields))


def test_a_paused_redis_is_waited_for(server: ServerProcess, redis_process: RedisProcess, connect: Connect) -> None:
    raw = connect(server)
    expected = reference(raw, 4)
    handle = handle_of(raw, "paused")
    assert _step(raw, handle, 1) == expected[0]
    redis_process.pause()
    raw.steps([handle], [2], INPUTS[1][None], timeout_ms=30_000)
    time.sleep(1.0)
    redis_process.go_on()
    assert bytes(raw.next("outputs").outputs) == expected[1]
    assert _step(raw, handle, 3) == expected[2]


@pytest.mark.promise(2)
def test_a_paused_redis_beyond_the_deadline_is_unavailable_and_then_found_again(
    server: ServerProcess, redis_process: RedisProcess, connect: Connect
) -> None:
    raw = connect(server)
    expected = reference(raw, 4)
    handle = handle_of(raw, "paused-long")
    assert _step(raw, handle, 1) == expected[0]
    redis_process.pause()
    time.sleep(2.5)  # long enough for the server to know
    raw.steps([handle], [2], INPUTS[1][None], timeout_ms=500)
    assert raw.refusal() == ("STORE_UNAVAILABLE", [2])
    redis_process.go_on()
    assert _step(raw, handle, 2) == expected[1], (
        "the step that had been computed is answered when it is asked for again"
    )
    assert _step(raw, handle, 3) == expected[2]


def test_an_interval_commit_that_ends_late_says_nothing_of_the_session_that_has_the_row_by_then(
    server_with: Callable[..., ServerProcess], start_redis: Any, free_port: Any, connect: Connect
) -> None:
    """Sessions are closed while their last commit waits for a replica that hangs; others are opened as soon as they are closed."""
    port, count, interval = str(free_port()), 48, stream_pb2.DURABILITY_INTERVAL
    primary = start_redis("--port", port, "--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", port)
    flags = ("--redis-url", primary.url, "--redis-ack", "replicated", "--redis-ack-timeout-ms", "300")
    with server_with(*flags) as server:
        raw = connect(server)
        first = handle_of(raw, "first")
        handles = np.frombuffer(
            raw.open(*(f"before-{n}" for n in range(count)), durability=interval).handles, np.uint32
        )
        _step(raw, first, 1)
        replica.pause()
        raw.steps([first], [2], INPUTS[1][None], timeout_ms=800)
        assert raw.refusal()[0] == "STORE_UNAVAILABLE", "the server knows that commits are not acknowledged"
        _step_all(raw, handles, [1, 2, 3])
        raw.send(close=stream_pb2.CloseFrame(request_id=2, handles=handles.tobytes()))
        time.sleep(0.5)  # their commits are on their way
        replica.go_on()
        assert not raw.next("closed").errors
        handles = np.frombuffer(raw.open(*(f"after-{n}" for n in range(count)), durability=interval).handles, np.uint32)
        _step_all(raw, handles, [1])
        told: dict[int, int] = {}
        while len(told) < count:
            frame = raw.next()
            assert frame.WhichOneof("frame") == "durable", frame
            seqs = np.frombuffer(frame.durable.durable_seqs, np.uint64).tolist()
            told |= zip(np.frombuffer(frame.durable.handles, np.uint32).tolist(), seqs, strict=True)
        assert told == dict.fromkeys(handles.tolist(), 1)


def _step_all(raw: Raw, handles: NDArray[Any], seqs: Iterable[int]) -> None:
    """Steps of interval sessions, which are answered whatever Redis does."""
    for seq in seqs:
        rows = np.repeat(INPUTS[seq - 1][None], len(handles), 0)
        raw.steps(handles.tolist(), [seq] * len(handles), rows)
        left = len(handles)
        while left:
            frame = raw.next()
            assert frame.WhichOneof("frame") in ("outputs", "durable"), frame
            left -= len(frame.outputs.seqs) // 8


@pytest.mark.promise(2)
@pytest.mark.parametrize("emptied", [False, True], ids=["restarted", "restarted empty"])
def test_a_killed_redis_loses_nothing(
    server: ServerProcess, redis_process: RedisProcess, connect: Connect, emptied: bool
) -> None:
    raw, other = connect(server), connect(server)
    expected = reference(raw, 40)
    handle, idle = handle_of(raw, "killed"), handle_of(raw, "idle", durability=2)
    assert _step(raw, idle, 1) == expected[0]
    answers: list[bytes] = []

    def drive() -> None:
        for seq in range(1, 41):
            answers.append(_step(raw, handle, seq, timeout_ms=20_000))
            time.sleep(0.02)

    driver = threading.Thread(target=drive)
    driver.start()
    time.sleep(0.3)
    redis_process.lose_data() if emptied else redis_process.kill()
    time.sleep(0.3)
    redis_process.start()
    driver.join(30)
    assert answers == expected
    assert other.get("killed").seq == 40
    # A session that only sat in the arena is there again too, and can be taken over from the record.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        opened = other.open("idle")
        if not opened.errors and np.frombuffer(opened.seqs, np.uint64)[0] == 1:
            break
        time.sleep(0.1)
    assert np.frombuffer(opened.seqs, np.uint64).tolist() == [1]
    taken = int(np.frombuffer(opened.handles, np.uint32)[0])
    assert _step(other, taken, 2) == expected[1]


@pytest.mark.promise(2)
def test_an_open_right_after_redis_came_back_empty_carries_on(
    server: ServerProcess, redis_process: RedisProcess, connect: Connect
) -> None:
    raw = connect(server)
    expected = reference(raw, 3)
    handle = handle_of(raw, "carried")
    assert _step(raw, handle, 1) == expected[0]
    redis_process.lose_data()
    redis_process.start()
    again = connect(server)
    response = again.open("carried")
    assert np.frombuffer(response.seqs, np.uint64).tolist() == [1], "a living session must not start over"
    taken = int(np.frombuffer(response.handles, np.uint32)[0])
    assert _step(again, taken, 2) == expected[1]


def test_a_session_that_was_opened_and_not_stepped_is_written_back_too(
    server: ServerProcess, redis_process: RedisProcess, connect: Connect
) -> None:
    raw = connect(server)
    expected = reference(raw, 1)
    handle_of(raw, "new")
    redis_process.lose_data()
    redis_process.start()
    raw.send(attach=stream_pb2.AttachFrame(request_id=1, model="digits-reader", session_ids=["new"], client_id=5))
    opened = raw.next("opened")
    assert not opened.errors, opened.errors
    assert _step(raw, int(np.frombuffer(opened.handles, np.uint32)[0]), 1) == expected[0]


def test_a_full_redis_says_so_and_goes_on_when_there_is_room(
    server: ServerProcess, redis_process: RedisProcess, connect: Connect
) -> None:
    raw = connect(server)
    expected = reference(raw, 3)
    handle = handle_of(raw, "full")
    assert _step(raw, handle, 1) == expected[0]
    client = redis_process.client
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", "1")
    raw.steps([handle], [2], INPUTS[1][None], timeout_ms=1500)
    assert raw.refusal() == ("STORE_OUT_OF_MEMORY", [2])
    client.config_set("maxmemory", "0")
    assert _step(raw, handle, 2, timeout_ms=20_000) == expected[1]


def test_redis_absent_at_start(
    server_with: Callable[..., ServerProcess], redis_process: RedisProcess, connect: Connect
) -> None:
    redis_process.kill()
    with server_with("--redis-url", redis_process.url, "--step-timeout-s", "1") as server:
        raw = connect(server)
        response = raw.open("early")
        assert [row.error.reason for row in response.errors] == ["STORE_UNAVAILABLE"]
        redis_process.start()
        deadline = time.monotonic() + 10
        while raw.open("early").errors:
            assert time.monotonic() < deadline, "recovery needs no restart"


def test_steps_wait_for_a_replica_that_is_gone_and_go_on_when_it_is_back(
    server_with: Callable[..., ServerProcess], start_redis: Any, free_port: Any, connect: Connect
) -> None:
    port = str(free_port())
    primary = start_redis("--port", port, "--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", port)
    flags = ("--redis-url", primary.url, "--redis-ack", "replicated", "--redis-ack-timeout-ms", "200")
    with server_with(*flags) as server:
        raw = connect(server)
        expected = reference(raw, 4)
        handle = handle_of(raw, "copied")
        assert _step(raw, handle, 1) == expected[0]
        replica.kill()
        raw.steps([handle], [2], INPUTS[1][None], timeout_ms=1000)
        assert raw.refusal() == ("STORE_UNAVAILABLE", [2])
        raw.steps([handle], [2], INPUTS[1][None], timeout_ms=20_000)
        replica.start()
        assert bytes(raw.next("outputs").outputs) == expected[1], "it waited, and went on by itself"
        assert _step(raw, handle, 3) == expected[2]


@pytest.mark.parametrize("damage", ["flipped", "short", "other"])
def test_a_damaged_record_is_refused_and_can_be_closed(
    server: ServerProcess, redis_process: RedisProcess, connect: Connect, damage: str
) -> None:
    raw = connect(server)
    handle = handle_of(raw, "victim")
    _step(raw, handle, 1)
    raw.close()
    client = redis_process.client
    key = meta_key(session_tag("victim"))
    record_name = key + b":" + bytes(client.hget(key, "t") or b"")
    record = bytearray(client.get(record_name) or b"")
    if damage == "flipped":
        record[200] ^= 4
    elif damage == "short":
        record = record[: len(record) // 2 // 8 * 8]
    else:
        client.hset(key, "f", "0" * 32)
    client.set(record_name, bytes(record), keepttl=True)
    again = connect(server)
    response = again.open("victim", "healthy")
    assert [(row.row, row.error.reason) for row in response.errors] == [
        (0, "FINGERPRINT_MISMATCH" if damage == "other" else "RECORD_CORRUPTED")
    ]
    healthy = int(np.frombuffer(response.handles, np.uint32)[1])
    assert len(_step(again, healthy, 1)) == 40
    again.unary("CloseSession", session_pb2.CloseSessionRequest(session_id="victim"), session_pb2.CloseSessionResponse)
    assert handle_of(again, "victim") >= 0


def test_a_closed_session_stays_closed(server: ServerProcess, connect: Connect) -> None:
    raw, other = connect(server), connect(server)
    handle = handle_of(raw, "closing")
    _step(raw, handle, 1)
    other.unary("CloseSession", session_pb2.CloseSessionRequest(session_id="closing"), session_pb2.CloseSessionResponse)
    assert raw.next("event").type == 2  # TYPE_CLOSED
    raw.steps([handle], [2], INPUTS[1][None])
    assert raw.refusal()[0] == "SESSION_CLOSED"


@pytest.mark.promise(6)
def test_a_full_queue_refuses_those_with_more_than_their_share(
    server_with: Callable[..., ServerProcess], redis_process: RedisProcess, connect: Connect
) -> None:
    """While Redis says nothing, what was admitted stays in flight."""
    with server_with("--queue-rows-max", "60", "--redis-url", redis_process.url) as server:
        greedy, small = connect(server), connect(server)
        greedy.open(*(f"greedy-{number}" for number in range(60)))
        small.open("small")
        redis_process.pause()
        greedy.steps(list(range(60)), [1] * 60)
        greedy.steps([0], [2])
        errors = greedy.next("errors")
        assert [detail.reason for detail in errors.errors] == ["QUEUE_FULL"] and errors.errors[0].retry_after_ms > 0
        small.steps([0], [1])
        redis_process.go_on()
        small.next("outputs")
        answered = 0
        while answered < 60:
            answered += len(greedy.next("outputs").seqs) // 8
        assert greedy.step(0, 2), "what was refused is taken when there is room again"
