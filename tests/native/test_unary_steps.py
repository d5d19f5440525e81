"""Unary steps of sessions that the wire was told of are rows; all else about them is an event."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from wire_loop import NONE, WAIT_S, Loop, channel, code_of, native

from engram.v1 import session_pb2

CALL = 1 << 31
SIZE = 4


def model(name: str = "m", floats: bool = True) -> Any:
    return native.StepModel(name, "2", takes=(4 * SIZE, floats), gives=(4 * SIZE, floats), shape=[1, 2, 2])


def step(made: grpc.Channel, **fields: Any) -> Any:
    """A call under way."""
    more = {name: fields.pop(name) for name in ("timeout", "metadata") if name in fields}
    call = made.unary_unary(
        "/engram.v1.EngramService/Step", session_pb2.StepRequest.SerializeToString, session_pb2.StepResponse.FromString
    )
    asked = {"session_id": "s", "model": "m", "inputs": [1.0, 2.0, 3.0, 4.0], **fields}
    return call.future(session_pb2.StepRequest(**asked), **{"timeout": WAIT_S, **more})


def answer(loop: Loop, row: tuple[int, ...], seq: int, outputs: Any = (5, 6, 7, 8)) -> None:
    columns = np.array([row[0]], np.uint32), np.array([row[1]], np.uint32), np.array([seq], np.uint64)
    loop.wire.answer(*columns, np.array(outputs, np.float32).view(np.uint8), np.empty(0, np.uint64))


def test_a_step_of_a_known_session_is_a_row_and_its_answer_is_encoded(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False, step_s=7.0)
    loop.wire.know("", "s", 77, model())
    with channel(loop) as made:
        for seq, fields in [
            (9, {}), (0, {}), (9, {"raw": True}), (9, {"version": "2"}), (9, {"model": ""}), (9, {"prefill": True}),
            (9, {"inputs": [], "raw_inputs": np.arange(1, 5, dtype=np.float32).tobytes()}),
        ]:  # fmt: skip
            call = step(made, seq=seq, **fields)
            row = loop.until(lambda: loop.rows and loop.rows.pop())
            assert row[0] > CALL
            assert row[1:5] == (77, seq, seq - 1 if seq else NONE, 0x80 | ("prefill" in fields))
            assert 0 < row[5] <= 7000 and row[6] == 4 * SIZE, "a step has so long, whatever its caller says"
            answer(loop, row, seq or 300, () if "prefill" in fields else (5, 6, 7, 8))
            wanted = session_pb2.StepResponse(seq=seq or 300)
            if "prefill" not in fields:
                wanted.shape.extend([1, 2, 2])
            if "raw" in fields:
                wanted.raw_outputs = np.arange(5, 9, dtype=np.float32).tobytes()
            elif "prefill" not in fields:
                wanted.outputs.extend([5, 6, 7, 8])
            assert call.result() == wanted
    assert loop.inputs == np.arange(1, 5, dtype=np.float32).tobytes() * 7
    assert loop.events == []
    counters = loop.wire.counters()
    assert (counters["steps"], counters["step_rows"], counters["step_events"], counters["answers"]) == (7, 7, 0, 7)


@pytest.mark.parametrize(
    "fields",
    [
        {"session_id": "t"}, {"session_id": ""}, {"model": "n"}, {"version": "1"}, {"model": "", "version": "2"},
        {"inputs": [1.0] * 3}, {"inputs": [1.0] * 8}, {"inputs": []}, {"raw_inputs": bytes(16)}, {"generate": 1},
        {"constants": [{"name": "c"}]}, {"session_id": "whole numbers"}, {"session_id": "forgotten"},
    ],
)  # fmt: skip
def test_what_is_unusual_about_a_step_is_an_event(loops: Callable[..., Loop], fields: dict[str, Any]) -> None:
    loop = loops(answers=False)
    loop.wire.know("", "s", 77, model())
    loop.wire.know("a", "t", 78, model())
    loop.wire.know("", "whole numbers", 79, model(floats=False))
    loop.wire.know("", "forgotten", 80, model())
    loop.wire.forget(80)
    with channel(loop) as made:
        call = step(made, **fields)
        event = loop.until(lambda: loop.events and loop.events[0])
        assert (event.kind, loop.rows) == ("step", [])
        assert session_pb2.StepRequest.FromString(event.data).session_id == fields.get("session_id", "s")
        loop.wire.respond(event.call, b"")
        call.result()


def test_a_handle_that_is_void_is_forgotten_and_the_next_one_is_not(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    loop.wire.know("", "s", 1, model())
    loop.wire.know("", "s", 2, model())
    loop.wire.forget(1)
    with channel(loop) as made:
        call = step(made, seq=1)
        row = loop.until(lambda: loop.rows and loop.rows.pop())
        assert row[1] == 2
        answer(loop, row, 1)
        assert call.result().seq == 1
        loop.wire.forget(2)
        loop.wire.forget(3)
        call = step(made, seq=2)
        assert loop.until(lambda: loop.kinds() == ["step"]) and not call.done()


def test_a_row_may_be_refused_or_become_an_event_after_all(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    loop.wire.know("", "s", 1, model())
    with channel(loop) as made:
        call = step(made, seq=1)
        row = loop.until(lambda: loop.rows and loop.rows.pop())
        loop.wire.finish(row[0], 9, "no", b"\x08\x09\x12\x02no")
        assert (call.code(), call.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "no")
        assert dict(call.trailing_metadata())["grpc-status-details-bin"] == b"\x08\x09\x12\x02no"
        answer(loop, row, 1)  # comes too late
        for seq, no, yes in [(5, (False, True), (True, False)), (0, (True, False), (False, True))]:
            call = step(made, seq=seq, timeout=5.0)
            row = loop.until(lambda: loop.rows and loop.rows.pop())
            assert not loop.wire.again(row[0], *no)
            time.sleep(0.3)
            assert loop.wire.again(row[0], *yes)
            event = loop.until(lambda: loop.events and loop.events.pop())
            assert (event.kind, event.call) == ("step", row[0] - CALL)
            assert event.timeout_ms < 4800, "the time that has passed is not given twice"
            answer(loop, row, 3)  # is nobody's by now
            assert not call.done()
            loop.wire.respond(event.call, session_pb2.StepResponse(seq=4).SerializeToString())
            assert call.result().seq == 4
            assert loop.until(lambda: loop.kinds() == ["end"])
            loop.events.clear()
        assert loop.wire.again(CALL | 99, True, True), "nobody waits for it"


def test_a_caller_that_has_gone_is_answered_no_more(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    loop.wire.know("", "s", 1, model())
    with channel(loop) as made:
        late = step(made, seq=1, timeout=0.2)
        assert code_of(late.result)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        cancelled = step(made, seq=1)
        loop.until(lambda: len(loop.rows) == 2)
        cancelled.cancel()
        loop.until(lambda: loop.wire.counters()["calls"] == 0)
        again = step(made, seq=1)
        loop.until(lambda: len(loop.rows) == 3)
        for row in loop.rows:
            loop.wire.again(row[0], True, True) if row != loop.rows[-1] else None
            answer(loop, row, 1)
        assert again.result().seq == 1
        assert len({row[0] for row in loop.rows}) == 3
    assert loop.kinds() == [], "of calls that are rows Python is told nothing more"
    assert loop.wire.counters()["answers"] == 1


def test_steps_are_of_their_callers_tenant_while_the_token_is_good(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    names = ["ann", "abe", "bea", "eve", "old"]
    digests = {hashlib.sha256(name.encode()).digest(): number for number, name in enumerate(names)}
    loop.wire.set_tokens(digests)
    for tenant, handle in [("a", 1), ("b", 2), ("", 3)]:
        loop.wire.know(tenant, "s", handle, model())
    far = time.time() + 3600

    def handle_of(made: grpc.Channel, name: str) -> int | None:
        """None: its step was an event."""
        loop.rows.clear()
        loop.events.clear()
        call = step(made, seq=1, metadata=[("authorization", f"Bearer {name}")])
        loop.until(lambda: loop.rows or any(event.kind == "step" for event in loop.events))
        call.cancel()
        return loop.rows[0][1] if loop.rows else None

    with channel(loop) as made:
        assert [handle_of(made, name) for name in names] == [None] * 5, "of whom nothing is known"
        callers = {0: ("a", far), 1: ("a", far), 2: ("b", far), 4: ("a", time.time() - 1)}
        loop.wire.set_steppers(callers)
        assert [handle_of(made, name) for name in names] == [1, 1, 2, None, None]
        loop.wire.set_steppers({0: ("b", far), 2: ("none", far)})
        assert [handle_of(made, name) for name in names] == [2, None, None, None, None]
        loop.wire.set_steppers(None)
        assert [handle_of(made, name) for name in names] == [None] * 5, "whose tenant nobody said"
        loop.wire.set_steppers({0: ("a", far)})
        call = step(made, seq=1, metadata=[("authorization", "Bearer ann")])
        loop.until(lambda: loop.rows)
        loop.wire.set_tokens({})
        assert code_of(call.result)[0] is grpc.StatusCode.UNAUTHENTICATED
