"""Whose time is up is told so, and nobody else: not who asks for the same step and has time left, nor who sent a later one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from engram.v1 import session_pb2, stream_pb2

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]

SHORT_S, LONG_S = 0.2, 20.0

# One commit at a time, which is waited for as long as the test takes: what comes then waits in the queue.
ONE_LINE = """
from engram_service.steps import commits

commits._LINES_MAX, commits._TIMEOUT_S = 1, 60.0
"""


@pytest.fixture
def halted(server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect) -> Iterator[Any]:
    """A client of a server whose step loop waits for Redis with a step of the session "first", handle 0."""
    server = server_with("--redis-url", redis_process.url)
    server.faults = ONE_LINE
    with server:
        raw = connect(server)
        raw.open("first", "second")
        _unary(raw, 1, LONG_S)
        redis_process.pause()
        raw.steps([0], [1])
        batches = 'engram_batches_total{model="digits-reader"}'
        while server.series()[batches] < 2:
            time.sleep(0.01)
        raw.redis = redis_process
        yield raw


def _unary(raw: Any, seq: int, timeout: float, prefill: bool = False) -> Any:
    request = session_pb2.StepRequest(
        session_id="unary", model="digits-reader", inputs=[float(seq)] * 8, seq=seq, prefill=prefill
    )
    return raw.unary("Step", request, session_pb2.StepResponse, timeout)


def _code(call: Future[Any]) -> grpc.StatusCode:
    error = call.exception(LONG_S)
    assert isinstance(error, grpc.RpcError), error
    return error.code()  # type: ignore[no-any-return, attr-defined]


@pytest.mark.parametrize("committing", [False, True])
def test_a_call_for_the_same_step_has_the_time_that_it_gave(halted: Any, committing: bool) -> None:
    """Its step waits in the queue, or for its commit, when the time of the call that was first is up."""
    with ThreadPoolExecutor() as pool:
        if committing:  # the second of an engine thread's commits may stand behind the first; so it is computed
            halted.redis.go_on()
            halted.next("outputs")
            halted.redis.pause()
        hasty = pool.submit(_unary, halted, 2, SHORT_S)
        time.sleep(SHORT_S / 2)
        patient = [pool.submit(_unary, halted, 2, LONG_S, prefill) for prefill in (False, True)]
        assert _code(hasty) is grpc.StatusCode.DEADLINE_EXCEEDED
        time.sleep(SHORT_S)
        assert not any(call.done() for call in patient)
        halted.redis.go_on()
        assert [call.result(LONG_S).seq for call in patient] == [2, 2]
        assert [len(call.result().outputs) for call in patient] == [10, 0]


def test_a_call_for_a_later_step_is_not_told_that_its_time_is_up(halted: Any) -> None:
    with ThreadPoolExecutor() as pool:
        hasty = pool.submit(_unary, halted, 2, SHORT_S)
        time.sleep(SHORT_S / 2)
        patient = pool.submit(_unary, halted, 3, LONG_S)
        assert _code(hasty) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert _code(patient) is grpc.StatusCode.FAILED_PRECONDITION
        assert "the next step of this session is 2" in str(patient.exception())
        halted.redis.go_on()
        assert [_unary(halted, seq, LONG_S).seq for seq in (2, 3)] == [2, 3]


def test_a_repeated_row_has_the_time_that_its_frame_gave(halted: Any) -> None:
    halted.steps([1], [1], timeout_ms=int(SHORT_S * 1000))
    halted.steps([1], [1], timeout_ms=int(LONG_S * 1000))
    time.sleep(2 * SHORT_S)
    halted.redis.go_on()
    answered = [halted.next("outputs") for _ in range(3)]
    assert [np.frombuffer(frame.handles, np.uint32).tolist() for frame in answered] == [[0], [1], [1]]
    assert answered[1].outputs == answered[2].outputs


def test_rows_behind_one_whose_time_is_up_are_told_the_gap(halted: Any) -> None:
    halted.steps([1], [1], timeout_ms=int(SHORT_S * 1000))
    halted.steps([1, 1], [2, 3], timeout_ms=int(LONG_S * 1000))
    gap = ("SEQ_GAP", {"next_seq": "1", "applied": "no"})
    assert sorted(_refused(halted, 3)) == [(1, "DEADLINE_EXCEEDED", {"applied": "no"}), (2, *gap), (3, *gap)]


def test_who_waits_for_a_step_that_is_dropped_is_told(halted: Any) -> None:
    """A close drops what waits of its session, and nobody waits for that until the time is up."""
    for _ in range(2):
        halted.steps([1], [1], timeout_ms=int(LONG_S * 1000))
    halted.send(close=stream_pb2.CloseFrame(request_id=2, handles=np.array([1], np.uint32).tobytes()))
    assert _refused(halted, 2) == [(1, "QUEUE_FULL", {"applied": "no"})] * 2
    halted.redis.go_on()
    assert not halted.next("closed").errors


def _refused(raw: Any, count: int) -> list[tuple[int, str, dict[str, str]]]:
    """Seq, reason and metadata of so many rows."""
    found: list[tuple[int, str, dict[str, str]]] = []
    while len(found) < count:
        frame = raw.next("errors")
        seqs, indexes = np.frombuffer(frame.seqs, np.uint64), np.frombuffer(frame.error_indexes, np.uint32)
        for seq, index in zip(seqs.tolist(), indexes.tolist(), strict=True):
            found.append((seq, frame.errors[index].reason, dict(frame.errors[index].metadata)))
    return found
