"""A peer for the server's tests: a raw client that speaks the contract by hand."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from engram.v1 import session_pb2, stream_pb2

WAIT_S = 20.0


class Raw:
    """A client without the SDK's care: it sends what it is told, bytes included, and shows what comes."""

    def __init__(self, address: str, token: str = "") -> None:
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        )
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream = self.channel.stream_stream(
            "/engram.v1.EngramService/Stream", response_deserializer=stream_pb2.StreamResponse.FromString
        )
        self.call = stream(iter(self._requests.get, None), metadata=self._metadata)
        self._responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        import threading

        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for response in self.call:
                self._responses.put(response)
            self._responses.put(None)
        except grpc.RpcError as error:
            self._responses.put(error)

    def send(self, data: bytes = b"", **frame: Any) -> None:
        self._requests.put(data or stream_pb2.StreamRequest(**frame).SerializeToString())

    def half_close(self) -> None:
        self._requests.put(None)

    def next(self, kind: str | None = None) -> Any:
        """The next frame (of a kind: others are passed over); None at the stream's end; an RpcError is raised."""
        deadline = time.monotonic() + WAIT_S
        while True:
            response = self._responses.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(response, grpc.RpcError):
                raise response
            if response is None or kind is None:
                return response
            if response.WhichOneof("frame") == kind:
                return getattr(response, kind)

    def open(self, *ids: str, model: str = "digits-reader", client_id: int = 5, **fields: Any) -> Any:
        frame = stream_pb2.OpenFrame(request_id=1, model=model, session_ids=ids, client_id=client_id, **fields)
        self.send(open=frame)
        return self.next("opened")

    def steps(
        self, handles: list[int], seqs: list[int], inputs: NDArray[Any] | bytes | None = None, **fields: Any
    ) -> None:
        if inputs is None:
            inputs = np.zeros((len(handles), 8), np.float32)
        data = inputs if isinstance(inputs, bytes) else inputs.tobytes()
        frame = stream_pb2.StepsFrame(
            handles=np.array(handles, np.uint32).tobytes(),
            seqs=np.array(seqs, np.uint64).tobytes(),
            inputs=data,
            **fields,
        )
        self.send(steps=frame)

    def step(self, handle: int, seq: int, inputs: NDArray[Any] | None = None, **fields: Any) -> bytes:
        """One step and its output; an error frame fails the test."""
        self.steps([handle], [seq], inputs, **fields)
        response = self.next()
        while response.WhichOneof("frame") == "durable":
            response = self.next()
        assert response.WhichOneof("frame") == "outputs", response
        return bytes(response.outputs.outputs)

    def refusal(self) -> tuple[str, list[int]]:
        """The reason and the seqs of the next error frame (which must have one reason)."""
        errors = self.next("errors")
        assert len({detail.reason for detail in errors.errors}) == 1, errors
        assert all(detail.message and detail.code for detail in errors.errors)
        return errors.errors[0].reason, np.frombuffer(errors.seqs, np.uint64).tolist()

    def unary(self, method: str, request: Any, response_type: Any, timeout: float = WAIT_S) -> Any:
        call = self.channel.unary_unary(
            f"/engram.v1.EngramService/{method}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=response_type.FromString,
        )
        return call(request, timeout=timeout, metadata=self._metadata)

    def get(self, session_id: str) -> Any:
        return self.unary(
            "GetSession", session_pb2.GetSessionRequest(session_id=session_id), session_pb2.GetSessionResponse
        ).session

    def close(self) -> None:
        self.call.cancel()
        self.channel.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Any], Raw]]:
    """Makes raw clients of servers, and closes them."""
    made: list[Raw] = []

    def make(server: Any, token: str = "") -> Raw:
        made.append(Raw(server.address, token))
        return made[-1]

    yield make
    for raw in made:
        raw.close()
