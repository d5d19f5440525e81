"""Bad input over the raw contract: each a typed error with a reason, the other rows and sessions undisturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from engram.v1 import service_pb2, session_pb2, stream_pb2

ServerProcess = Any
Raw = Any
Connect = Callable[[ServerProcess], Raw]

GOOD = np.linspace(0, 1, 8, dtype=np.float32)


@pytest.fixture
def raw(shared_server: ServerProcess, connect: Connect) -> Raw:
    return connect(shared_server)


def opened(raw: Raw, count: int = 1, **fields: Any) -> list[int]:
    response = raw.open(*[""] * count, **fields)
    assert not response.errors, response.errors
    handles: list[int] = np.frombuffer(response.handles, np.uint32).tolist()
    return handles


@pytest.mark.promise(1)
def test_a_bad_row_does_not_disturb_the_others(raw: Raw) -> None:
    a, b, c = opened(raw, 3)
    inputs = np.stack([GOOD, GOOD, GOOD])
    inputs[1, 3] = np.nan
    raw.steps([a, b, c], [1, 1, 1], inputs)
    reason, seqs = raw.refusal()
    assert (reason, seqs) == ("NON_FINITE_INPUT", [1])
    answered: dict[int, bytes] = {}
    while len(answered) < 2:  # on a cluster each node's sessions are answered by themselves
        frame = raw.next("outputs")
        for n, handle in enumerate(np.frombuffer(frame.handles, np.uint32).tolist()):
            answered[handle] = bytes(frame.outputs[40 * n : 40 * (n + 1)])
    assert set(answered) == {a, c}
    assert raw.step(b, 1, GOOD) == answered[a] == answered[c], "the refused step was not applied"


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ({"inputs": np.zeros(7, np.float32).tobytes()}, "INVALID_INPUT_WIDTH"),
        ({"inputs": b""}, "INVALID_INPUT_WIDTH"),
        ({"dtype": "float64"}, "INVALID_INPUT_DTYPE"),
        ({"seqs": [0]}, "INVALID_SEQ"),
        ({"seqs": [2]}, "SEQ_GAP"),
        ({"handles": [4_000_000]}, "INVALID_HANDLE"),
        ({"flags": b"\x02"}, "CANNOT_GENERATE"),
        ({"flags": b"\x00\x00"}, "INVALID_FRAME"),
        ({"inputs": np.full(8, np.inf, np.float32).tobytes()}, "NON_FINITE_INPUT"),
    ],
)
def test_unusable_steps(raw: Raw, frame: dict[str, Any], reason: str) -> None:
    (handle,) = opened(raw)
    given = {"handles": [handle], "seqs": [1], "inputs": GOOD, **frame}
    raw.steps(**given)
    assert raw.refusal()[0] == reason
    assert len(raw.step(handle, 1, GOOD)) == 40, "the session goes on"


@pytest.mark.promise(1)
def test_every_row_out_of_order_is_told_the_step_that_its_own_session_expects(raw: Raw) -> None:
    handles = opened(raw, 3)
    for number, handle in enumerate(handles):
        for seq in range(1, number + 1):
            raw.step(handle, seq, GOOD)
    raw.steps([*handles, handles[0]], [9, 9, 9, 10], np.stack([GOOD] * 4))
    errors = raw.next("errors")
    told = [errors.errors[index].metadata["next_seq"] for index in np.frombuffer(errors.error_indexes, np.uint32)]
    assert told == ["1", "2", "3", "1"]


@pytest.mark.promise(6)
def test_unequal_columns_and_garbage(raw: Raw) -> None:
    (handle,) = opened(raw)
    for frame in (
        stream_pb2.StepsFrame(handles=np.array([handle], np.uint32).tobytes(), seqs=b"12345"),
        stream_pb2.StepsFrame(handles=b"123", seqs=np.array([1], np.uint64).tobytes()),
        stream_pb2.StepsFrame(),
    ):
        raw.send(steps=frame)
        assert raw.refusal()[0] == "INVALID_FRAME"
    raw.send(acknowledge=stream_pb2.AcknowledgeFrame(handles=b"1"))
    assert raw.refusal()[0] == "INVALID_FRAME"
    raw.send(data=b"\xff\xfe garbage \x00\x01")
    assert raw.refusal()[0] == "INVALID_FRAME"
    whole = stream_pb2.StreamRequest(
        steps=stream_pb2.StepsFrame(
            handles=np.array([handle], np.uint32).tobytes(), seqs=b"\1" + bytes(7), inputs=GOOD.tobytes()
        )
    ).SerializeToString()
    raw.send(data=whole[:-9])
    assert raw.refusal()[0] == "INVALID_FRAME"
    assert len(raw.step(handle, 1, GOOD)) == 40


@pytest.mark.promise(6)
def test_a_frame_too_large(raw: Raw) -> None:
    (handle,) = opened(raw)
    rows = 16_385
    raw.steps([handle] * rows, list(range(1, rows + 1)), np.zeros((rows, 8), np.float32))
    assert raw.refusal()[0] == "FRAME_TOO_LARGE"
    raw.send(steps=stream_pb2.StepsFrame(handles=b"1234", seqs=b"12345678", inputs=bytes(17 << 20)))
    assert raw.refusal()[0] == "FRAME_TOO_LARGE"
    assert len(raw.step(handle, 1, GOOD)) == 40


@pytest.mark.promise(1)
def test_repeated_steps_are_answered_with_the_same_bits(raw: Raw) -> None:
    (handle,) = opened(raw)
    first = raw.step(handle, 1, GOOD)
    second = raw.step(handle, 2, GOOD * 0.5)
    assert first != second
    assert raw.step(handle, 1, GOOD * 9) == first, "the input of a repeated step is not looked at"
    raw.steps([handle, handle], [2, 3], np.stack([GOOD, GOOD]))
    frames = [raw.next("outputs"), raw.next("outputs")]
    by_seq = {int(np.frombuffer(f.seqs, np.uint64)[0]): bytes(f.outputs) for f in frames}
    assert by_seq[2] == second and set(by_seq) == {2, 3}
    raw.steps([handle], [4], GOOD[None], acknowledged_seqs=np.array([3], np.uint64).tobytes())
    raw.next("outputs")
    raw.steps([handle], [3], GOOD[None])
    assert raw.refusal() == ("SEQ_ACKNOWLEDGED", [3])


@pytest.mark.promise(6)
def test_the_reply_window_is_bounded(raw: Raw) -> None:
    response = raw.open("")
    (handle,) = np.frombuffer(response.handles, np.uint32).tolist()
    window = response.window
    raw.steps([handle] * (window + 2), list(range(1, window + 3)), np.zeros((window + 2, 8), np.float32))
    reason, seqs = raw.refusal()
    assert reason == "REPLY_WINDOW_FULL" and seqs == [window + 1, window + 2]
    answered = 0
    while answered < window:
        answered += len(raw.next("outputs").seqs) // 8
    ack = stream_pb2.AcknowledgeFrame(
        handles=np.array([handle], np.uint32).tobytes(), acknowledged_seqs=np.array([window], np.uint64).tobytes()
    )
    raw.send(acknowledge=ack)
    assert len(raw.step(handle, window + 1)) == 40


def test_unknown_names(raw: Raw) -> None:
    for fields, reason in (
        ({"model": "nothing"}, "MODEL_NOT_FOUND"),
        ({"version": "99"}, "VERSION_NOT_FOUND"),
    ):
        response = raw.open("x", **fields)
        assert [row.error.reason for row in response.errors] == [reason]
        assert response.handles == b"\xff\xff\xff\xff"
    response = raw.open("white space", "", "ctrl\n", "x" * 129)
    assert [(row.row, row.error.reason) for row in response.errors] == [
        (0, "INVALID_SESSION_ID"),
        (2, "INVALID_SESSION_ID"),
        (3, "INVALID_SESSION_ID"),
    ]
    raw.send(
        attach=stream_pb2.AttachFrame(request_id=2, model="digits-reader", session_ids=["never-opened"], client_id=5)
    )
    assert [row.error.reason for row in raw.next("opened").errors] == ["SESSION_NOT_FOUND"]


def test_unary_refusals_carry_their_reason(raw: Raw) -> None:
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    cases: list[tuple[str, Any, Any, str, grpc.StatusCode]] = [
        ("GetSession", session_pb2.GetSessionRequest(session_id="no"), session_pb2.GetSessionResponse, "SESSION_NOT_FOUND", grpc.StatusCode.NOT_FOUND),
        ("CloseSession", session_pb2.CloseSessionRequest(session_id="no"), session_pb2.CloseSessionResponse, "SESSION_NOT_FOUND", grpc.StatusCode.NOT_FOUND),
        ("GetModel", session_pb2.GetModelRequest(model="no"), session_pb2.GetModelResponse, "MODEL_NOT_FOUND", grpc.StatusCode.NOT_FOUND),
        ("ImportSession", session_pb2.ImportSessionRequest(data=b"junk"), session_pb2.ImportSessionResponse, "INVALID_EXPORT", grpc.StatusCode.INVALID_ARGUMENT),
        ("ListSessions", session_pb2.ListSessionsRequest(page_token="x"), session_pb2.ListSessionsResponse, "INVALID_ARGUMENT", grpc.StatusCode.INVALID_ARGUMENT),
        ("Step", session_pb2.StepRequest(session_id="u", model="digits-reader", inputs=[1.0] * 7), session_pb2.StepResponse, "INVALID_INPUT_WIDTH", grpc.StatusCode.INVALID_ARGUMENT),
        ("Step", b"\xff\xff garbage", session_pb2.StepResponse, "INVALID_FRAME", grpc.StatusCode.INVALID_ARGUMENT),
    ]  # fmt: skip
    for method, request, response, reason, code in cases:
        with pytest.raises(grpc.RpcError) as caught:
            raw.unary(method, request, response)
        assert caught.value.code() == code  # type: ignore[attr-defined]
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(caught.value)
        assert status is not None and status.details[0].Unpack(info)
        assert (info.reason, info.domain) == (reason, "engram")


def test_a_deadline_that_has_passed(raw: Raw) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw.unary("GetServer", session_pb2.GetServerRequest(), session_pb2.GetServerResponse, timeout=-1.0)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]


@pytest.mark.promise(1)
def test_unary_steps(raw: Raw) -> None:
    def step(**fields: Any) -> session_pb2.StepResponse:
        response: session_pb2.StepResponse = raw.unary(
            "Step", session_pb2.StepRequest(session_id=name, model="digits-reader", **fields), session_pb2.StepResponse
        )
        return response

    name = f"unary-{time.time()}"
    first = step(inputs=GOOD.tolist() * 2)
    assert first.seq == 2 and list(first.shape) == [2, 10] and abs(sum(first.outputs[:10]) - 1) < 1e-5
    again = step(inputs=GOOD.tolist(), seq=2)
    assert list(again.outputs) == list(first.outputs[10:])
    raw_bytes = step(raw_inputs=GOOD.tobytes(), raw=True)
    assert raw_bytes.seq == 3 and len(raw_bytes.raw_outputs) == 40
    assert raw.get(name).seq == 3
    (handle,) = opened(raw)
    streamed = [raw.step(handle, seq, GOOD) for seq in (1, 2, 3)]
    assert raw_bytes.raw_outputs == streamed[2], "one mechanism, the same bits"


def test_a_thousand_opens_at_once(shared_server: ServerProcess, connect: Connect) -> None:
    raws = [connect(shared_server) for _ in range(4)]
    for raw in raws:
        for n in range(250):
            frame = stream_pb2.OpenFrame(request_id=n, model="digits-reader", session_ids=[""], client_id=9)
            raw.send(open=frame)
    for raw in raws:
        responses = [raw.next("opened") for _ in range(250)]
        assert sorted(response.request_id for response in responses) == list(range(250))
        assert not any(response.errors for response in responses)
        handles = {int(np.frombuffer(response.handles, np.uint32)[0]) for response in responses}
        assert len(handles) == 250


@pytest.mark.promise(12)
def test_a_half_closed_stream_gets_its_answers_and_ends(raw: Raw) -> None:
    (handle,) = opened(raw)
    raw.steps([handle] * 5, [1, 2, 3, 4, 5], np.stack([GOOD] * 5))
    raw.half_close()
    answered = 0
    while (response := raw.next()) is not None:
        answered += len(response.outputs.seqs) // 8
    assert answered == 5


@pytest.mark.promise(6)
def test_a_slow_reader_holds_back_itself_alone(shared_server: ServerProcess, connect: Connect) -> None:
    """A client that sends and never reads is pushed back by flow control; another is served meanwhile."""
    slow = grpc.insecure_channel(shared_server.address, options=[("grpc.use_local_subchannel_pool", 1)])
    sent = 0
    stop = threading.Event()
    ids = [f"slow-{time.time()}-{n}" for n in range(2000)]

    def requests() -> Any:
        nonlocal sent
        yield stream_pb2.StreamRequest(
            open=stream_pb2.OpenFrame(request_id=1, model="digits-reader", session_ids=ids, client_id=3)
        ).SerializeToString()
        time.sleep(1.0)
        seq = 0
        while not stop.is_set() and seq < 400:
            seq += 1
            yield stream_pb2.StreamRequest(
                steps=stream_pb2.StepsFrame(
                    handles=np.arange(2000, dtype=np.uint32).tobytes(),
                    seqs=np.full(2000, seq, np.uint64).tobytes(),
                    inputs=np.zeros((2000, 8), np.float32).tobytes(),
                    acknowledged_seqs=np.full(2000, seq - 1, np.uint64).tobytes(),
                )
            ).SerializeToString()
            sent += 1

    call = slow.stream_stream("/engram.v1.EngramService/Stream")(requests())
    time.sleep(3.0)
    raw = connect(shared_server)
    (handle,) = opened(raw)
    assert len(raw.step(handle, 1, GOOD)) == 40
    at_three = sent
    stop.set()
    call.cancel()
    slow.close()
    assert at_three < 400, "a stream that is not read must be read no further"


def test_reflection_and_health_are_there(shared_server: ServerProcess) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(shared_server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="engram.v1.EngramService")
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests))
        names = {service.name for service in answer.list_services_response.service}
        assert service_pb2.DESCRIPTOR.services_by_name["EngramService"].full_name in names
