"""Memories of sessions: store, recall, forget, what there is, an NTM's memory by content, recreations. By unary calls.

_manage.py offers these by session id, _session.py on an open session. Calls that are too large for one message are several:
a store then takes back what it did if a later part is refused. A change carries a random id, so that it is applied once
however often the connection is lost. What the caller gives is packed when the call is made, not when it is awaited.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._errors import RETRYABLE, EngramError, InvalidInputError
from engram._patterns import CUE, Bits, Patterns, Recall, Recreation, Stored, bits_of, check_labels, recalls_of
from engram._unary import Unary
from engram._values import array_of, hidden_of, narrowed
from engram.v1 import memory_pb2 as pb

log = logging.getLogger(__name__)

_PART_BYTES = 4 << 20
_RECALL_CUES = 128
_RECALLS_AT_ONCE = 4
_PAGE = 50_000
_FORGET_LABELS = 100_000


async def refused(error: EngramError) -> Any:
    """What is wrong with the arguments of a call is raised where it is awaited."""
    raise error


def store(
    unary: Unary, session_id: str, patterns: ArrayLike, labels: Sequence[str] | str | None, timeout: float | None
) -> Coroutine[Any, Any, Stored]:
    """See Session.store."""
    try:
        packed = bits_of(patterns)
        return _store(unary, session_id, packed, check_labels(labels, len(packed.bits)), timeout)
    except EngramError as error:
        return refused(error)


async def _store(unary: Unary, session_id: str, packed: Bits, names: list[str], timeout: float | None) -> Stored:
    rows = max(1, _PART_BYTES // (packed.bits.shape[1] + (max(map(len, names)) if names else 0)))
    stored: list[str] = []
    response = pb.StorePatternsResponse()
    for start in range(0, len(packed.bits), rows):
        part = slice(start, start + rows)
        request = pb.StorePatternsRequest(
            session_id=session_id, operation_id=secrets.token_bytes(16), size=packed.size,
            patterns=packed.bits[part].tobytes(), labels=names[part],
        )  # fmt: skip
        try:
            response = await unary("StorePatterns", request, pb.StorePatternsResponse, timeout)
        except EngramError as error:
            if stored and error.code not in RETRYABLE:
                await forget(unary, session_id, stored, False, timeout)
            raise
        first = response.first_number
        stored += names[part] or [f"p{number}" for number in range(first, first + response.stored)]
    if response.warning:
        log.warning("session %s: %s", session_id, response.warning)
    return Stored(stored, response.count, response.load, response.warning)


async def forget(
    unary: Unary, session_id: str, labels: Sequence[str] | str | None, everything: bool, timeout: float | None
) -> int:
    """See Session.forget."""
    names = [labels] if isinstance(labels, str) else list(labels or [])
    if everything == bool(names):
        raise InvalidInputError("forget takes labels, or all=True, and not both", reason="INVALID_ARGUMENT")
    forgotten = 0
    for start in range(0, max(1, len(names)), _FORGET_LABELS):
        request = pb.ForgetPatternsRequest(
            session_id=session_id, operation_id=secrets.token_bytes(16), labels=names[start : start + _FORGET_LABELS],
            all=everything,
        )  # fmt: skip
        response = await unary("ForgetPatterns", request, pb.ForgetPatternsResponse, timeout)
        forgotten += response.forgotten
    return forgotten


def recall(
    unary: Unary, session_id: str, cue: ArrayLike, mask: ArrayLike | None, synchronous: bool, seed: int,
    sweeps_max: int, timeout: float | None,
) -> Coroutine[Any, Any, Any]:  # fmt: skip
    """See Session.recall."""
    try:
        return _recall(unary, session_id, bits_of(cue, mask, CUE), synchronous, seed, sweeps_max, timeout)
    except EngramError as error:
        return refused(error)


async def _recall(
    unary: Unary, session_id: str, cues: Bits, synchronous: bool, seed: int, sweeps_max: int,
    timeout: float | None,
) -> Any:  # fmt: skip
    if not 0 <= seed < 1 << 64 or not 1 <= sweeps_max < 1 << 32:
        raise InvalidInputError("seed is a whole number from 0, sweeps_max one from 1", reason="INVALID_ARGUMENT")
    rows = max(1, min(_RECALL_CUES, _PART_BYTES // cues.bits.shape[1]))
    room = asyncio.Semaphore(_RECALLS_AT_ONCE)

    async def one(part: slice) -> list[Recall]:
        request = pb.RecallRequest(
            session_id=session_id, size=cues.size, cues=cues.bits[part].tobytes(), synchronous=synchronous, seed=seed,
            unknown=b"" if cues.unknown is None else cues.unknown[part].tobytes(), sweeps_max=sweeps_max,
        )  # fmt: skip
        async with room:
            return recalls_of(await unary("Recall", request, pb.RecallResponse, timeout), cues)

    parts = [slice(start, start + rows) for start in range(0, len(cues.bits), rows)]
    tasks = [asyncio.ensure_future(one(part)) for part in parts]
    try:
        found = [hit for hits in await asyncio.gather(*tasks) for hit in hits]
    finally:
        for task in tasks:
            task.cancel()
    return found[0] if cues.single else found


async def patterns(unary: Unary, session_id: str, values: bool, timeout: float | None) -> Patterns:
    """See Session.patterns."""
    labels: list[str] = []
    pieces: list[NDArray[np.int8]] = []
    token = ""
    while True:
        request = pb.ListPatternsRequest(session_id=session_id, page_size=_PAGE, page_token=token, with_patterns=values)
        page = await unary("ListPatterns", request, pb.ListPatternsResponse, timeout)
        labels += page.labels
        if values:
            bits = np.frombuffer(page.patterns, np.uint8).reshape(len(page.labels), -(-page.size // 8))
            pieces.append(Bits(bits, None, page.size, np.dtype(np.int8), False, False).written(bits))
        token = page.next_page_token
        if not token:
            found = np.concatenate(pieces) if values else None
            return Patterns(labels, found, page.load, page.size, page.rule)


def address(
    unary: Unary, session_id: str, key: ArrayLike, strength: ArrayLike, timeout: float | None
) -> Coroutine[Any, Any, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """See Session.address."""
    try:
        keys, strengths = _floats(key, "key"), _floats(strength, "strength")
    except EngramError as error:
        return refused(error)
    return _address(unary, session_id, keys, strengths, timeout)


async def _address(
    unary: Unary, session_id: str, keys: NDArray[np.float32], strengths: NDArray[np.float32],
    timeout: float | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    rows = np.atleast_2d(keys)
    each = strengths if strengths.ndim else np.broadcast_to(strengths, len(rows))
    request = pb.AddressMemoryRequest(
        session_id=session_id, keys=rows.astype("<f4").tobytes(), strengths=each.astype("<f4").tobytes()
    )
    response = await unary("AddressMemory", request, pb.AddressMemoryResponse, timeout)
    weightings = np.frombuffer(response.weightings, "<f4").reshape(-1, response.slots)
    reads = np.frombuffer(response.reads, "<f4").reshape(-1, response.width)
    return (weightings[0], reads[0]) if keys.ndim == 1 else (weightings, reads)


def recreate(
    unary: Unary, of: dict[str, str], x: ArrayLike, mask: ArrayLike | None, sweeps: int, timeout: float | None
) -> Coroutine[Any, Any, Recreation]:
    """See Session.recreate. `of`: the request's session_id, or model and version."""
    try:
        x, hidden = hidden_of(x)
        if hidden is not None:
            x = np.where(hidden, np.zeros_like(x), x)  # what is behind the mask is not looked at
        inputs = _floats(x, "x")
        unknown = _unknown(mask, hidden, inputs)
    except EngramError as error:
        return refused(error)
    return _recreate(unary, of, inputs, unknown, sweeps, timeout)


