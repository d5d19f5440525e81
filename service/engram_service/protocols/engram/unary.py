"""The RPCs beside the stream: session management and models. In the manager. Each raises ServiceError; server.py maps it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import __version__
from engram.v1 import model_pb2, session_pb2, stream_pb2
from engram_service.auth.tenants import beside, id_of, key_of, tenant_of
from engram_service.auth.tokens import Tokens
from engram_service.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
    no_session,
)
from engram_service.manager.data_process import DataProcess
from engram_service.niceness import give_way
from engram_service.observability.metrics import Metrics
from engram_service.offers import Offer, Offers
from engram_service.patterns.chunks import ChunkError
from engram_service.patterns.memories import Memories
from engram_service.protocols.engram.call import Call
from engram_service.protocols.engram.closing import Closing
from engram_service.protocols.engram.exported import Exported, exported, imported
from engram_service.protocols.engram.looks import Looks
from engram_service.protocols.engram.turns import Turns
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.ids import check_id, new_id
from engram_service.sessions.shares import stored_full
from engram_service.settings import Settings
from engram_service.store import TIME_MS_MAX, Records, SessionInfo, Store
from engram_service.supervision import Supervisor

_PAGE_DEFAULT, _PAGE_MAX = 100, 1000
_PAGE_TOKENS = 2**76  # a cursor of Redis has 64 bits, a node's place 12
_PAGE_TOKEN_DIGITS_MAX = len(str(_PAGE_TOKENS))
_THREADS, _TENANT_CALLS = 4, 2  # for calls that look at Redis for themselves, and how many of one tenant go at a time
_LISTS, _TENANT_LISTS = 2, 1  # the same for listings, which take longer
_CALLS_WAITING, _LISTS_WAITING = (1024, 256), (256, 64)  # for their turn: in all, and of one tenant
_LOOK_S = 0.005


class UnaryHandlers:
    """One method for each unary RPC: request and call in, response out. Session ids in requests are keys: see confine.py."""

    def __init__(
        self, settings: Settings, offers: Offers, tokens: Tokens, supervisor: Supervisor, data: DataProcess, calls: StoreCalls,
        store: Store, memories: Memories, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._offers = offers
        self._tokens = tokens
        self._supervisor = supervisor
        self._data = data
        self._calls = calls
        self._store = store
        self._memories = memories
        self._closing = Closing(settings, store, calls, data, supervisor, metrics)
        self._turns = Turns("calls", _THREADS, _TENANT_CALLS, *_CALLS_WAITING)
        self._lists = Turns("listings", _LISTS, _TENANT_LISTS, *_LISTS_WAITING)
        self._looks = Looks(settings, data, supervisor, self._with_record)
        self._pool = ThreadPoolExecutor(_THREADS + _LISTS, "manage", give_way)

    async def finish(self, deadline: float) -> None:
        """What was begun and goes on by itself is done when this returns, or the deadline (seconds, monotonic) has come."""
        while self._closing.under_way and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def get_session(self, request: session_pb2.GetSessionRequest, call: Call) -> session_pb2.GetSessionResponse:
        return session_pb2.GetSessionResponse(session=await self._told(request.session_id))

    async def list_sessions(
        self, request: session_pb2.ListSessionsRequest, call: Call
    ) -> session_pb2.ListSessionsResponse:
        size, place = min(request.page_size or _PAGE_DEFAULT, _PAGE_MAX), place_of(request.page_token)

        def wanted(session_id: str, model: str) -> bool:
            return tenant_of(session_id) == call.tenant and request.model in ("", model)

        deadline = time.monotonic() + call.left_s
        async with self._lists.turn(call.tenant, call.left_s):
            page = partial(self._store.page_of, call.tenant) if call.tenant else self._store.page
            cursor, found = await self._calls.call(deadline, page, place, size, wanted, pool=self._pool)
            response = session_pb2.ListSessionsResponse(next_page_token=str(cursor) if cursor else "")
        response.sessions.extend(await self._sessions(found))
        return response

    async def close_session(
        self, request: session_pb2.CloseSessionRequest, call: Call
    ) -> session_pb2.CloseSessionResponse:
        check_id(request.session_id)
        async with self._turns.turn(call.tenant, call.left_s):
            await self._closing.delete(request.session_id)
        return session_pb2.CloseSessionResponse()

    async def fork_session(
        self, request: session_pb2.ForkSessionRequest, call: Call
    ) -> session_pb2.ForkSessionResponse:
        info = await self.committed(request.session_id, call.left_s, request.min_seq)
        memory = await self._call(call.tenant, call.left_s, self._store.memories.copy, request.session_id)
        new = request.new_session_id or beside(request.session_id, new_id())
        await self._create(new, f"{info.model}/{info.version}", info.fingerprint, info.record, call.left_s, memory)
        return session_pb2.ForkSessionResponse(session=await self._told(new))

    async def move_session(
        self, request: session_pb2.MoveSessionRequest, call: Call
    ) -> session_pb2.MoveSessionResponse:
        """The session's present stream, if it has one, is told that it was taken over; the next open is on the new version."""
        info = await self.committed(request.session_id, call.left_s)
        old, new = (
            self._offers.resolve(info.model, info.version),
            self._offers.resolve(info.model, request.version),
        )
        if _kept_by(old) != _kept_by(new):
            message = f"{old.reference} and {new.reference} have different state schemas or outputs"
            raise FailedPreconditionError("INCOMPATIBLE_VERSION", message)
        self._unpacked(old, info)
        record = new.layout.refingerprinted(info.record)
        token = secrets.token_hex(8)
        if not await self._call(
            call.tenant, call.left_s, self._store.rewrite, info, new.reference, new.bundle.fingerprint, record, token
        ):
            raise UnavailableError(
                "STORE_UNAVAILABLE", "the session was opened or closed meanwhile; try again", retry_after_ms=50
            )
        await self._data.dismiss([request.session_id], [token])
        return session_pb2.MoveSessionResponse(session=await self._told(request.session_id))

    async def export_session(
        self, request: session_pb2.ExportSessionRequest, call: Call
    ) -> session_pb2.ExportSessionResponse:
        info = await self.committed(request.session_id, call.left_s, request.min_seq)
        memory = await self._call(call.tenant, call.left_s, self._store.memories.copy, request.session_id)
        return session_pb2.ExportSessionResponse(data=exported(Exported.of(info, memory)))

    async def import_session(
        self, request: session_pb2.ImportSessionRequest, call: Call
    ) -> session_pb2.ImportSessionResponse:
        found = imported(request.data)
        served = self._offers.resolve(found.model, found.version)
        records = served.layout.unpack([found.record])
        if records.errors:
            raise InvalidArgumentError(
                "INVALID_EXPORT", f"the exported session does not fit {served.reference}: {records.errors[0]}"
            )
        if found.memory:
            try:
                async with self._turns.turn(call.tenant, call.left_s):
                    loop, check = asyncio.get_running_loop(), self._memories.check_log
                    await loop.run_in_executor(self._pool, check, served, found.memory)
            except ChunkError as error:
                raise InvalidArgumentError("INVALID_EXPORT", f"the exported session's memory: {error}") from error
        new = request.session_id or key_of(call.tenant, found.session_id)
        await self._create(new, served.reference, served.bundle.fingerprint, found.record, call.left_s, found.memory)
        return session_pb2.ImportSessionResponse(session=await self._told(new))

    async def get_session_state(
        self, request: session_pb2.GetSessionStateRequest, call: Call
    ) -> session_pb2.GetSessionStateResponse:
        info = await self.committed(request.session_id, call.left_s, request.min_seq)
        served, state = self.state_of(info)
        specs = self._offers.describe(served).state
        response = session_pb2.GetSessionStateResponse(seq=info.seq)
        start = 0
        for spec, own in zip(specs, served.bundle.schema.state, strict=True):
            response.tensors.append(model_pb2.Tensor(spec=spec, data=state[start : start + own.nbytes].tobytes()))
            start += own.nbytes
        return response

    async def list_models(self, request: session_pb2.ListModelsRequest, call: Call) -> session_pb2.ListModelsResponse:
        return session_pb2.ListModelsResponse(models=self._offers.describe_all())

    async def get_model(self, request: session_pb2.GetModelRequest, call: Call) -> session_pb2.GetModelResponse:
        served = self._offers.resolve(request.model, request.version)
        return session_pb2.GetModelResponse(model=self._offers.describe(served))

    async def reload_models(
        self, request: session_pb2.ReloadModelsRequest, call: Call
    ) -> session_pb2.ReloadModelsResponse:
        errors, _ = await self._data.reload()
        return session_pb2.ReloadModelsResponse(models=self._offers.describe_all(), errors=errors)

    async def get_server(self, request: session_pb2.GetServerRequest, call: Call) -> session_pb2.GetServerResponse:
        settings = self._settings
        default = stream_pb2.DURABILITY_INTERVAL if settings.durability == "interval" else stream_pb2.DURABILITY_STEP
        return session_pb2.GetServerResponse(
            server_version=__version__,
            device=(await self._data.ready).device,
            frame_bytes_max=settings.frame_bytes_max,
            durability=default,
            address=settings.advertise,
        )

    async def _call(self, tenant: str, left_s: float, work: Any, *arguments: Any) -> Any:
        deadline = time.monotonic() + left_s
        async with self._turns.turn(tenant, left_s):
            return await self._calls.call(deadline, work, *arguments, pool=self._pool)

    async def info(self, session_id: str, with_record: bool = False) -> SessionInfo:
        """The session as Redis has it. Raises NotFoundError."""
        return await self._described(session_id, self._settings.step_timeout_s, with_record)

    async def _described(self, session_id: str, left_s: float, with_record: bool) -> SessionInfo:
        check_id(session_id)
        describe = self._store.describe
        info: SessionInfo | None = await self._call(tenant_of(session_id), left_s, describe, session_id, with_record)
        if info is None:
            raise no_session(session_id)
        return info

    async def _with_record(self, session_id: str, left_s: float) -> SessionInfo:
        return await self._described(session_id, left_s, with_record=True)

    def state_of(self, info: SessionInfo) -> tuple[Offer, NDArray[np.uint8]]:
        """The model of a session that was read with its record, and the state's bytes uint8 [state_nbytes]."""
        served = self._offers.resolve(info.model, info.version)
        records = self._unpacked(served, info)
        if records.initial[0]:
            return served, served.bundle.initial_row
        return served, records.states[0]

    async def committed(self, session_id: str, left_s: float, min_seq: int = 0) -> SessionInfo:
        """The session with its record, once that has what this server has applied by now, and is at step `min_seq`: another server
        may hold the session, or its client may still have to replay it. Raises NotFoundError, UnavailableError."""
        check_id(session_id)
        return await self._looks.committed(session_id, left_s, min_seq)

    async def _create(
        self, session_id: str, reference: str, fingerprint: str, record: bytes, left_s: float, memory: list[bytes]
    ) -> None:
        """A session that stands where `record` stands. Once begun it is finished, also where the caller does not wait for it."""
        check_id(session_id)
        made = self._made(session_id, reference, fingerprint, record, left_s, memory)
        await asyncio.shield(self._supervisor.once("create", made))

    async def _made(
        self, session_id: str, reference: str, fingerprint: str, record: bytes, left_s: float, memory: list[bytes]
    ) -> None:
        tenant, deadline = tenant_of(session_id), time.monotonic() + left_s
        ttl_ms = self._settings.session_ttl_s * 1000
        session = (session_id, reference, fingerprint, record, ttl_ms, secrets.token_hex(8), memory)
        async with self._turns.turn(tenant, left_s):
            limit = self._tokens.limits(tenant).stored_max
            take = self._store.tally.take
            if tenant and await self._calls.call(deadline, take, [session_id], ttl_ms, limit, pool=self._pool):
                raise stored_full(limit)
            made = await self._calls.call(deadline, self._store.create, *session, pool=self._pool)
        if not made:
            own = id_of(session_id)
            raise AlreadyExistsError("SESSION_EXISTS", f"there is a session {own!r} already", session=own)

    def _unpacked(self, served: Offer, info: SessionInfo) -> Records:
        records = served.layout.unpack([info.record])
        if records.errors:
            raise DataLossError("RECORD_CORRUPTED", f"the session's record cannot be used ({records.errors[0]})")
        return records

    async def _told(self, session_id: str) -> session_pb2.Session:
        return (await self._sessions([await self.info(session_id)]))[0]

    async def _sessions(self, found: Sequence[SessionInfo]) -> list[session_pb2.Session]:
        """Sessions as callers are told of them."""
        held = await self._data.holds([info.session_id for info in found]) if found else []
        return [_session(info, where == "device") for info, where in zip(found, held, strict=True)]


