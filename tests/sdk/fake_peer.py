"""A peer that speaks the protocol and misbehaves on demand: for faults that a real server cannot be made to have, and for
measuring the client alone. Its model: y = x + the number of steps before; the state is the count."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np

from engram.v1 import error_pb2, model_pb2, session_pb2, stream_pb2
from engram_service.ports import free_port

WIDTH = 4


@dataclass
class Faults:
    """What to do wrong. `rows(handles, seqs)` may return {row: ErrorDetail} for rows to refuse."""

    drop_replies_after: int | None = None  # steps frames answered before the stream is cut without answering
    cut_after_frames: int | None = None  # steps frames applied, then cut before the answer
    reverse_frames: bool = False  # answers to the rows of one frame in two frames, the later first
    rows: Callable[[list[str], np.ndarray], dict[int, error_pb2.ErrorDetail]] | None = None
    forget_on_connect: Callable[[str, int], int] | None = None  # (id, seq) -> seq after a crash
    stop_at: str = ""  # "read" or "applied": the next steps frame gets so far, waits for `gate`, and goes on, or is cut
    cut: bool = False  # what happens then
    cut_opens: int = 0  # so many opens are not answered: the stream is cut
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    close: list[error_pb2.ErrorDetail] = field(
        default_factory=list
    )  # one for each close frame: refuses all of its rows
    taken: set[str] = field(default_factory=set)  # sessions that another client holds: an attach of them is refused


@dataclass
class Record:
    seq: int = 0
    outputs: dict[int, bytes] = field(default_factory=dict)
    acked: int = 0
    inputs: list[float] = field(default_factory=list)


class FakePeer:
    """One in-process gRPC server."""

    def __init__(self, window: int = 16, width: int = WIDTH, out: int = WIDTH) -> None:
        self.records: dict[str, Record] = {}
        self.faults = Faults()
        self.window = window
        self.width, self.out = width, out
        self.delay_s = 0.0  # before each steps frame is looked at
        self.streams = 0
        self.described = 0
        self.opens: list[stream_pb2.OpenFrame] = []
        self.frames = 0
        self.closes = 0
        self.rows = 0
        self.frame_rows: list[int] = []
        self.port = 0
        self._server: Any = None
        self.writers: list[asyncio.Queue[Any]] = []

    async def start(self, port: int = 0) -> int:
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(
            self.stream,
            request_deserializer=stream_pb2.StreamRequest.FromString,
            response_serializer=stream_pb2.StreamResponse.SerializeToString,
        )
        describe = grpc.unary_unary_rpc_method_handler(
            self.describe,
            request_deserializer=session_pb2.GetModelRequest.FromString,
            response_serializer=session_pb2.GetModelResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "engram.v1.EngramService", {"Stream": handler, "GetModel": describe}
                ),
            )
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port or free_port()}")
        await self._server.start()
        return self.port

    async def stop(self) -> None:
        await self._server.stop(0)

    def model(self) -> model_pb2.Model:
        return model_pb2.Model(
            name="count", version="1", fingerprint="f", generates=self.width == self.out,
            inputs=[model_pb2.TensorSpec(name="x", dtype="float32", shape=[self.width])],
            outputs=[model_pb2.TensorSpec(name="y", dtype="float32", shape=[self.out])],
        )  # fmt: skip

    async def describe(self, request: session_pb2.GetModelRequest, context: Any) -> session_pb2.GetModelResponse:
        self.described += 1
        return session_pb2.GetModelResponse(model=self.model())

    def push(self, response: stream_pb2.StreamResponse) -> None:
        """Says something to every stream."""
        for queue in self.writers:
            queue.put_nowait(response)

    async def stream(self, requests: AsyncIterator[stream_pb2.StreamRequest], context: Any) -> None:
        self.streams += 1
        await context.send_initial_metadata((("engram-server", "fake"),))
        names: list[str] = []
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self.writers.append(queue)
        writer = asyncio.create_task(self._write(queue, context))
        answered = 0
        try:
            async for request in requests:
                kind = request.WhichOneof("frame")
                if kind == "open":
                    self.opens.append(request.open)
                    if self.faults.cut_opens:
                        self.faults.cut_opens -= 1
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                if kind in ("open", "attach"):
                    queue.put_nowait(self._open(getattr(request, kind), names, kind == "attach"))
                elif kind == "close":
                    queue.put_nowait(stream_pb2.StreamResponse(closed=self._close(request.close)))
                elif kind == "steps":
                    if self.delay_s:
                        await asyncio.sleep(self.delay_s)
                    self.frames += 1
                    await self._reach("read", context)
                    answers = self._steps(request.steps, names)
                    await self._reach("applied", context)
                    answered += 1
                    limit = self.faults.cut_after_frames
                    if limit is not None and answered > limit:
                        self.faults.cut_after_frames = None
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                    for answer in answers:
                        queue.put_nowait(answer)
        finally:
            self.writers.remove(queue)
            writer.cancel()

    async def _reach(self, point: str, context: Any) -> None:
        """A steps frame has come so far."""
        faults = self.faults
        if faults.stop_at != point:
            return
        faults.stop_at = ""
        await faults.gate.wait()
        if faults.cut:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    def _close(self, frame: stream_pb2.CloseFrame) -> stream_pb2.ClosedFrame:
        self.closes += 1
        errors = [self.faults.close.pop(0)] * (len(frame.handles) // 4) if self.faults.close else []
        rows = [stream_pb2.RowError(row=row, error=error) for row, error in enumerate(errors)]
        return stream_pb2.ClosedFrame(request_id=frame.request_id, errors=rows)

    async def _write(self, queue: asyncio.Queue[Any], context: Any) -> None:
        while True:
            await context.write(await queue.get())

    def _open(self, frame: Any, names: list[str], attach: bool) -> stream_pb2.StreamResponse:
        handles, seqs, acked, ids = [], [], [], []
        errors: list[stream_pb2.RowError] = []
        for number, given in enumerate(frame.session_ids):
            name = given or f"made-{len(self.records)}-{number}"
            if attach and name in self.faults.taken:
                errors.append(
                    stream_pb2.RowError(row=number, error=error_pb2.ErrorDetail(code=10, reason="TAKEN_OVER"))
                )
            record = self.records.setdefault(name, Record())
            if attach and self.faults.forget_on_connect is not None:
                record.seq = self.faults.forget_on_connect(name, record.seq)
                record.inputs = record.inputs[: record.seq]
            handles.append(len(names))
            names.append(name)
            ids.append(name)
            seqs.append(record.seq)
            acked.append(record.acked)
        opened = stream_pb2.OpenedFrame(
            request_id=frame.request_id, handles=np.array(handles, "<u4").tobytes(), seqs=np.array(seqs, "<u8").tobytes(),
            acknowledged_seqs=np.array(acked, "<u8").tobytes(), created=bytes(len(ids)), session_ids=ids, model=self.model(),
            window=self.window, rows_max=4096, errors=errors,
        )  # fmt: skip
        return stream_pb2.StreamResponse(opened=opened)

    def _steps(self, frame: stream_pb2.StepsFrame, names: list[str]) -> list[stream_pb2.StreamResponse]:
        handles = np.frombuffer(frame.handles, "<u4")
        seqs = np.frombuffer(frame.seqs, "<u8")
        self.rows += len(handles)
        self.frame_rows.append(len(handles))
        inputs = (
            np.frombuffer(frame.inputs, "<f4").reshape(len(handles), -1)
            if frame.inputs
            else np.zeros((len(handles), self.width), "f4")
        )
        acked = np.frombuffer(frame.acknowledged_seqs, "<u8")
        repeats = np.frombuffer(frame.repeats, "<u4") if frame.repeats else np.zeros(len(handles), "<u4")
        flags = np.frombuffer(frame.flags, "u1") if frame.flags else np.zeros(len(handles), "u1")
        bad = self.faults.rows([names[h] for h in handles], seqs) if self.faults.rows else {}
        done: list[tuple[int, int, bytes | None]] = []
        refused: list[tuple[int, int, error_pb2.ErrorDetail]] = []
        for i, handle in enumerate(handles.tolist()):
            record, seq = self.records[names[handle]], int(seqs[i])
            record.acked = max(record.acked, min(int(acked[i]), record.seq))
            for offset in range(int(repeats[i]) + 1):
                step, prefill, fed = seq + offset, flags[i] & 1, offset > 0 or flags[i] & 2
                if i in bad and step > record.seq:
                    refused.append((handle, step, bad[i]))
                elif step > record.seq + 1:
                    refused.append((handle, step, error_pb2.ErrorDetail(code=9, reason="SEQ_GAP", message="gap")))
                elif step <= record.seq:
                    if step <= record.acked and not prefill:
                        refused.append(
                            (handle, step, error_pb2.ErrorDetail(code=9, reason="SEQ_ACKNOWLEDGED", message="gone"))
                        )
                    else:
                        done.append((handle, step, None if prefill else record.outputs[step]))
                else:
                    x = np.frombuffer(record.outputs[record.seq], "<f4") if fed and record.seq else inputs[i]
                    y = np.resize(x, self.out) + np.float32(record.seq)
                    record.inputs.append(float(x[0]))
                    record.seq = step
                    record.outputs[step] = y.astype("<f4").tobytes()
                    record.outputs.pop(step - 4 * self.window, None)
                    done.append((handle, step, None if prefill else record.outputs[step]))
        answers = []
        if refused:
            answers.append(_errors(refused))
        prefills = [row for row in done if row[2] is None]
        loud = [row for row in done if row[2] is not None]
        if prefills:
            answers.append(_outputs(prefills))
        if loud and self.faults.reverse_frames:
            half = len(loud) // 2
            answers += [_outputs(piece) for piece in (loud[half:], loud[:half]) if piece]
        elif loud:
            answers.append(_outputs(loud))
        return answers


class Echo(FakePeer):
    """Answers at once, with arrays alone: the fastest peer, for measuring the client."""

    def _steps(self, frame: stream_pb2.StepsFrame, names: list[str]) -> list[stream_pb2.StreamResponse]:
        rows = len(frame.handles) // 4
        outputs = np.frombuffer(frame.inputs, "<f4").reshape(rows, self.width)[:, : self.out].tobytes()
        frame_out = stream_pb2.OutputsFrame(handles=frame.handles, seqs=frame.seqs, outputs=outputs)
        return [stream_pb2.StreamResponse(outputs=frame_out)]


def _outputs(rows: list[tuple[int, int, bytes | None]]) -> stream_pb2.StreamResponse:
    frame = stream_pb2.OutputsFrame(
        handles=np.array([row[0] for row in rows], "<u4").tobytes(),
        seqs=np.array([row[1] for row in rows], "<u8").tobytes(),
        outputs=b"".join(row[2] or b"" for row in rows),
    )
    return stream_pb2.StreamResponse(outputs=frame)


def _errors(rows: list[tuple[int, int, error_pb2.ErrorDetail]]) -> stream_pb2.StreamResponse:
    frame = stream_pb2.ErrorsFrame(
        handles=np.array([row[0] for row in rows], "<u4").tobytes(),
        seqs=np.array([row[1] for row in rows], "<u8").tobytes(),
        error_indexes=np.arange(len(rows), dtype="<u4").tobytes(),
        errors=[row[2] for row in rows],
    )
    return stream_pb2.StreamResponse(errors=frame)


async def _main() -> None:
    peer = Echo(window=64, width=64, out=16)
    print(await peer.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
