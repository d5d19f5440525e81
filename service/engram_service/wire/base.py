"""A wire: the rows of steps that streams bring as columns, everything else as events, and the way back for answers.

The step loop calls it, from one thread. `native.py` is the extension's, `grpcio.py` runs where there is no extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from engram_service.auth.tokens import Caller
from engram_service.errors import ServiceError
from engram_service.rows import Rows

CALL = 1 << 31  # in a stream's id: a row of the server's own stream (number 0) that a unary call brought
NUMBER_BITS = 20  # of a stream's id; a number is used again, and the bits above it count the uses
NOT_ACKNOWLEDGED = np.uint64(0xFFFFFFFFFFFFFFFF)
FIRST = 0x80  # in `flags`: the row begins a frame
PREFILL = 1
FEEDBACK = 2
FLAGS_KNOWN = PREFILL | FEEDBACK
READ, COMPLETE, TAKEN, ADMITTED = range(4)  # in `times`: the first bytes of the row's frame, all of them, and so on


@dataclass(slots=True)
class Arrived:
    """Rows of StepsFrames, of any streams, each stream's in order. Of unary calls each has CALL and the call's number for a stream;
    its seq is 0 where the caller wants the next step."""

    streams: NDArray[np.uint32]
    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    acknowledged: NDArray[np.uint64]  # or NOT_ACKNOWLEDGED
    flags: NDArray[np.uint8]
    timeouts_ms: NDArray[np.uint32]  # 0: none
    input_nbytes: NDArray[np.uint32]
    inputs: NDArray[np.uint8]  # of all rows, one behind the other
    times: NDArray[np.float64]  # [n, 4], seconds of time.monotonic; ADMITTED is admission's

    def __len__(self) -> int:
        return len(self.streams)

    def part(self, start: int, stop: int) -> Arrived:
        """Rows start .. stop."""
        if start == 0 and stop == len(self):
            return self
        first = int(self.input_nbytes[:start].sum(dtype=np.int64))
        last = first + int(self.input_nbytes[start:stop].sum(dtype=np.int64))
        rows = slice(start, stop)
        return Arrived(self.streams[rows], self.handles[rows], self.seqs[rows], self.acknowledged[rows], self.flags[rows],
                       self.timeouts_ms[rows], self.input_nbytes[rows], self.inputs[first:last],
                       self.times[rows])  # fmt: skip

    def without_inputs(self, index: Any) -> Arrived:
        """Some of the rows, by an array, a mask or a slice."""
        return Arrived(self.streams[index], self.handles[index], self.seqs[index], self.acknowledged[index], self.flags[index],
                       self.timeouts_ms[index], self.input_nbytes[index], self.inputs[:0], self.times[index])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Begin:
    """A stream has come, and its caller is known."""

    stream: int
    caller: Caller
    peer: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A frame that is none of steps, or of steps that are not like most."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class HalfClose:
    """The client will send no more."""

    stream: int


@dataclass(frozen=True, slots=True)
class End:
    """The stream is over, in whichever way. Nothing of it comes after this."""

    stream: int


@dataclass(frozen=True, slots=True)
class Step:
    """A unary Step, whole, that is no row."""

    call: int
    caller: Caller
    peer: str
    data: bytes
    timeout_ms: int | None


@dataclass(frozen=True, slots=True)
class StepModel:
    """What must be known of a model to read and answer unary steps."""

    name: str
    version: str
    takes: Rows
    gives: Rows


Event: TypeAlias = Begin | Message | HalfClose | End | Step


def trace_of(metadata: Iterable[tuple[str, Any]]) -> str:
    """The trace id of a W3C traceparent header; empty if there is none."""
    for key, value in metadata:
        if key == "traceparent" and isinstance(value, str) and len(value.split("-")) == 4:
            return value.split("-")[1]
    return ""


class Wire(Protocol):
    """Connections of clients."""

    name: str  # "native" or "python"

    def counters(self) -> Mapping[str, int]:
        """What it has counted; observability/wire_metrics.py has the names."""

    def start(self, wake: Callable[[], None], turn: Callable[[], None]) -> None:
        """When there is something to take, after a `take` that found nothing, either `wake` is called on the event loop, from
        within another callback, or `turn` is one itself."""

    def take(self) -> tuple[Arrived | None, Sequence[tuple[int, Event]]]:
        """All that has come: rows, if there are some, and events, each with how many of these rows came before it."""

    def answer(
        self, streams: NDArray[np.uint32], handles: NDArray[np.uint32], seqs: NDArray[np.uint64],
        outputs: NDArray[np.uint8] | None, durable: NDArray[np.uint64] | None,
    ) -> None:  # fmt: skip
        """Answers rows. outputs: uint8 [rows, nbytes]; None: they wanted none. durable: seqs; None: each row is durable.
        Those of one stream go in one frame, in their order. Of streams that are over nothing is sent."""

    def written(self) -> tuple[Sequence[int], float]:
        """How long answers took from `answer` to the kernel: rows by bucket of stages.EDGES, and seconds in all."""

    def expect(self, stream: int, rows: int) -> None:
        """So many more rows of a stream are under way than the wire has brought."""

    def send(self, stream: int, response: Proto, rows: int) -> None:
        """Sends a frame that answers so many rows."""

    def finish(self, stream: int, refusal: ServiceError | None = None) -> None:
        """Ends a stream behind what was sent to it; None: with OK. A row of a unary call is refused so."""

    def know(self, key: str, handle: int, model: StepModel) -> None:
        """Unary steps of this session may be rows from now on, with this handle of the server's own stream."""

    def forget(self, handle: int) -> None:
        """This handle is void: unary steps of its session are events."""

    def again(self, stream: int, given: bool, numbered: bool) -> bool:
        """Makes an event of a unary call's row after all, where the caller has given its seq and `given`, or has given none and
        `numbered`. False: it is to be refused."""
