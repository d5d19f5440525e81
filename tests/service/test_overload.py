"""More than a server can take, through its wire: deadlines in the queue, retry hints, a queue that is limited in time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]

SESSIONS, WINDOW = 2048, 51  # steps that a session of digits-reader may have unacknowledged

# One commit at a time, which is waited for as long as the test takes: what comes then waits in the queue.
ONE_LINE = """
from engram_service.steps import commits

commits._LINES_MAX, commits._TIMEOUT_S = 1, 60.0
"""


@pytest.mark.promise(6)
def test_a_row_whose_time_is_up_in_the_queue_is_not_computed_and_its_seq_stands(
    server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect
) -> None:
    """While Redis says nothing, the step loop waits with the first step, and the others wait for it."""
    server = server_with("--redis-url", redis_process.url)
    server.faults = ONE_LINE
    with server:
        raw = connect(server)
        raw.open("first", "late", "patient")
        redis_process.pause()
        raw.steps([0], [1])
        while "engram_batches_total" not in str(server.series()):
            time.sleep(0.01)
        begun = time.monotonic()
        raw.steps([1, 1], [1, 2], timeout_ms=100)
        raw.steps([2], [1])
        assert raw.refusal() == ("DEADLINE_EXCEEDED", [1, 2])
        assert time.monotonic() - begun >= 0.1
        redis_process.go_on()
        answered = [raw.next("outputs") for _ in range(2)]
        assert [np.frombuffer(frame.handles, np.uint32).tolist() for frame in answered] == [[0], [2]]
        assert [raw.get(name).seq for name in ("first", "late", "patient")] == [1, 0, 1]
        assert server.series()['engram_batch_rows_sum{model="digits-reader"}'] == 2, "the late rows were in no batch"
        assert raw.step(1, 1) == bytes(answered[0].outputs), "the session is where it was: the same step is its first"


@pytest.fixture
def busy(server_with: Callable[..., ServerProcess], connect: Connect) -> Any:
    """Gives a server so many rows that they wait, wave by wave, and says what it refused."""

    def run(flags: tuple[str, ...], frame: int, frames: int, enough: Callable[[list[Any]], bool]) -> list[Any]:
        with server_with(*flags) as server:
            raw = connect(server)
            raw.open(*(f"busy-{number}" for number in range(SESSIONS)))
            seqs = np.zeros(SESSIONS, np.uint64)
            refused: list[Any] = []
            deadline = time.monotonic() + 60.0
            while not enough(refused):
                assert time.monotonic() < deadline, refused
                sent = 0
                for number in range(frames):
                    handles = np.arange(frame) + number * frame
                    handles %= SESSIONS
                    raw.steps(handles.tolist(), (seqs[handles] + 1).tolist(), np.zeros((frame, 8), np.float32),
                              acknowledged_seqs=seqs[handles].tobytes())  # fmt: skip
                    seqs[handles] += 1
                    sent += frame
                done = 0
                while done < sent:
                    response = raw.next()
                    kind = response.WhichOneof("frame")
                    rows = getattr(response, kind)
                    done += len(rows.seqs) // 8
                    if kind == "errors":
                        refused.extend(detail for detail in rows.errors if detail.reason == "QUEUE_FULL")
                        np.minimum.at(
                            seqs, np.frombuffer(rows.handles, np.uint32), np.frombuffer(rows.seqs, np.uint64) - 1
                        )
            return refused

    return run


def test_what_is_refused_is_told_to_come_when_there_is_room(busy: Any) -> None:
    """The hint is from the rate at which rows are done, and another one's is after it."""
    flags = ("--queue-rows-max", str(SESSIONS), "--queue-s-max", "0", "--batch-rows-max", "64")
    refused = busy(flags, 1024, 8, lambda refused: len({detail.retry_after_ms for detail in refused} - {50}) > 3)
    hints = [detail.retry_after_ms for detail in refused]
    assert min(hints) >= 50 and max(hints) <= 5000, hints
    assert any(after > before > 50 for before, after in itertools.pairwise(hints)), hints


def test_the_queue_is_limited_in_time(busy: Any) -> None:
    """As soon as the rate is known, it has as many rows as are done in so long; until then, as many as there may be."""
    flags = ("--queue-s-max", "0.02", "--batch-rows-max", "64")
    refused = busy(flags, 64, 200, lambda refused: len(refused) > 3)
    limits = [int(detail.message.split(" and ")[1].split()[0]) for detail in refused]
    assert all(64 <= limit < 64 * 200 for limit in limits), limits
