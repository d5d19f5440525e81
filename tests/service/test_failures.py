"""Parts of a server that fail at the worst moment: what waited behind them is answered, and the sessions can be used on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram.v1 import stream_pb2
from engram_service.places import NATIVE
from engram_service.store.keys import session_tag

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]

FAILING_MODEL = """
import time
import numpy as np
from engram_service.runtimes.onnx_graphs import OnnxGraphs

real = OnnxGraphs.step

def step(self, slots, inputs, feedback):
    if (np.ascontiguousarray(inputs).view(np.float32) == 99).any():
        time.sleep(0.5)  # so that other frames come meanwhile
        raise RuntimeError("the cell fails on this input")
    return real(self, slots, inputs, feedback)

OnnxGraphs.step = step
"""
PICKY_MODEL = FAILING_MODEL.replace("time.sleep(0.5)", "time.sleep(0)")
SLOW_LOSS = """
import asyncio
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.residency import Residency

real = Residency._read

async def read(self, *arguments):
    found = await real(self, *arguments)
    await asyncio.sleep(0.05)  # the step loop would take whatever is free meanwhile
    return found

Residency._read = read
"""
FAILING_PACK = """
from engram_service.steps.commits import Commits

real, calls = Commits._source, []

def source(self, *arguments):
    calls.append(1)
    if len(calls) in (2, 4):
        raise MemoryError
    return real(self, *arguments)

Commits._source = source
"""
FAILING_JOB = """
from engram_service.steps import commits
from engram_service.store.lines import NativeLine

size, write, calls = commits.nbytes_of, NativeLine.write, []

def begin(self, *arguments):
    calls.append(1)
    if len(calls) != 2:
        return write(self, *arguments)
    return write(self, *arguments[:-1], 0.0)  # True where Redis was quicker: then there is nothing to go on with

def nbytes_of(*arguments):
    if len(calls) == 2:
        raise MemoryError
    return size(*arguments)

NativeLine.write, commits.nbytes_of = begin, nbytes_of
"""
NO_PACK = """
from engram_service.steps import commits
from engram_service.store.lines import NativeLine

write = NativeLine.write

def begin(self, *arguments):
    return write(self, *arguments[:-1], 0.0)

def pack_records(*arguments):
    raise AssertionError("records that were sent are put together once more")

NativeLine.write, commits.pack_records = begin, pack_records
"""
FAILING_LOOK = """
from engram_service.store import Store, StoreUnavailableError

real, calls = Store.diagnose, []

def diagnose(self, tags, tokens):
    calls.append(1)
    if len(calls) == 1:
        raise StoreUnavailableError("Redis went away just now")
    if len(calls) == 2:
        raise ValueError("nobody has foreseen this")
    return real(self, tags, tokens)

