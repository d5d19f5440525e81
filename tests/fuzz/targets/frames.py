"""Frames: the bytes of a StreamRequest, decoded by the wire and let in, over sessions in all sorts of places.

Every second one (by its length) comes between two sound frames of another client, as rows of many clients do.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from engram.v1 import stream_pb2
from engram_service.sessions.handles import CLOSED
from engram_service.sessions.opening import check_ids
from engram_service.sessions.table import NO_STREAM
from engram_service.wire.base import Message
from targets.world import SLOTS, WINDOW, world

# Of each session: last seq accepted, last one answered, last one acknowledged. The last session is another stream's.
_PLACES = [(0, 0, 0), (7, 7, 5), (9, 6, 6), (40, 40, 32), (2**62, 2**62, 2**62), (3, 3, 3), (5, 5, 5)]
_COLUMNS = ("admitted", "applied", "acked", "computed", "durable", "stream", "handle", "model", "slot")
_ROWS_MAX = world().settings.frame_rows_max


def _prepare() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    at = world()
    table = at.table
    rows = np.array([table.add(f"s{number}") for number in range(len(_PLACES))])
    for row, (admitted, applied, acked) in zip(rows, _PLACES, strict=True):
        stream = at.other if row == rows[-1] else at.stream
        served = at.hopfield if row == rows[-2] else at.lstm
        table.admitted[row] = table.computed[row] = admitted
        table.applied[row] = table.durable[row] = applied
        table.acked[row] = acked
        table.model[row], table.stream[row], table.handle[row] = served.index, stream.id, stream.handles.name(row)
        table.slot[row] = row % SLOTS
    table.interval[rows[3]] = True
    at.stream.handles.end(at.stream.handles.name(0), CLOSED)
    return rows, {name: getattr(table, name)[rows].copy() for name in _COLUMNS}


_ROWS, _BEFORE = _prepare()


def _steps(handles: list[int], seqs: list[int], **fields: object) -> bytes:
    values = np.linspace(-1, 1, 4 * len(handles), dtype=np.float32)
    given = {"inputs": values.tobytes(), **fields}
    frame = stream_pb2.StepsFrame(
        handles=np.array(handles, "<u4").tobytes(), seqs=np.array(seqs, "<u8").tobytes(), **given
    )  # type: ignore[arg-type]
    return stream_pb2.StreamRequest(steps=frame).SerializeToString()


def seeds() -> list[bytes]:
    acknowledge = stream_pb2.AcknowledgeFrame(
        handles=np.array([1, 3], "<u4").tobytes(), acknowledged_seqs=np.array([6, 2**63], "<u8").tobytes()
    )
    opening = {"request_id": 3, "model": "lstm", "session_ids": ["a", "", "µ"], "durability": 2, "client_id": 7}
    others = [
        {"acknowledge": acknowledge},
        {"open": stream_pb2.OpenFrame(**opening, ttl_ms=2**63, confirms=True)},
        {"confirm": stream_pb2.ConfirmFrame(number=2**63)},
        {"attach": stream_pb2.AttachFrame(**opening)},
        {"close": stream_pb2.CloseFrame(request_id=1, handles=bytes(4), detach=True)},
        {"close": stream_pb2.CloseFrame(request_id=1, handles=bytes(6))},
    ]
    return [
        _steps([0], [1]),
        _steps([0, 1, 2, 3], [1, 8, 10, 41], acknowledged_seqs=np.array([0, 7, 6, 40], "<u8").tobytes()),
        _steps([1, 1, 1, 2], [6, 7, 8, 8], flags=b"\1\0\1\0", timeout_ms=5, dtype="float32"),
        _steps([0, 3], [1, 41], repeats=np.array([3, 1], "<u4").tobytes(), flags=b"\2\1"),
        _steps([0, 0, 4, 9], [1, 2, 2**62 + 1, 1], flags=b"\2\2\2\2", inputs=b""),
        *(stream_pb2.StreamRequest(**one).SerializeToString() for one in others),
    ]


def mend(data: bytes) -> bytes:
    """Columns cut or filled up to as many rows as there are handles, and inputs to match."""
    try:
        request = stream_pb2.StreamRequest.FromString(data)
    except Exception:
        return data
    if request.WhichOneof("frame") != "steps":
        return data
    frame, rows = request.steps, max(1, len(request.steps.handles) // 4)
    for name, width in (
        ("handles", 4),
        ("seqs", 8),
        ("flags", 1),
        ("repeats", 4),
        ("acknowledged_seqs", 8),
        ("inputs", 16),
    ):
        value = getattr(frame, name)
        if value or name in ("handles", "seqs"):
            setattr(frame, name, (value + bytes(rows * width))[: rows * width])
    frame.flags = bytes(flag & 3 for flag in frame.flags)
    return request.SerializeToString()


def fuzz_one(data: bytes) -> None:
    at, beside = world(), len(data) % 2
    try:
        asyncio._set_running_loop(at.loop)  # what is put off to the loop is run by `_then`
        try:
            _come(data, bool(beside))
        finally:
            asyncio._set_running_loop(None)
        _then()
        _check(2 * beside)
    finally:
        _put_back()


def _come(data: bytes, beside: bool) -> None:
    """Through the wire, and then as a turn of the step loop has it."""
    at = world()
    mine, others = at.wire._calls[at.stream.id], at.wire._calls[at.other.id]
    handle, seq = int(at.table.handle[_ROWS[-1]]), int(_BEFORE["admitted"][-1])
    if beside:
        at.wire._frame(others, _steps([handle], [seq + 1]))
    at.wire._frame(mine, data)
    if beside:
        at.wire._frame(others, _steps([handle], [seq + 2]))
    arrived, events = at.wire.take()
    now, done = time.monotonic(), 0
    for before, event in events:
        if arrived is not None and before > done:
            at.admission.admit(arrived.part(done, before), now)
            done = before
        assert event == Message(at.stream.id, data), event
        if at.frames._handle(at.stream, data) is not None:
            # An open or close, which asks the store; what it is asked for was decoded.
            request = stream_pb2.StreamRequest.FromString(data)
            check_ids(
                getattr(request, request.WhichOneof("frame") or "open").session_ids if request.HasField("open") else []
            )
    if arrived is not None and done < len(arrived):
        at.admission.admit(arrived.part(done, len(arrived)), now)


def _then() -> None:
    """The tasks that answer repeated steps: nothing is at work on any session, so they have nothing to wait for."""
    at = world()
    for _ in range(3):
        if at.supervisor._tasks:
            at.loop.run_until_complete(asyncio.sleep(0))
    assert not at.supervisor._tasks


def _check(beside: int) -> None:
    at = world()
    table = at.table
    for response, _ in at.sent(at.stream):
        kind = response.WhichOneof("frame")
        assert kind in ("errors", "outputs", "closed"), kind
        details = {"errors": response.errors.errors, "closed": [row.error for row in response.closed.errors]}.get(
            kind, []
        )
        assert all(detail.reason and detail.reason != "INTERNAL" and detail.message for detail in details), response
        if kind == "errors":
            assert len(response.errors.handles) * 2 == len(response.errors.seqs)
    assert not at.sent(at.other), "another stream was answered"
    waiting = at.scheduler.waiting_rows - beside
    asked_again = sum(map(len, at.repeats._waiting.values()))
    assert 0 <= waiting <= _ROWS_MAX and 0 <= at.stream.in_flight <= _ROWS_MAX
    assert at.stream.in_flight == waiting + asked_again == at.under_way(at.stream), "a row is lost, or counted twice"
    assert at.other.in_flight == beside == at.under_way(at.other)
    for name in _COLUMNS:
        more = np.uint64(beside) if name == "admitted" else 0
        assert getattr(table, name)[_ROWS[-1]] == _BEFORE[name][-1] + more, (
            f"{name} of another stream's session changed"
        )
    admitted = table.admitted[_ROWS[:-1]].astype(object) - _BEFORE["admitted"][:-1].astype(object)
    assert sum(admitted) == waiting, "as many steps wait as were accepted"
    assert (admitted >= 0).all() and (table.acked[_ROWS] >= _BEFORE["acked"]).all()
    assert (table.acked[_ROWS] <= table.applied[_ROWS]).all(), "more is acknowledged than was answered"
    assert (table.admitted[_ROWS] <= table.acked[_ROWS] + np.uint64(WINDOW)).all() or not waiting


def _put_back() -> None:
    at = world()
    for served in (at.lstm, at.hopfield):
        at.scheduler.drop_model(served.index)
    at.repeats._waiting.clear()
    if at.supervisor._tasks:
        at.loop.run_until_complete(at.supervisor.cancel())
    for stream in (at.stream, at.other):
        at.streams.answered(np.full(stream.in_flight, stream.id, np.uint32))
        at.forget_sent(stream)
    assert at.streams.in_flight == 0
    for name in _COLUMNS:
        getattr(at.table, name)[_ROWS] = _BEFORE[name]
    assert (at.table.stream[_ROWS] != NO_STREAM).all()
