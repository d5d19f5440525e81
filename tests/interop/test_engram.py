"""gRPC's interop cases as engram.v1 has them, with gRPC's Python client, against `engram serve` on each of its wires."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from engram.v1 import service_pb2_grpc, session_pb2, stream_pb2

pytestmark = pytest.mark.both_wires

WAIT_S = 20.0
MODEL = "digits-reader"


@pytest.fixture
def channel(engram_server: Any) -> Iterator[grpc.Channel]:
    with engram_server.channel() as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return service_pb2_grpc.EngramServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def model(stub: Any) -> Any:
    return stub.GetModel(session_pb2.GetModelRequest(model=MODEL), timeout=WAIT_S).model


class Stream:
    """A stream whose frames are sent one at a time."""

    def __init__(self, stub: Any, timeout: float | None = WAIT_S, **more: Any) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = stub.Stream(iter(self._requests.get, None), timeout=timeout, **more)

    def send(self, **frame: Any) -> None:
        self._requests.put(stream_pb2.StreamRequest(**frame))

    def open(self, session: str) -> Any:
        self.send(open=stream_pb2.OpenFrame(request_id=1, model=MODEL, session_ids=[session], client_id=7))
        return next(self.call).opened

    def end(self) -> None:
        self._requests.put(None)


def error_of(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def nbytes_of(model: Any) -> int:
    """Of a row of inputs."""
    return 4 * int(np.prod(model.inputs[0].shape))


def seqs_of(stream: Stream, rows: int) -> list[int]:
    """Of the answers to so many steps."""
    seqs: list[int] = []
    while len(seqs) < rows:
        response = next(stream.call)
        assert response.WhichOneof("frame") == "outputs", response
        seqs += np.frombuffer(response.outputs.seqs, np.uint64).tolist()
    return seqs


def steps(seq: int, data: bytes, rows: int = 1) -> Any:
    seqs = np.arange(seq, seq + rows, dtype=np.uint64)
    acknowledged = np.full(rows, seq - 1, np.uint64)  # what came before has arrived
    return stream_pb2.StepsFrame(
        handles=bytes(4 * rows), seqs=seqs.tobytes(), inputs=data, acknowledged_seqs=acknowledged.tobytes()
    )


def test_empty_unary(stub: Any) -> None:
    assert stub.GetServer(session_pb2.GetServerRequest(), timeout=WAIT_S).server_version


def test_large_unary(stub: Any) -> None:
    """The largest request that one call takes is an export; this one is none, and read to its end."""
    request = session_pb2.ImportSessionRequest(data=bytes(271828), session_id="large")
    assert error_of(lambda: stub.ImportSession(request, timeout=WAIT_S)).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_client_compressed_unary_and_streaming(stub: Any, server_wire: str) -> None:
    """gRPC's own server unpacks before it knows who calls, so it is not let; the native wire unpacks afterwards, and up to a limit."""
    request = session_pb2.StepRequest(session_id="packed", model=MODEL, inputs=[0.0] * 8)
    stream = Stream(stub, compression=grpc.Compression.Gzip)
    if server_wire == "native":
        assert stub.Step(request, timeout=WAIT_S, compression=grpc.Compression.Gzip).seq == 1
        assert list(stream.open("packed-stream").created) == [1]
    else:
        for call in (
            lambda: stub.Step(request, timeout=WAIT_S, compression=grpc.Compression.Gzip),
            lambda: stream.open("packed-stream"),
        ):
            error = error_of(call)
            assert (error.code(), "gzip" in error.details()) == (grpc.StatusCode.UNIMPLEMENTED, True)
    stream.end()


def test_ping_pong(stub: Any, model: Any) -> None:
    stream = Stream(stub)
    assert list(stream.open("ping").created) == [1]
    for seq, rows in ((1, 1), (2, 30), (32, 2), (34, 17)):
        stream.send(steps=steps(seq, bytes(rows * nbytes_of(model)), rows))
        assert seqs_of(stream, rows) == list(range(seq, seq + rows))
    stream.end()
    assert list(stream.call) == []
    assert (stream.call.code(), "engram-server" in dict(stream.call.initial_metadata())) == (grpc.StatusCode.OK, True)


