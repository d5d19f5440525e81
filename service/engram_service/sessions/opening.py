"""Opens and attaches: how sessions come to a stream. Event loop only.

An open claims every session in the store, whoever held it before: the claim's new token fences the former holder. On this
server, the rows of the former stream are dropped or finished first. A large open is done in pieces, between which steps go on; a
piece that was begun is finished, whether or not the client is still there: what it claimed for a stream that has ended meanwhile
is let go of at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import model_pb2
from engram_service.auth.tenants import tenant_of
from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)
from engram_service.observability.metrics import Metrics
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.constants import starting_state
from engram_service.sessions.handles import PLACES_MAX, TAKEN_OVER
from engram_service.sessions.holds import Holds
from engram_service.sessions.ids import check_ids
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares, stored_full
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import NO_STREAM, SessionTable
from engram_service.settings import Settings
from engram_service.steps.refusals import taken_over
from engram_service.store import ClaimRequest, ClaimResult, ClaimStatus, Store, damaged, session_tag
from engram_service.supervision import Supervisor

VOID_HANDLE = 0xFFFFFFFF
_IDS_MAX = 4096  # of one OpenFrame
_TTL_MS_MAX = 100 * 365 * 86_400_000  # a hundred years: Redis and calendars count no further than they must
_SLICE = 32  # sessions that are opened between two batches
_SMALL = 8  # sessions; an open of more of them is large
_OPENING_THREADS = 4
_TOKEN_NBYTES = 8


@dataclass(slots=True)
class Wanted:
    """What an OpenFrame or AttachFrame asks for."""

    model: str
    version: str
    tenant: str
    ids: Sequence[str]  # keys, all of this tenant
    interval: bool
    client_id: int
    ttl_ms: int
    attach: bool
    confirms: bool = False  # the client can be asked whether it is still there
    shared: bool = False  # whoever opens the session on this stream opens it for all that do
    constants: Sequence[model_pb2.Constant] = ()  # of the sessions that this makes
    start: NDArray[np.uint8] | None = None  # the state that they begin with; None: the model's initial one


@dataclass(slots=True)
class Opened:
    """What became of it, row by row."""

    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    acked: NDArray[np.uint64]
    created: NDArray[np.uint8]
    ids: list[str]
    served: Served | None = None
    losses: int = 0  # of the store, before the claims
    errors: dict[int, ServiceError] = field(default_factory=dict)

    @classmethod
    def refused(cls, count: int, ids: list[str], refusal: ServiceError | None) -> Opened:
        """Every row refused; with no refusal, every row still open."""
        zeros = np.zeros(count, np.uint64)
        errors = {} if refusal is None else dict.fromkeys(range(count), refusal)
        return cls(
            np.full(count, VOID_HANDLE, np.uint32), zeros, zeros.copy(), np.zeros(count, np.uint8), ids, errors=errors
        )


class Sessions:
    """Claims sessions for streams."""

    def __init__(
        self, settings: Settings, table: SessionTable, catalog: Catalog, store: Store, calls: StoreCalls, holds: Holds,
        residency: Residency, ownership: Ownership, shares: Shares, condition: Condition, supervisor: Supervisor,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._table = table
        self._catalog = catalog
        self._residency = residency
        self._ownership = ownership
        self._shares = shares
        self._condition = condition
        self._supervisor = supervisor
        self._metrics = metrics
        self._store = store
        self._calls = calls
        self._holds = holds
        # Threads that are busy keep the event loop waiting for the interpreter, and with it everybody's steps: small opens
        # mostly wait for Redis, and large ones go one after the other.
        self._pool = ThreadPoolExecutor(_OPENING_THREADS, "open")
        self._large = ThreadPoolExecutor(1, "open-large")
        self._last: dict[tuple[int, str], set[str]] = {}  # by stream and key: `outdone` of the last open under way

    def close(self) -> None:
        for pool in (self._pool, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def open(self, stream: Stream, wanted: Wanted, timeout_s: float | None = None) -> Opened:
        """Claims the sessions for a stream. Raises ServiceError where nothing of the request can be done."""
        deadline = time.monotonic() + (timeout_s or self._settings.step_timeout_s)
        self._condition.check_open()
        if len(wanted.ids) > _IDS_MAX:
            raise InvalidArgumentError(
                "FRAME_TOO_LARGE", f"{len(wanted.ids)} sessions in one frame; send at most {_IDS_MAX}"
            )
        if wanted.ttl_ms > _TTL_MS_MAX:
            raise InvalidArgumentError("INVALID_ARGUMENT", f"ttl_ms is {wanted.ttl_ms}; give at most {_TTL_MS_MAX}")
        new = {key for key in wanted.ids if self._table.find(key) is None}
        if len(stream.handles) + stream.opening + len(wanted.ids) > PLACES_MAX:
            message = f"this stream has {len(stream.handles)} sessions open, and may have {PLACES_MAX}; use another one"
            raise ResourceExhaustedError("TOO_MANY_SESSIONS", message, retry_after_ms=1000)
        served = self._catalog.resolve(wanted.model, wanted.version)
        wanted = replace(wanted, start=starting_state(served, wanted.constants))
        ids = list(wanted.ids)
        result = Opened.refused(len(ids), ids, None)
        result.errors = {i: refusal for i, refusal in enumerate(check_ids(ids)) if refusal is not None}
        good = [i for i in range(len(ids)) if i not in result.errors]
        with (
            self._shares.of(wanted.tenant).sessions(len(new)) as entered,
            self._room(stream, len(ids)),
            self._in_order(stream, wanted) as outdone,
        ):
            seen = await self._seen(stream, wanted, [ids[i] for i in good], deadline)
            for start in range(0, len(good), _SLICE):
                piece = slice(start, start + _SLICE)
                work = self._open(
                    stream, wanted, served, good[piece], (seen[0], seen[1][piece]), outdone, deadline, result
                )
                await asyncio.shield(self._supervisor.once("open", work))
                there = {ids[place] for place in good[piece] if self._table.find(ids[place]) is not None} & new
                entered(len(there))
                new -= there  # which are counted in the table from now on
        return result

    @contextlib.contextmanager
    def _in_order(self, stream: Stream, wanted: Wanted) -> Iterator[set[str]]:
        """Keys of which the same stream asks for a newer open meanwhile: this one, which comes late, is to take nothing from it."""
        outdone: set[str] = set()
        places = [(stream.id, key) for key in wanted.ids] if not wanted.shared else []
        for place in dict.fromkeys(places):
            if (earlier := self._last.get(place)) is not None:
                earlier.add(place[1])
            self._last[place] = outdone
        try:
            yield outdone
        finally:
            for place in places:
                if self._last.get(place) is outdone:
                    del self._last[place]

    @contextlib.contextmanager
    def _room(self, stream: Stream, handles: int) -> Iterator[None]:
        """What is being opened counts as if it were there."""
        stream.opening += handles
        try:
            yield
        finally:
            stream.opening -= handles

    async def _open(
        self, stream: Stream, wanted: Wanted, served: Served, places: Sequence[int], seen: tuple[int, list[str]],
        outdone: set[str], deadline: float, result: Opened,
    ) -> None:  # fmt: skip
        """Claims some of the sessions, those at these places of the request. Whom others have claimed since they were looked at are
        looked at again, and claimed again; nobody waits for that but this open."""
        left = list(zip(places, self._requests(served, wanted, [result.ids[place] for place in places]), strict=True))
        try:
            while True:
                async with self._holds.hold([one.session_id for _, one in left], deadline):
                    late = [place for place, one in left if one.session_id in outdone]
                    result.errors.update(dict.fromkeys(late, taken_over()))
                    good = [n for n, (place, _) in enumerate(left) if place not in late]
                    seen = seen[0], [seen[1][n] for n in good]
                    left = [left[n] for n in good]
                    if left:
                        left = await self._claim(stream, wanted, served, left, seen, deadline, result)
                if not left:
                    return
                if time.monotonic() > deadline:
                    raise self._condition.late()
                seen = await self._seen(stream, wanted, [one.session_id for _, one in left], deadline)
        except ServiceError as refusal:
            result.errors.update({place: refusal for place, _ in left})
            if wanted.tenant and not wanted.attach:
                self._supervisor.once("places", self._settle_places([one.session_id for _, one in left]))

    async def _claim(
        self, stream: Stream, wanted: Wanted, served: Served, asked: Sequence[tuple[int, ClaimRequest]],
        seen: tuple[int, list[str]], deadline: float, result: Opened,
    ) -> list[tuple[int, ClaimRequest]]:  # fmt: skip
        """Claims sessions that are held, and enters them; returns those that must be claimed again. All of them must where the
        store has lost its data meanwhile: the former rows are written back, and the new ones are not there yet to be."""
        losses, before = seen
        requests = [replace(one, replaces=token) for (_, one), token in zip(asked, before, strict=True)]
        keys = [one.session_id for one in requests]
        if not wanted.attach and (above := await self._above_limit(keys, wanted.ttl_ms, deadline)):
            requests = [replace(one, may_create=one.session_id not in above) for one in requests]
        claims: list[ClaimResult] = await self._call(deadline, self._store.claim, requests)
        lost = self._store.losses != losses
        again = [n for n, claim in enumerate(claims) if lost or claim.status is ClaimStatus.CHANGED]
        done = [n for n, claim in enumerate(claims) if not lost and claim.status is not ClaimStatus.CHANGED]
        # Former holders on this server.
        held = [keys[n] for n in done if claims[n].status in (ClaimStatus.CREATED, ClaimStatus.CARRIED)]
        await self._holds.dismiss(held, deadline, TAKEN_OVER)
        result.losses = losses
        self._apply(stream, wanted, served, [asked[n][0] for n in done], [requests[n] for n in done],
                    [claims[n] for n in done], result)  # fmt: skip
        return [asked[n] for n in again]

    async def _settle_places(self, keys: Sequence[str]) -> None:
        """After an open that failed half way: sessions that were not made need no place in their tenant's tally."""
        async with self._holds.hold(keys, math.inf):
            tokens: list[str] = await self._call(math.inf, self._store.holders, keys)
            made = [key for key, token in zip(keys, tokens, strict=True) if token]
            await self._call(math.inf, self._store.tally.give_back, [key for key in keys if key not in made])

    async def _above_limit(self, ids: Sequence[str], ttl_ms: int, deadline: float) -> set[str]:
        """Before sessions of one tenant are created: those of which it may have no more. The others have their place."""
        if not ids or not (tenant := tenant_of(ids[0])):
            return set()
        limit = self._shares.of(tenant).stored_max
        ttl_ms = ttl_ms or self._settings.session_ttl_s * 1000
        above: set[str] = await self._call(deadline, self._store.tally.take, ids, ttl_ms, limit)
        return above

    async def _call(self, deadline: float, work: Callable[..., Any], sessions: Sequence[Any], *more: Any) -> Any:
        pool = self._large if len(sessions) > _SMALL else self._pool
        return await self._calls.call(deadline, work, sessions, *more, pool=pool)

    async def _seen(self, stream: Stream, wanted: Wanted, ids: Sequence[str], deadline: float) -> tuple[int, list[str]]:
        """How often the store has lost its data, and the claims that the sessions are under ("" none), at a time when the
        client was there: it has been heard from since, if it can be asked.

        An open replaces these claims and no others. So it does nothing where it comes late, over a wire that held it back or
        from a server that hung, when its client is gone and the session goes on elsewhere.
        """
        losses = self._store.losses
        tokens: list[str] = await self._call(deadline, self._store.holders, ids)
        if wanted.confirms and any(tokens):
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await stream.confirm()
            except TimeoutError:
                raise self._condition.late() from None
        if stream.ended:
            raise UnavailableError("STORE_UNAVAILABLE", "the stream ended before its sessions were claimed")
        return losses, tokens

    def _requests(self, served: Served, wanted: Wanted, ids: Sequence[str]) -> list[ClaimRequest]:
        ttl_ms = wanted.ttl_ms or self._settings.session_ttl_s * 1000
        initial = served.layout.initial(1, int(time.time() * 1000), wanted.start)
        tokens = secrets.token_hex(_TOKEN_NBYTES * len(ids))
        width = 2 * _TOKEN_NBYTES
        return [
            ClaimRequest(
                session_id=session_id, model=wanted.model, version=wanted.version, create_version=served.bundle.version,
                fingerprint=served.bundle.fingerprint, client_id=wanted.client_id, attach=wanted.attach,
                token=tokens[n * width : (n + 1) * width], ttl_ms=ttl_ms, initial=initial,
            )
            for n, session_id in enumerate(ids)
        ]  # fmt: skip

    def _apply(
        self, stream: Stream, wanted: Wanted, served: Served, good: Sequence[int], requests: Sequence[ClaimRequest],
        claims: Sequence[ClaimResult], result: Opened,
    ) -> None:  # fmt: skip
        """Enters the claims into the table. One OpenedFrame speaks of one model version: that of its first session."""
        if stream.ended:
            self._forget([request.session_id for request in requests])
            return
        members: list[int] = []
        version = result.served
        for k, claim in enumerate(claims):
            try:
                own = self._version_of(wanted, served, claim)
                version = version or own
                if own is not version:
                    message = f"the session is on {own.reference}, others of this frame on {version.reference}; open it by itself"
                    raise FailedPreconditionError(
                        "SESSION_OF_OTHER_MODEL", message, model=wanted.model, version=own.bundle.version
                    )
                members.append(k)
            except ServiceError as refusal:
                result.errors[good[k]] = refusal
                self._forget([requests[k].session_id])
        if version is not None:
            self._enter(stream, wanted, version, [good[k] for k in members], [requests[k] for k in members],
                        [claims[k] for k in members], result)  # fmt: skip
            result.served = version

    def _version_of(self, wanted: Wanted, served: Served, claim: ClaimResult) -> Served:
        """The model version that a claimed session is on. Raises ServiceError if the claim failed or it cannot be served."""
        match claim.status:
            case ClaimStatus.CREATED:
                return served
            case ClaimStatus.NOT_FOUND if not wanted.attach:
                raise stored_full(self._shares.of(wanted.tenant).stored_max)
            case ClaimStatus.NOT_FOUND:
                raise NotFoundError("SESSION_NOT_FOUND", "there is no such session; it was closed or has expired")
            case ClaimStatus.TAKEN_OVER:
                raise taken_over()
            case ClaimStatus.DAMAGED:
                raise damaged(claim.why)
            case ClaimStatus.OTHER_MODEL:
                asked = wanted.model + (f"/{wanted.version}" if wanted.version else "")
                own = f"{claim.model}/{claim.version}"
                message = f"the session is one of {own}, not of {asked}; close it, move it, or use another id"
                raise FailedPreconditionError(
                    "SESSION_OF_OTHER_MODEL", message, model=claim.model, version=claim.version
                )
            case ClaimStatus.CARRIED:
                pass
        version = self._catalog.resolve(wanted.model, claim.version)
        if version.bundle.fingerprint != claim.fingerprint:
            message = (
                f"the session was written by other weights of {version.reference}"
                f" (fingerprint {claim.fingerprint[:8]}, served {version.bundle.fingerprint[:8]}); serve those or move the session"
            )
            raise FailedPreconditionError("FINGERPRINT_MISMATCH", message)
        return version

    def _enter(
        self, stream: Stream, wanted: Wanted, served: Served, places: Sequence[int], requests: Sequence[ClaimRequest],
        claims: Sequence[ClaimResult], result: Opened,
    ) -> None:  # fmt: skip
        table = self._table
        records = served.layout.unpack([claim.record for claim in claims])
        sound = [k for k in range(len(claims)) if k not in records.errors]
        for k, reason in records.errors.items():
            message = f"the session's record cannot be used ({reason}); close the session to start over"
            result.errors[places[k]] = DataLossError("RECORD_CORRUPTED", message)
            self._forget([requests[k].session_id])
        if not sound:
            return
        requests, claims = [requests[k] for k in sound], [claims[k] for k in sound]
        at = np.array([places[k] for k in sound])
        rows = self._rows([request.session_id for request in requests])
        table.tag[rows] = _characters([session_tag(request.session_id) for request in requests])
        table.token[rows] = _characters([request.token.encode() for request in requests])
        table.epoch[rows] = [claim.epoch for claim in claims]
        table.created_ms[rows] = [claim.created_ms for claim in claims]
        table.ttl_ms[rows] = [request.ttl_ms for request in requests]
        table.client_id[rows], table.losses[rows] = wanted.client_id, result.losses
        table.handle[rows] = result.handles[at] = [stream.handles.name(row) for row in rows.tolist()]
        result.created[at] = [claim.status is ClaimStatus.CREATED for claim in claims]
        kept = records.only(sound)
        table.model[rows] = served.index
        table.stream[rows] = stream.id
        table.interval[rows] = wanted.interval
        for name in ("admitted", "computed", "applied", "durable"):
            getattr(table, name)[rows] = kept.seq
        table.acked[rows] = kept.acked
        table.used[rows] = table.touched[rows] = self._residency.clock()
        result.seqs[at], result.acked[at] = kept.seq, kept.acked
        begun = np.flatnonzero(~kept.initial & (kept.seq == 0))
        self._residency.starts.enter(served, rows[begun], kept.states[begun])
        advanced = np.flatnonzero(kept.seq > 0)
        if len(advanced):
            self._residency.place_if_room(served, rows[advanced], kept.only(advanced.tolist()))
        new = int(result.created[at].sum())
        self._metrics.sessions_opened.labels("created").inc(new)
        self._metrics.sessions_opened.labels("carried_on").inc(len(rows) - new)

    def _rows(self, session_ids: Sequence[str]) -> NDArray[np.int32]:
        return np.array([self._table.add(session_id) for session_id in session_ids], np.int32)

    def _forget(self, session_ids: Sequence[str]) -> None:
        """After a claim that led to nothing here: what this server may have thought of these sessions is out of date."""
        table = self._table
        known = [row for session_id in session_ids if (row := table.find(session_id)) is not None]
        rows = np.array(known, np.int32)
        rows = rows[(table.stream[rows] == NO_STREAM) & ~table.pinned(rows)]
        if len(rows):
            self._ownership.dismiss(rows)


def _characters(texts: Sequence[bytes]) -> NDArray[np.uint8]:
    """Texts of equal length, uint8 [n, length]."""
    return np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), -1)