Store.diagnose = diagnose
"""


def answers(raw: Any, count: int) -> list[tuple[int, str]]:
    """Seq, and reason or "output", of so many answers, in the order of their seqs."""
    found: list[tuple[int, str]] = []
    while len(found) < count:
        response = raw.next()
        kind = response.WhichOneof("frame")
        if kind in ("outputs", "errors"):
            frame = getattr(response, kind)
            said = "output" if kind == "outputs" else f"{frame.errors[0].reason} {frame.errors[0].metadata['applied']}"
            found += [(seq, said) for seq in np.frombuffer(frame.seqs, np.uint64).tolist()]
    return sorted(found)


def test_steps_that_come_while_one_fails_in_the_model_are_refused_and_may_be_sent_again(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with()
    server.faults = FAILING_MODEL
    with server:
        raw = connect(server)
        handles = np.frombuffer(raw.open("one", "two").handles, np.uint32).tolist()
        first = raw.step(handles[1], 1)
        raw.steps(handles[:1], [1], np.full((1, 8), 99, np.float32))
        time.sleep(0.1)
        for seq in (2, 3, 3):  # they are let in when the failure has been told
            raw.steps(handles[:1], [seq])
        assert answers(raw, 4) == [(1, "INTERNAL no"), *((seq, "SEQ_GAP no") for seq in (2, 3, 3))]
        assert raw.step(handles[0], 1) == first, "nothing was applied"
        assert server.series()["engram_rows_in_flight"] == 0


def test_steps_that_wait_behind_one_that_fails_in_the_model_are_refused_and_may_be_sent_again(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with("--batch-run-max", "2")
    server.faults = FAILING_MODEL
    with server:
        raw = connect(server)
        handles = np.frombuffer(raw.open("one", "two").handles, np.uint32).tolist()
        first = raw.step(handles[1], 1)
        for count in (2, 5):  # all in the batch that fails; all but two wait for the next one
            raw.steps(handles[:1] * count, list(range(1, count + 1)), np.full((count, 8), 99, np.float32))
            assert answers(raw, count) == [(seq, "INTERNAL no") for seq in range(1, count + 1)]
        raw.steps(handles[1:], [2], np.full((1, 8), 99, np.float32))
        time.sleep(0.1)  # what comes now is let in at once
        raw.steps(handles[:1] * 5, [1, 2, 3, 4, 5], np.full((5, 8), 99, np.float32))
        raw.steps(handles[:1], [4])  # a repeat of what waits
        expected = [(seq, "INTERNAL no") for seq in (1, 2, 2, 3, 4, 4, 5)]
        if server.wire() == "python":  # whose loop reads no frame while it is in the model: the repeat comes afterwards
            expected[5] = (4, "SEQ_GAP no")
        assert answers(raw, 7) == expected
        assert raw.step(handles[0], 1) == first, "nothing was applied"
        assert server.series()["engram_rows_in_flight"] == 0


def test_a_repeat_that_comes_with_its_step_is_answered_as_one(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with()
    server.faults = FAILING_MODEL
    with server:
        raw = connect(server)
        handles = np.frombuffer(raw.open("one", "two").handles, np.uint32).tolist()
        raw.steps(handles[1:], [1], np.full((1, 8), 99, np.float32))
        time.sleep(0.1)  # what comes now is let in at once
        for seqs in ([1], [2], [2], [1], [3], [5], [4], [5, 6]):
            raw.steps(handles[:1] * len(seqs), seqs)
        expected = [(seq, "output") for seq in (1, 1, 2, 2, 3, 4, 5, 6)] + [(1, "INTERNAL no"), (5, "SEQ_GAP no")]
        assert answers(raw, 10) == sorted(expected)
        assert server.series()["engram_rows_in_flight"] == 0


@pytest.mark.promise(11)
def test_whoever_shares_a_batch_with_a_step_that_fails_does_not_feel_it(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with()
    server.faults = PICKY_MODEL
    with server:
        raw = connect(server)
        names = [f"session-{number}" for number in range(12)]
        both = []
        for kind in (stream_pb2.DURABILITY_STEP, stream_pb2.DURABILITY_INTERVAL):
            opened = raw.open(*(f"{name}-{kind}" for name in names), durability=kind)
            both += np.frombuffer(opened.handles, np.uint32).tolist()
        bad = [both[place] for place in (0, 5, 6, 20)]
        inputs = np.zeros((24, 8), np.float32)
        inputs[[0, 5, 6, 20]] = 99
        raw.steps(both, [1] * 24, inputs)
        told = outcomes(raw, 24)
        assert {handle for (handle, _), said in told.items() if said == "INTERNAL no"} == set(bad)
        raw.steps(bad, [1] * 4)
        assert set(outcomes(raw, 4).values()) == {told[both[1], 1]}, "as if the first had not been sent"
        # Two steps of each in one frame: the second of some fails, and with it both of theirs.
        inputs = np.zeros((48, 8), np.float32)
        inputs[[25, 31]] = 99  # of sessions that are durable at each step: others may go back further
        raw.steps(both * 2, [2] * 24 + [3] * 24, inputs)
        told = outcomes(raw, 48)
        failed = {handle for (handle, _), said in told.items() if said == "INTERNAL no"}
        assert failed == {both[1], both[7]} and all(told[handle, 2] == "INTERNAL no" for handle in failed)
        raw.steps(sorted(failed) * 2, [2, 2, 3, 3])
        again = outcomes(raw, 4)
        assert {again[handle, 3] for handle in failed} == {told[both[2], 3]}
        assert server.series()["engram_rows_in_flight"] == 0


def outcomes(raw: Any, count: int) -> dict[tuple[int, int], Any]:
    """Output, or reason, of so many steps by handle and seq."""
    found: dict[tuple[int, int], Any] = {}
    while len(found) < count:
        response = raw.next()
        kind = response.WhichOneof("frame")
        if kind not in ("outputs", "errors"):
            continue
        frame = getattr(response, kind)
        columns = (np.frombuffer(frame.handles, np.uint32).tolist(), np.frombuffer(frame.seqs, np.uint64).tolist())
        steps = list(zip(*columns, strict=True))
        if kind == "outputs":
            size = len(frame.outputs) // len(steps)
            found |= {step: frame.outputs[place * size : (place + 1) * size] for place, step in enumerate(steps)}
        else:
            reasons = [f"{one.reason} {one.metadata['applied']}" for one in frame.errors]
            which = np.frombuffer(frame.error_indexes, np.uint32).tolist()
            found |= {step: reasons[index] for step, index in zip(steps, which, strict=True)}
    return found


@pytest.mark.promise(11)
def test_a_commit_that_cannot_be_put_together_holds_nobody(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with("--interval-ms", "100")
    server.faults = FAILING_PACK
    with server:
        raw = connect(server)
        steps, interval = (
            int(np.frombuffer(raw.open(name, durability=kind).handles, np.uint32)[0])
            for name, kind in (("step", stream_pb2.DURABILITY_STEP), ("interval", stream_pb2.DURABILITY_INTERVAL))
        )
        expected = raw.step(steps, 1)
        raw.steps([steps], [2])
        assert answers(raw, 1) == [(2, "INTERNAL no")]
        raw.step(steps, 2)
        assert raw.step(interval, 1) == expected
        assert np.frombuffer(raw.next("durable").durable_seqs, np.uint64).tolist() == [0], "the flush failed"
        assert np.frombuffer(raw.next("durable").durable_seqs, np.uint64).tolist() == [1], "and was tried again"
        assert server.series()["engram_rows_in_flight"] == 0


def test_a_commit_that_was_begun_and_cannot_be_gone_on_with_is_waited_for(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with()
    server.faults = FAILING_JOB
    with server:
        raw = connect(server)
        (handle,) = np.frombuffer(raw.open("one").handles, np.uint32).tolist()
        for seq in (1, 2, 3):
            assert raw.step(handle, seq)
        assert server.series()["engram_rows_in_flight"] == 0


@pytest.mark.skipif(not NATIVE, reason="the extension, which sends records as it puts them together, is not built")
def test_records_whose_commit_takes_a_while_are_not_put_together_again(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    server = server_with("--wire", "native")
    server.faults = NO_PACK
    with server:
        raw = connect(server)
        handles = np.frombuffer(raw.open(*map(str, range(200))).handles, np.uint32).tolist()
        for seq in range(1, 31):
            raw.steps(handles, [seq] * 200, acknowledged_seqs=np.full(200, seq - 1, np.uint64).tobytes())
            assert answers(raw, 200) == [(seq, "output")] * 200
        series = server.series()
        assert series["engram_commit_rows_total"] == 6000
        store = server.redis()
        records = [key for key in store.scan_iter(b"engram:{*") if store.type(key) == b"string"]
        assert len(records) == 200
        assert series["engram_commit_bytes_total"] == 30 * sum(map(store.strlen, records))
        assert not sum(value for name, value in series.items() if name.startswith("engram_task_failures_total"))


def test_a_session_whose_record_is_gone_is_not_held_for_ever_when_the_look_why_fails(
    server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect
) -> None:
    server = server_with("--redis-url", redis_process.url, "--resident-idle-s", "0.3")
    server.faults = FAILING_LOOK
    with server:
        raw = connect(server)
        for session_id in ("lost", "lost-too"):
            (handle,) = np.frombuffer(raw.open(session_id).handles, np.uint32).tolist()
            raw.step(handle, 1)
            while server.series()['engram_sessions{residency="device"}']:
                time.sleep(0.1)
            tag = session_tag(session_id)
            for key in redis_process.client.scan_iter(b"engram:{" + tag + b"}:*"):
                redis_process.client.delete(key)
            raw.steps([handle], [2], acknowledged_seqs=np.ones(1, np.uint64).tobytes())
            assert answers(raw, 1)[0][1].startswith("SESSION_CLOSED")
            (handle,) = np.frombuffer(raw.open(session_id).handles, np.uint32).tolist()
            assert raw.step(handle, 1), "it can be begun anew"
        assert server.series()['engram_task_failures_total{task="load"}'] == 1


def test_what_waits_of_a_session_that_is_lost_is_not_computed_in_anothers_slot(
    server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect
) -> None:
    server = server_with("--redis-url", redis_process.url, "--resident-idle-s", "0.3", "--arena-slots-max", "2")
    server.faults = SLOW_LOSS
    with server:
        raw, interval = connect(server), stream_pb2.DURABILITY_INTERVAL
        (other,) = np.frombuffer(raw.open("other").handles, np.uint32).tolist()
        (handle,) = np.frombuffer(raw.open("lost", durability=interval).handles, np.uint32).tolist()
        raw.step(other, 1, np.full(8, 3, np.float32))
        raw.step(handle, 1)
        while server.series()['engram_sessions{residency="device"}']:
            time.sleep(0.1)
        tag = session_tag("lost")
        for key in redis_process.client.scan_iter(b"engram:{" + tag + b"}:*"):
            redis_process.client.delete(key)
        for seq in (2, 3, 4):
            raw.steps([handle], [seq])
        assert {said.split()[0] for _, said in answers(raw, 3)} == {"SESSION_CLOSED"}
        assert server.series()["engram_rows_in_flight"] == 0
        assert "was to be forgotten" not in server.log.read_text()
