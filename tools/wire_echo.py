"""The native wire with nothing behind it: each step, of a stream or unary, is answered at once, without a model or a store. A
ceiling for benchmarks.

Prints its address, and serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import sys

import engram_native
import numpy as np

from engram.v1 import model_pb2, session_pb2, stream_pb2

WINDOW, ROWS_MAX = 64, 8192  # as a server says them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=16, help="numbers of an output")
    args = parser.parse_args()
    wire = engram_native.Wire()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    wire.listen(listener.detach())
    unary = session_pb2.StepResponse(raw_outputs=bytes(4 * args.outputs)).SerializeToString()
    sessions: dict[str, int] = {}  # of unary steps: the next ones are rows
    with selectors.DefaultSelector() as selector:
        selector.register(wire.descriptor, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            rows, _, events = wire.take()
            if not rows and not events:
                if any(key.fileobj is sys.stdin for key, _ in selector.select()):
                    return 0
                continue
            if rows:
                answer(wire, rows, 4 * args.outputs)
            for event in events:
                if event.kind == "step":
                    know(wire, sessions, event, 4 * args.outputs)
                    wire.respond(event.call, unary)
                elif event.kind == "message":
                    opened(wire, event)
                elif event.kind == "half_close":
                    wire.finish(event.call)


def answer(wire: engram_native.Wire, rows: int, nbytes: int) -> None:
    calls, handles, timeouts, widths = (np.empty(rows, np.uint32) for _ in range(4))
    seqs, acknowledged = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
    flags, inputs = np.empty(rows, np.uint8), np.empty(wire.input_nbytes, np.uint8)
    wire.columns(calls, handles, seqs, acknowledged, flags, timeouts, widths, inputs, np.empty((rows, 4)))
    wire.answer(calls, handles, seqs, np.zeros(rows * nbytes, np.uint8), np.empty(0, np.uint64))


def know(wire: engram_native.Wire, sessions: dict[str, int], event: engram_native.Event, nbytes: int) -> None:
    request = session_pb2.StepRequest.FromString(event.data)
    handle = sessions.setdefault(request.session_id, len(sessions))
    model = engram_native.StepModel(
        request.model, "1", takes=(len(request.raw_inputs), False), gives=(nbytes, False), shape=[1, nbytes // 4]
    )
    wire.know("", request.session_id, handle, model)


def opened(wire: engram_native.Wire, event: engram_native.Event) -> None:
    request = stream_pb2.StreamRequest.FromString(event.data)
    if request.WhichOneof("frame") != "open":
        return
    count = len(request.open.session_ids)
    zeros = np.zeros(count, np.uint64).tobytes()
    frame = stream_pb2.OpenedFrame(
        request_id=request.open.request_id, handles=np.arange(count, dtype=np.uint32).tobytes(), seqs=zeros,
        acknowledged_seqs=zeros, created=bytes(count), model=model_pb2.Model(name=request.open.model), window=WINDOW,
        rows_max=ROWS_MAX,
    )  # fmt: skip
    wire.send(event.call, stream_pb2.StreamResponse(opened=frame).SerializeToString())


if __name__ == "__main__":
    sys.exit(main())
