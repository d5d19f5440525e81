"""gRPC's grpc.testing.TestService on the bare wire, for clients that are not ours; beside it, steps of streams are answered with their inputs.

A process of its own, so that its memory is its own: prints its address, and serves until its standard input ends. A line there is a
command: `counters` prints the wire's counters as JSON; `drain`; `replace` listens with a new wire on the same port, then drains the old.

What the wire cannot do is not here: metadata of a call's own in the response (custom_metadata), and telling whether a message came
compressed (the probes of client_compressed_unary). What a call sends as x-grpc-test-echo comes back as the body of its answer instead.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engram_native
import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
pb: Any = grpc.protos("testing.proto")

SERVICE, STREAM, ECHO = "/grpc.testing.TestService/", "/engram.v1.EngramService/Stream", "x-grpc-test-echo"


@dataclass
class Call:
    """A call that is not over."""

    answer: Callable[[int, Call, bool], None]
    echo: str
    messages: list[bytes] = field(default_factory=list)


class Service:
    """One wire and its calls."""

    def __init__(self, listener: socket.socket, name: str, limits: dict[str, float], tls: list[Path]) -> None:
        self.name = name
        self.wire = engram_native.Wire(**limits)  # type: ignore[arg-type]
        if tls:
            self.wire.set_tls(*(path.read_bytes() for path in tls))
        self.wire.listen(listener.dup().detach())
        self._calls: dict[int, Call] = {}
        methods = {"EmptyCall": self._empty, "UnaryCall": self._unary, "StreamingInputCall": self._sum}
        methods |= {"StreamingOutputCall": self._duplex, "FullDuplexCall": self._duplex}
        self._methods = {SERVICE + name: answer for name, answer in methods.items()}

    def take(self) -> bool:
        """Answers what has come; whether there was something."""
        rows, _, events = self.wire.take()
        if rows:
            self._step(rows)
        for event in events:
            if event.kind == "begin":
                echo = dict(event.metadata).get(ECHO, "")
                if answer := self._methods.get(event.path):
                    self._calls[event.call] = Call(answer, echo)
                elif event.path != STREAM:
                    self.wire.finish(event.call, 12, "there is no such method")
            elif event.kind == "end":
                self._calls.pop(event.call, None)
            elif call := self._calls.get(event.call):
                if event.kind == "message":
                    call.messages.append(event.data)
                call.answer(event.call, call, event.kind == "half_close")
            elif event.kind == "half_close":
                self.wire.finish(event.call)
        return bool(rows or events)

    def _step(self, rows: int) -> None:
        calls, handles, timeouts, widths = (np.empty(rows, np.uint32) for _ in range(4))
        seqs, acknowledged = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        flags, inputs = np.empty(rows, np.uint8), np.empty(self.wire.input_nbytes, np.uint8)
        self.wire.columns(calls, handles, seqs, acknowledged, flags, timeouts, widths, inputs, np.empty((rows, 4)))
        start = 0
        for part in np.split(np.arange(rows), np.flatnonzero(np.diff(widths)) + 1):
            end = start + int(widths[part].sum())
            self.wire.answer(calls[part], handles[part], seqs[part], inputs[start:end], np.empty(0, np.uint64))
            start = end

    def _empty(self, number: int, call: Call, closed: bool) -> None:
        if closed:
            self.wire.send(number, b"")
            self.wire.finish(number)

    def _unary(self, number: int, call: Call, closed: bool) -> None:
        if not closed:
            return
        request = pb.SimpleRequest.FromString(call.messages[0])
        if not self._failed(number, request):
            payload = pb.Payload(body=call.echo.encode() or bytes(request.response_size))
            named = self.name if request.fill_server_id else ""
            self.wire.send(number, pb.SimpleResponse(payload=payload, server_id=named).SerializeToString())
            self.wire.finish(number)

    def _sum(self, number: int, call: Call, closed: bool) -> None:
        if closed:
            total = sum(len(pb.StreamingInputCallRequest.FromString(data).payload.body) for data in call.messages)
            self.wire.send(number, pb.StreamingInputCallResponse(aggregated_payload_size=total).SerializeToString())
            self.wire.finish(number)

    def _duplex(self, number: int, call: Call, closed: bool) -> None:
        for data in call.messages:
            request = pb.StreamingOutputCallRequest.FromString(data)
            if self._failed(number, request):
                break
            for wanted in request.response_parameters:
                payload = pb.Payload(body=bytes(wanted.size))
                self.wire.send(number, pb.StreamingOutputCallResponse(payload=payload).SerializeToString())
        call.messages.clear()
        if closed:
            self.wire.finish(number)

    def _failed(self, number: int, request: Any) -> bool:
        status = request.response_status
        if status.code:
            self.wire.finish(number, status.code, status.message)
        return bool(status.code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", type=Path, nargs=2, default=[], metavar=("CERTIFICATE", "KEY"))
    parser.add_argument("--limits", type=json.loads, default={}, help="parameters of the wire, as JSON")
    args = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    services = [Service(listener, "wire 0", args.limits, args.tls)]
    with selectors.DefaultSelector() as selector:
        selector.register(services[0].wire.descriptor, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            taken = [service.take() for service in services]
            if any(taken):
                continue
            if not any(key.fileobj is sys.stdin for key, _ in selector.select()):
                continue
            commands = os.read(sys.stdin.fileno(), 4096).decode().split()
            if not commands:
                return 0
            for command in commands:
                if command == "replace":
                    services.append(Service(listener, f"wire {len(services)}", args.limits, args.tls))
                    selector.register(services[-1].wire.descriptor, selectors.EVENT_READ)
                    services[-2].wire.drain()
                elif command == "drain":
                    services[-1].wire.drain()
                elif command == "counters":
                    print(json.dumps([service.wire.counters() for service in services]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