def _session(info: SessionInfo, on_device: bool) -> session_pb2.Session:
    kind = session_pb2.Session.RESIDENCY_DEVICE if on_device else session_pb2.Session.RESIDENCY_STORED
    session = session_pb2.Session(
        id=id_of(info.session_id), model=info.model, version=info.version, fingerprint=info.fingerprint, seq=info.seq,
        acknowledged_seq=info.acked, epoch=info.epoch, residency=kind,
    )  # fmt: skip
    # A listing reads records unchecked; one that is damaged must not spoil the listing of all.
    session.create_time.FromMilliseconds(min(info.created_ms, TIME_MS_MAX))
    session.commit_time.FromMilliseconds(min(info.commit_ms, TIME_MS_MAX))
    if info.ttl_ms > 0:
        session.expire_time.FromMilliseconds(min(int(time.time() * 1000) + info.ttl_ms, TIME_MS_MAX))
    return session


def place_of(page_token: str) -> int:
    """Where a page begins; 0 without a token. Raises InvalidArgumentError."""
    if not page_token:
        return 0
    if not (page_token.isascii() and page_token.isdigit() and len(page_token) <= _PAGE_TOKEN_DIGITS_MAX):
        raise InvalidArgumentError("INVALID_ARGUMENT", "page_token is not one that this server gave")
    place = int(page_token)
    if place >= _PAGE_TOKENS:
        raise InvalidArgumentError("INVALID_ARGUMENT", "page_token is not one that this server gave")
    return place


def _kept_by(served: Offer) -> tuple[Any, ...]:
    """What records of a model are made of."""
    return served.bundle.schema.state, served.bundle.schema.outputs
