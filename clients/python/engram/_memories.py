"""Memories of sessions: store, recall, forget, what there is, an NTM's memory by content, recreations. By unary calls.

_manage.py offers these by session id, _session.py on an open session. Calls that are too large for one message are several:
a store then takes back what it did if a later part is refused. A change carries a random id, so that it is applied once
however often the connection is lost.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._errors import RETRYABLE, EngramError, InvalidInput
from engram._patterns import Bits, Patterns, Recall, Recreation, Stored, bits_of, check_labels, recalls_of
from engram.v1 import memory_pb2 as pb

if TYPE_CHECKING:
    from engram._client import AsyncClient

log = logging.getLogger(__name__)

_PART_BYTES = 4 << 20
_RECALL_CUES = 128
_RECALLS_AT_ONCE = 4
_PAGE = 50_000
_FORGET_LABELS = 100_000


async def store(
    client: AsyncClient, session_id: str, patterns: ArrayLike, labels: Sequence[str] | str | None, timeout: float | None
) -> Stored:
    """See Session.store."""
    packed = bits_of(patterns)
    names = check_labels(labels, len(packed.bits))
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
            response = await client._unary("StorePatterns", request, pb.StorePatternsResponse, timeout)
        except EngramError as error:
            if stored and error.code not in RETRYABLE:
                await forget(client, session_id, stored, False, timeout)
            raise
        first = response.first_number
        stored += names[part] or [f"p{number}" for number in range(first, first + response.stored)]
    if response.warning:
        log.warning("session %s: %s", session_id, response.warning)
    return Stored(stored, response.count, response.load, response.warning)


async def forget(
    client: AsyncClient, session_id: str, labels: Sequence[str] | str | None, everything: bool, timeout: float | None
) -> int:
    """See Session.forget."""
    names = [labels] if isinstance(labels, str) else list(labels or [])
    if everything == bool(names):
        raise InvalidInput("forget takes labels, or all=True, and not both", reason="INVALID_ARGUMENT")
    forgotten = 0
    for start in range(0, max(1, len(names)), _FORGET_LABELS):
        request = pb.ForgetPatternsRequest(
            session_id=session_id, operation_id=secrets.token_bytes(16), labels=names[start : start + _FORGET_LABELS],
            all=everything,
        )  # fmt: skip
        response = await client._unary("ForgetPatterns", request, pb.ForgetPatternsResponse, timeout)
        forgotten += response.forgotten
    return forgotten


async def recall(
    client: AsyncClient, session_id: str, cue: ArrayLike, mask: ArrayLike | None, synchronous: bool, seed: int,
    sweeps_max: int, timeout: float | None,
) -> Any:  # fmt: skip
    """See Session.recall."""
    cues = bits_of(cue, mask, "cue")
    if not 0 <= seed < 1 << 64 or not 1 <= sweeps_max < 1 << 32:
        raise InvalidInput("seed is a whole number from 0, sweeps_max one from 1", reason="INVALID_ARGUMENT")
    rows = max(1, min(_RECALL_CUES, _PART_BYTES // cues.bits.shape[1]))
    room = asyncio.Semaphore(_RECALLS_AT_ONCE)

    async def one(part: slice) -> list[Recall]:
        request = pb.RecallRequest(
            session_id=session_id, size=cues.size, cues=cues.bits[part].tobytes(), synchronous=synchronous, seed=seed,
            unknown=b"" if cues.unknown is None else cues.unknown[part].tobytes(), sweeps_max=sweeps_max,
        )  # fmt: skip
        async with room:
            return recalls_of(await client._unary("Recall", request, pb.RecallResponse, timeout), cues)

    parts = [slice(start, start + rows) for start in range(0, len(cues.bits), rows)]
    tasks = [asyncio.ensure_future(one(part)) for part in parts]
    try:
        found = [hit for hits in await asyncio.gather(*tasks) for hit in hits]
    finally:
        for task in tasks:
            task.cancel()
    return found[0] if cues.single else found


async def patterns(client: AsyncClient, session_id: str, values: bool, timeout: float | None) -> Patterns:
    """See Session.patterns."""
    labels: list[str] = []
    pieces: list[NDArray[np.int8]] = []
    token = ""
    while True:
        request = pb.ListPatternsRequest(session_id=session_id, page_size=_PAGE, page_token=token, with_patterns=values)
        page = await client._unary("ListPatterns", request, pb.ListPatternsResponse, timeout)
        labels += page.labels
        if values:
            bits = np.frombuffer(page.patterns, np.uint8).reshape(len(page.labels), -(-page.size // 8))
            pieces.append(Bits(bits, None, page.size, np.dtype(np.int8), False, False).written(bits))
        token = page.next_page_token
        if not token:
            found = np.concatenate(pieces) if values else None
            return Patterns(labels, found, page.load, page.size, page.rule)


async def address(
    client: AsyncClient, session_id: str, key: ArrayLike, strength: ArrayLike, timeout: float | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """See Session.address."""
    keys = _floats(key, "key")
    rows = np.atleast_2d(keys)
    strengths = (
        np.broadcast_to(_floats(strength, "strength"), len(rows))
        if np.ndim(strength) == 0
        else _floats(strength, "strength")
    )
    request = pb.AddressMemoryRequest(
        session_id=session_id, keys=rows.astype("<f4").tobytes(), strengths=strengths.astype("<f4").tobytes()
    )
    response = await client._unary("AddressMemory", request, pb.AddressMemoryResponse, timeout)
    weightings = np.frombuffer(response.weightings, "<f4").reshape(-1, response.slots)
    reads = np.frombuffer(response.reads, "<f4").reshape(-1, response.width)
    return (weightings[0], reads[0]) if keys.ndim == 1 else (weightings, reads)


async def recreate(
    client: AsyncClient, of: dict[str, str], x: ArrayLike, mask: ArrayLike | None, sweeps: int, timeout: float | None
) -> Recreation:
    """See Session.recreate. `of`: the request's session_id, or model and version."""
    inputs = _floats(x, "x")
    unknown = b""
    if mask is not None:
        flags = np.asarray(mask)
        if flags.dtype != np.bool_ or flags.shape not in (inputs.shape, inputs.shape[-1:]):
            message = f"mask must be bool{list(inputs.shape)}, True where a unit is unknown; got {flags.dtype}{list(flags.shape)}"
            raise InvalidInput(message, reason="INVALID_INPUT_WIDTH")
        unknown = np.broadcast_to(flags, inputs.shape).tobytes()
    if not 1 <= sweeps < 1 << 32:
        raise InvalidInput(f"sweeps is a whole number from 1; got {sweeps}", reason="INVALID_ARGUMENT")
    request = pb.RecreateRequest(inputs=inputs.astype("<f4").tobytes(), unknown=unknown, sweeps=sweeps, **of)
    response = await client._unary("Recreate", request, pb.RecreateResponse, timeout)
    values = np.frombuffer(response.recreations, "<f4").reshape(inputs.shape)
    energies = np.frombuffer(response.energies, "<f4").reshape(*inputs.shape[:-1], sweeps + 1)
    return Recreation(values, energies)


def _floats(values: ArrayLike, what: str) -> NDArray[np.float32]:
    """float32 [n] or [m, n], or one number; finite. Raises InvalidInput."""
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{what} must be numbers in equal rows", reason="INVALID_INPUT_DTYPE") from error
    if array.ndim > 2 or not array.size:
        raise InvalidInput(f"{what} is one row or [n, ...]; got {list(array.shape)}", reason="INVALID_INPUT_WIDTH")
    if not np.isfinite(array).all():
        raise InvalidInput(f"{what} has NaN or infinity", reason="NON_FINITE_INPUT")
    return array
