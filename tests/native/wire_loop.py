"""A loop over the native wire, as the service has one, for tests with gRPC's own client."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from engram.v1 import service_pb2_grpc, stream_pb2

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

NONE = 2**64 - 1
WAIT_S = 20.0


class Loop(threading.Thread):
    """Takes what comes. It answers steps with their inputs, messages with themselves, and the end of them with OK, unless told not to."""

    def __init__(self, listener: socket.socket | None = None, answers: bool = True, **limits: Any) -> None:
        super().__init__(daemon=True)
        self.wire = native.Wire(**limits)
        listener = listener or socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = "" if listener.family == socket.AF_UNIX else f"127.0.0.1:{listener.getsockname()[1]}"
        self.wire.listen(listener.detach())
        self.answers = answers
        self.rows: list[tuple[int, ...]] = []  # call, handle, seq, acknowledged, flags, timeout, input bytes
        self.inputs = bytearray()
        self.times: list[list[float]] = []
        self.events: list[Any] = []
        self._ended = False
        self.start()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.wire.descriptor, selectors.EVENT_READ)
            while not self._ended:
                rows, _, events = self.wire.take()
                if rows or events:
                    self._step(rows, events)
                else:
                    selector.select(0.1)

    def _step(self, rows: int, events: list[Any]) -> None:
        kinds = (np.uint32, np.uint32, np.uint64, np.uint64, np.uint8, np.uint32, np.uint32)
        columns = [np.empty(rows, kind) for kind in kinds]
        inputs = np.empty(self.wire.input_nbytes, np.uint8)
        times = np.empty((rows, 4))
        self.wire.columns(*columns, inputs, times)
        self.times += times.tolist()
        if self.answers:
            widths, start = columns[-1], 0
            for part in np.split(np.arange(rows), np.flatnonzero(np.diff(widths)) + 1) if rows else []:
                nbytes = int(widths[part].sum())
                outputs = inputs[start : start + nbytes]
                self.wire.answer(*(column[part] for column in columns[:3]), outputs, np.empty(0, np.uint64))
                start += nbytes
        self.rows += zip(*(column.tolist() for column in columns), strict=True)
        self.inputs += memoryview(inputs)
        for event in events:
            if self.answers and event.kind == "message":
                self.wire.send(event.call, event.data)
            if self.answers and event.kind == "half_close":
                self.wire.finish(event.call)
            self.events.append(event)

    def until(self, what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not (found := what()):
            assert time.monotonic() < deadline, (self.rows[-3:], [event.kind for event in self.events[-9:]])
            time.sleep(0.005)
        return found

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def close(self) -> None:
        self._ended = True
        self.join()
        self.wire.close()


@contextlib.contextmanager
def channel(loop: Loop, **options: Any) -> Iterator[grpc.Channel]:
    pairs = [("grpc.use_local_subchannel_pool", 1), *options.items()]
    with grpc.insecure_channel(loop.address, options=pairs) as made:
        yield made


def frame(handles: list[int], seqs: list[int], inputs: bytes, **more: Any) -> stream_pb2.StreamRequest:
    steps = stream_pb2.StepsFrame(
        handles=np.array(handles, np.uint32).tobytes(), seqs=np.array(seqs, np.uint64).tobytes(), inputs=inputs, **more
    )
    return stream_pb2.StreamRequest(steps=steps)


def stream(made: grpc.Channel, requests: Any, **more: Any) -> Any:
    return service_pb2_grpc.EngramServiceStub(made).Stream(requests, **more)  # type: ignore[no-untyped-call]


def unary(made: grpc.Channel, data: bytes = b"", **more: Any) -> bytes:
    return bytes(made.unary_unary("/some.Service/Call")(data, **{"timeout": WAIT_S, **more}))


def code_of(work: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    error: Any = caught.value
    return error.code(), error.details()
