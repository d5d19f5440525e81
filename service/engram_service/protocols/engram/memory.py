"""The RPCs of memories: patterns stored, recalled and forgotten; an NTM's memory addressed; inputs recreated.

Each method takes a request and its call, returns the response and raises ServiceError; server.py maps it. What is worked
out happens in threads of its own, so that the step loop does not wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram.v1 import memory_pb2 as pb
from engram_models import LABEL_BYTES_MAX, PatternMemory, Recalled
from engram_service.auth.tenants import tenant_of
from engram_service.errors import FailedPreconditionError, InvalidArgumentError
from engram_service.niceness import give_way
from engram_service.observability.metrics import Metrics
from engram_service.offers import Offer, Offers
from engram_service.patterns.chunks import width_of
from engram_service.patterns.memories import Memories
from engram_service.protocols.engram.call import Call
from engram_service.protocols.engram.turns import Turns
from engram_service.protocols.engram.unary import UnaryHandlers, place_of
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.ids import check_id
from engram_service.settings import Settings

_OPERATION_NBYTES = 16
_CUES_MAX = 4096
_SWEEPS_DEFAULT, _SWEEPS_MAX = 100, 10_000
_PAGE_DEFAULT, _PAGE_MAX = 1000, 100_000

T = TypeVar("T")


class MemoryHandlers:
    """One method for each RPC of memory.proto."""

    def __init__(
        self, settings: Settings, offers: Offers, metrics: Metrics, calls: StoreCalls, unary: UnaryHandlers,
        memories: Memories,
    ) -> None:  # fmt: skip
        self._offers = offers
        self._metrics = metrics
        self._calls = calls
        self._unary = unary
        self._memories = memories
        waiting = settings.memory_calls_max
        limits = (waiting, max(1, waiting // 2) if settings.tokens_file else waiting)
        workers = settings.memory_workers
        self._turns = Turns("calls on memories", workers, workers, *limits)
        self._query_turns = Turns("calls that compute", 1, 1, *limits)
        self._patterns = ThreadPoolExecutor(workers, "memory", give_way)
        self._queries = ThreadPoolExecutor(1, "query", give_way)

    def close(self) -> None:
        for pool in (self._patterns, self._queries):
            pool.shutdown(wait=False, cancel_futures=True)

    async def store_patterns(self, request: pb.StorePatternsRequest, call: Call) -> pb.StorePatternsResponse:
        operation = _operation(request.operation_id)
        bits = _rows(request.patterns, request.size, "patterns")
        labels = list(request.labels)
        if not len(bits):
            raise InvalidArgumentError("INVALID_PATTERN", "no patterns; give at least one")
        if labels and len(labels) != len(bits):
            raise InvalidArgumentError(
                "INVALID_PATTERN", f"{len(bits)} patterns and {len(labels)} labels; give one each, or none"
            )
        _check_labels(labels)
        done = await self._call(
            call.left_s, self._memories.store, request.session_id, operation, request.size, bits, labels
        )
        self._metrics.patterns.labels("stored").inc(done.rows)
        return pb.StorePatternsResponse(
            stored=done.rows, first_number=done.first, count=done.summary.count, load=done.summary.load,
            warning=done.warning,
        )  # fmt: skip

    async def forget_patterns(self, request: pb.ForgetPatternsRequest, call: Call) -> pb.ForgetPatternsResponse:
        operation = _operation(request.operation_id)
        if request.all == bool(request.labels):
            raise InvalidArgumentError("INVALID_ARGUMENT", "give the labels to forget, or all, and not both")
        labels = None if request.all else list(request.labels)
        done = await self._call(call.left_s, self._memories.forget, request.session_id, operation, labels)
        self._metrics.patterns.labels("forgotten").inc(done.rows)
        return pb.ForgetPatternsResponse(forgotten=done.rows, count=done.summary.count, load=done.summary.load)

    async def recall(self, request: pb.RecallRequest, call: Call) -> pb.RecallResponse:
        cues = _cues(request)
        sweeps_max = _sweeps(request.sweeps_max or _SWEEPS_DEFAULT)
        started = time.perf_counter()
        model, found = await self._call(
            call.left_s, self._memories.recall, request.session_id, cues, request.synchronous, request.seed, sweeps_max
        )
        self._observe(model, found, time.perf_counter() - started)
        return _recalled(found, request.size)

    async def list_patterns(self, request: pb.ListPatternsRequest, call: Call) -> pb.ListPatternsResponse:
        count = min(request.page_size or _PAGE_DEFAULT, _PAGE_MAX)
        start = place_of(request.page_token)
        labels, bits, summary = await self._call(call.left_s, self._memories.page, request.session_id, start, count)
        end = start + len(labels)
        return pb.ListPatternsResponse(
            labels=labels, patterns=bits.tobytes() if request.with_patterns else b"",
            next_page_token=str(end) if labels and end < summary.count else "", count=summary.count, load=summary.load,
            size=summary.size, rule=summary.rule,
        )  # fmt: skip

    async def address_memory(self, request: pb.AddressMemoryRequest, call: Call) -> pb.AddressMemoryResponse:
        info = await self._unary.committed(request.session_id, call.left_s)
        served, state = self._unary.state_of(info)
        spec = served.queries.addressable
        if spec is None:
            message = f"{served.reference} is of kind {served.bundle.kind}, whose state has no memory to address"
            raise FailedPreconditionError("UNSUPPORTED_OPERATION", message)
        slots, width = spec.shape
        keys = _floats(request.keys, width, "keys")
        strengths = _floats(request.strengths, 1, "strengths")[:, 0]
        if len(keys) != len(strengths) or not len(keys):
            message = f"{len(keys)} keys and {len(strengths)} strengths; give one or more keys, and a strength for each"
            raise InvalidArgumentError("INVALID_ARGUMENT", message)
        weightings, reads = await self._query(call, served.queries.address, state, keys, strengths)
        return pb.AddressMemoryResponse(
            seq=info.seq, weightings=weightings.tobytes(), reads=reads.tobytes(), slots=slots, width=width
        )

    async def recreate(self, request: pb.RecreateRequest, call: Call) -> pb.RecreateResponse:
        served = await self._model_of(request)
        if not served.queries.recreates:
            message = f"{served.reference} is of kind {served.bundle.kind}, which recreates no inputs; rbm and dbn do"
            raise FailedPreconditionError("UNSUPPORTED_OPERATION", message)
        inputs = _floats(request.inputs, served.bundle.schema.inputs[0].size, "inputs")
        unknown = _unknown_units(request.unknown, inputs)
        sweeps = _sweeps(request.sweeps or 1)
        try:
            recreations, energies = await self._query(call, served.queries.recreate, inputs, unknown, sweeps)
        except ValueError as error:
            raise InvalidArgumentError("INVALID_ARGUMENT", str(error)) from error
        return pb.RecreateResponse(recreations=recreations.tobytes(), energies=energies.tobytes())

    async def _model_of(self, request: pb.RecreateRequest) -> Offer:
        if bool(request.session_id) == bool(request.model):
            raise InvalidArgumentError("INVALID_ARGUMENT", "give a model or a session, and not both")
        if request.model:
            return self._offers.resolve(request.model, request.version)
        info = await self._unary.info(request.session_id)
        return self._offers.resolve(info.model, info.version)

    async def _call(self, left_s: float, work: Callable[..., T], session_id: str, *arguments: Any) -> T:
        check_id(session_id)
        deadline = time.monotonic() + left_s
        async with self._turns.turn(tenant_of(session_id), left_s):
            done: T = await self._calls.call(deadline, work, session_id, *arguments, pool=self._patterns)
            return done

    async def _query(self, call: Call, work: Callable[..., T], *arguments: Any) -> T:
        async with self._query_turns.turn(call.tenant, call.left_s):
            return await asyncio.get_running_loop().run_in_executor(self._queries, work, *arguments)

    def _observe(self, model: str, found: Sequence[Recalled], seconds: float) -> None:
        metrics = self._metrics
        metrics.recall_seconds.observe(seconds)
        metrics.recall_cues.observe(len(found))
        unsettled = sum(not one.converged for one in found)
        spurious = sum(one.converged and one.spurious for one in found)
        counts = {"unsettled": unsettled, "spurious": spurious, "stored": len(found) - unsettled - spurious}
        for outcome, count in counts.items():
            metrics.recalls.labels(model, outcome).inc(count)


def _operation(operation_id: bytes) -> bytes:
    if len(operation_id) != _OPERATION_NBYTES:
        raise InvalidArgumentError("INVALID_ARGUMENT", f"operation_id has {_OPERATION_NBYTES} bytes, random ones")
    return operation_id


def _rows(data: bytes, size: int, what: str) -> NDArray[np.uint8]:
    """Patterns uint8 [n, ceil(size / 8)] out of a column."""
    width = width_of(size)
    if not size or len(data) % width:
        raise InvalidArgumentError(
            "INVALID_PATTERN", f"{what}: {len(data)} bytes are not whole patterns of {size} bits, {width} bytes each"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, width)


def _check_labels(labels: Sequence[str]) -> None:
    for row, label in enumerate(labels):
        if not label or not label.isprintable() or len(label.encode()) > LABEL_BYTES_MAX:
            message = f"pattern {row}: the label is 1 to {LABEL_BYTES_MAX} bytes of UTF-8 without control characters"
            raise InvalidArgumentError("INVALID_PATTERN", message)


def _cues(request: pb.RecallRequest) -> NDArray[np.int8]:
    """Cues int8 [n, size]: -1, +1, and 0 where a bit is unknown."""
    bits = _rows(request.cues, request.size, "cues")
    if not len(bits):
        raise InvalidArgumentError("INVALID_PATTERN", "no cues; give at least one")
    if len(bits) > _CUES_MAX:
        raise InvalidArgumentError("FRAME_TOO_LARGE", f"{len(bits)} cues in one call; send at most {_CUES_MAX}")
    cues = PatternMemory.unpack(bits, request.size)
    if request.unknown:
        unknown = _rows(request.unknown, request.size, "unknown")
        if len(unknown) != len(bits):
            raise InvalidArgumentError(
                "INVALID_PATTERN", f"{len(bits)} cues and {len(unknown)} masks; give one for each"
            )
        cues[np.unpackbits(unknown, axis=1, count=request.size).view(np.bool_)] = 0
    return cues


def _recalled(found: Sequence[Recalled], size: int) -> pb.RecallResponse:
    def column(values: Sequence[Any], dtype: str) -> bytes:
        return np.array(values, dtype).tobytes()

    return pb.RecallResponse(
        patterns=PatternMemory.pack(np.stack([one.pattern for one in found]), size).tobytes(),
        labels=[one.label for one in found],
        overlaps=column([one.overlap for one in found], "<f8"),
        distances=column([one.distance for one in found], "<u4"),
        sweeps=column([one.sweeps for one in found], "<u4"),
        converged=column([one.converged for one in found], "u1"),
        spurious=column([one.spurious for one in found], "u1"),
        energies=np.concatenate([one.energies for one in found]).astype("<f8").tobytes(),
    )


def _sweeps(sweeps: int) -> int:
    if sweeps > _SWEEPS_MAX:
        raise InvalidArgumentError("INVALID_ARGUMENT", f"{sweeps} sweeps; at most {_SWEEPS_MAX}")
    return sweeps


def _floats(data: bytes, width: int, what: str) -> NDArray[np.float32]:
    """float32 [n, width] out of a column."""
    if len(data) % (4 * width):
        raise InvalidArgumentError(
            "INVALID_INPUT_WIDTH", f"{what}: {len(data)} bytes are not whole rows of {width} float32"
        )
    values = np.frombuffer(data, "<f4").reshape(-1, width)
    if not np.isfinite(values).all():
        raise InvalidArgumentError(
            "NON_FINITE_INPUT", f"{what}: row {np.argmin(np.isfinite(values).all(1))} is not finite"
        )
    return values.astype(np.float32)


def _unknown_units(data: bytes, inputs: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    if not len(inputs):
        raise InvalidArgumentError("INVALID_INPUT_WIDTH", "no inputs; give at least one")
    if not data:
        return None
    if len(data) != inputs.size:
        raise InvalidArgumentError(
            "INVALID_INPUT_WIDTH", f"unknown has {len(data)} bytes; {inputs.size} units are asked for"
        )
    return np.frombuffer(data, np.uint8).reshape(inputs.shape).astype(np.bool_)