def test_large_frames(stub: Any, model: Any) -> None:
    """Of 300 sessions thirty steps each: some 400 KB there, some 500 KB back."""
    sessions, rows = 300, 30
    stream = Stream(stub)
    opened = stream_pb2.OpenFrame(request_id=1, model=MODEL, session_ids=[""] * sessions, client_id=7)
    stream.send(open=opened)
    handles = np.frombuffer(next(stream.call).opened.handles, np.uint32)
    frame = stream_pb2.StepsFrame(
        handles=np.repeat(handles, rows).tobytes(),
        seqs=np.tile(np.arange(1, rows + 1, dtype=np.uint64), sessions).tobytes(),
        inputs=bytes(sessions * rows * nbytes_of(model)),
    )
    stream.send(steps=frame)
    assert sorted(seqs_of(stream, sessions * rows)) == sorted(list(range(1, rows + 1)) * sessions)
    stream.end()
    assert list(stream.call) == []


def test_empty_stream(stub: Any) -> None:
    call = stub.Stream(iter([]), timeout=WAIT_S)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_cancel_after_begin(stub: Any) -> None:
    stream = Stream(stub)
    stream.call.initial_metadata()  # which comes as soon as the stream is let in
    stream.call.cancel()
    assert stream.call.code() is grpc.StatusCode.CANCELLED
    stream.end()


def test_cancel_after_first_response(stub: Any) -> None:
    stream = Stream(stub)
    stream.open("cancelled")
    stream.call.cancel()
    assert error_of(lambda: next(stream.call)).code() is grpc.StatusCode.CANCELLED
    stream.end()
    request = session_pb2.StepRequest(session_id="cancelled", inputs=[0.0])
    assert error_of(lambda: stub.Step(request, timeout=WAIT_S)).code() is grpc.StatusCode.INVALID_ARGUMENT, (
        "it is let go"
    )


@pytest.mark.parametrize("timeout_s", [0.001, 0.3])
def test_timeout_on_sleeping_server(stub: Any, timeout_s: float) -> None:
    stream = Stream(stub, timeout=timeout_s)
    assert error_of(lambda: next(stream.call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stream.end()


@pytest.mark.parametrize("words", ["nobody", "naïve ☺ and 😈, 100 %"])
def test_status_code_and_message_and_special_status_message(stub: Any, words: str) -> None:
    error = error_of(lambda: stub.GetModel(session_pb2.GetModelRequest(model=words), timeout=WAIT_S))
    assert (error.code(), words in error.details()) == (grpc.StatusCode.NOT_FOUND, True), error.details()
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.reason == "MODEL_NOT_FOUND"


def test_custom_metadata(stub: Any) -> None:
    """What is not for it, a server lets pass, up to its limit; what is over that costs the call alone."""
    large = ("x-grpc-test-echo", "v" * 7000), ("x-grpc-test-echo-bin", b"\xab" * 100)
    assert stub.GetServer(session_pb2.GetServerRequest(), timeout=WAIT_S, metadata=large).server_version
    assert list(stub.Stream(iter([]), timeout=WAIT_S, metadata=large)) == []
    error = error_of(
        lambda: stub.GetServer(session_pb2.GetServerRequest(), timeout=WAIT_S, metadata=[("x-large", "v" * 40_000)])
    )
    assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    assert stub.GetServer(session_pb2.GetServerRequest(), timeout=WAIT_S, wait_for_ready=True).server_version


@pytest.mark.parametrize("path", ["/engram.v1.EngramService/NoSuchMethod", "/engram.v1.NoSuchService/Step"])
def test_unimplemented_method_and_service(channel: grpc.Channel, path: str) -> None:
    assert error_of(lambda: channel.unary_unary(path)(b"", timeout=WAIT_S)).code() is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_finds_services_methods_and_messages(channel: grpc.Channel) -> None:
    names = "engram.v1.EngramService", "engram.v1.EngramService.Step", "engram.v1.StepRequest"
    requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in (*names, "no.Such")]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
    answers = list(stub.ServerReflectionInfo(iter(requests), timeout=WAIT_S))
    assert [answer.WhichOneof("message_response") for answer in answers] == ["file_descriptor_response"] * 3 + [
        "error_response"
    ]