async def _recreate(
    unary: Unary, of: dict[str, str], inputs: NDArray[np.float32], unknown: bytes, sweeps: int,
    timeout: float | None,
) -> Recreation:  # fmt: skip
    if not 1 <= sweeps < 1 << 32:
        raise InvalidInputError(f"sweeps is a whole number from 1; got {sweeps}", reason="INVALID_ARGUMENT")
    request = pb.RecreateRequest(inputs=inputs.astype("<f4").tobytes(), unknown=unknown, sweeps=sweeps, **of)
    response = await unary("Recreate", request, pb.RecreateResponse, timeout)
    values = np.frombuffer(response.recreations, "<f4").reshape(inputs.shape)
    energies = np.frombuffer(response.energies, "<f4").reshape(*inputs.shape[:-1], sweeps + 1)
    return Recreation(values, energies)


def _unknown(mask: ArrayLike | None, hidden: NDArray[np.bool_] | None, inputs: NDArray[np.float32]) -> bytes:
    """Which units are unknown, as bytes like `inputs`; none: no unit is. Raises InvalidInputError."""
    if mask is None:
        return b"" if hidden is None else hidden.tobytes()
    flags = array_of(mask, "the mask")
    if flags.dtype != np.bool_ or flags.shape not in (inputs.shape, inputs.shape[-1:]):
        message = (
            f"mask must be bool{list(inputs.shape)}, True where a unit is unknown; got {flags.dtype}{list(flags.shape)}"
        )
        raise InvalidInputError(message, reason="INVALID_INPUT_WIDTH")
    return np.broadcast_to(flags if hidden is None else flags | hidden, inputs.shape).tobytes()


def _floats(values: ArrayLike, what: str) -> NDArray[np.float32]:
    """float32 [n] or [m, n], or one number; finite, and a copy. Raises InvalidInputError."""
    array = array_of(values, what)
    if array.dtype.kind not in "biuf":
        raise InvalidInputError(f"{what} must be numbers; got {array.dtype}", reason="INVALID_INPUT_DTYPE")
    if array.ndim > 2 or not array.size:
        raise InvalidInputError(f"{what} is one row or [n, ...]; got {list(array.shape)}", reason="INVALID_INPUT_WIDTH")
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{what} has NaN or infinity", reason="NON_FINITE_INPUT")
    return narrowed(array, np.dtype(np.float32), what)
