"""When the native wire says that a frame was read, was complete and was taken, and how long answers took to leave."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from http2 import DATA, Connection, frame, headers, message
from wire_loop import Loop, channel, native, stream
from wire_loop import frame as steps

from engram_service.observability.stages import EDGES
from engram_service.wire.base import ADMITTED, COMPLETE, READ, TAKEN

STREAM, PAUSE_S, WAIT_S = "/engram.v1.EngramService/Stream", 0.2, 20.0


def test_times_are_those_of_the_frame_by_the_clock_of_python(loops: Callable[..., Loop]) -> None:
    loop, before = loops(edges=EDGES), time.monotonic()
    with channel(loop) as made:
        requests = [steps([1, 2], [n, n], bytes(8)) for n in range(1, 4)]
        assert len(list(stream(made, iter(requests), timeout=WAIT_S))) >= 1
    after = time.monotonic()
    assert len(loop.times) == 6
    for row in loop.times:
        assert before < row[READ] <= row[COMPLETE] <= row[TAKEN] < after and row[ADMITTED] == 0
    loop.until(lambda: sum(loop.wire.written()[0]) == 6)
    counts, seconds = loop.wire.written()
    assert len(counts) == len(EDGES) + 1 and 0 < seconds < 6 * (after - before)


def test_a_frame_in_two_pieces_was_read_with_the_first(loops: Callable[..., Loop]) -> None:
    loop = loops()
    whole, last = (message(steps([1], [n], bytes(400)).SerializeToString()) for n in (1, 2))
    peer = Connection(int(loop.address.rpartition(":")[2]))
    try:
        call = peer.call(headers(STREAM), whole[:100], end=False)
        time.sleep(PAUSE_S)
        second = time.monotonic()
        peer._socket.sendall(frame(DATA, 0, call, whole[100:] + last))
        loop.until(lambda: len(loop.times) == 2)
    finally:
        peer.close()
    split, behind = loop.times
    assert split[READ] < second - PAUSE_S / 2 and split[COMPLETE] >= second
    assert second <= behind[READ] <= behind[COMPLETE], "what came behind it was read with the second piece"


def test_edges_that_make_no_sense_are_refused() -> None:
    for edges in ([0.2, 0.1], [-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="limit"):
            native.Wire(edges=edges)


def test_an_answer_counts_once_for_each_row_though_it_waits_for_its_window(loops: Callable[..., Loop]) -> None:
    """Two megabytes are more than a client of gRPC has a window for at first."""
    loop = loops(edges=[0.05, 10.0], answers=False)
    with channel(loop) as made:
        call = stream(made, iter([steps([1, 2], [1, 1], bytes(8))]), timeout=WAIT_S)
        loop.until(lambda: len(loop.rows) == 2)
        number = np.array([loop.rows[0][0]] * 2, np.uint32)
        loop.wire.answer(number, np.array([1, 2], np.uint32), np.array([1, 1], np.uint64), np.zeros(2 << 20, np.uint8),
                         np.empty(0, np.uint64))  # fmt: skip
        loop.wire.finish(int(number[0]))
        assert len(list(call)) == 1
    assert loop.until(lambda: sum(loop.wire.written()[0])) == 2
