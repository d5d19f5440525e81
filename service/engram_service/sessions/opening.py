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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from engram_service.auth.tenants import tenant_of
from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)
from engram_service.observability.metrics import Metrics
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.constants import starting_state
from engram_service.sessions.entering import Entering
from engram_service.sessions.handles import PLACES_MAX, TAKEN_OVER
from engram_service.sessions.holds import Holds
from engram_service.sessions.ids import check_ids
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.requests import Opened, Wanted
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import SessionTable
from engram_service.sessions.together import Together
from engram_service.settings import Settings
from engram_service.steps.refusals import taken_over
from engram_service.store import ClaimRequest, ClaimStatus, Place, Store
from engram_service.supervision import Supervisor

T = TypeVar("T")
R = TypeVar("R")

_IDS_MAX = 4096  # of one OpenFrame
_TTL_MS_MAX = 100 * 365 * 86_400_000  # a hundred years: Redis and calendars count no further than they must
_SLICE = 32  # sessions that are opened between two batches
_SMALL = 8  # sessions; an open of more of them is large
_OPENING_THREADS = 4
_TOKEN_NBYTES = 8


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
        self._entering = Entering(table, catalog, residency, ownership, shares, metrics)
        self._shares = shares
        self._condition = condition
        self._supervisor = supervisor
        self._store = store
        self._calls = calls
        self._holds = holds
        # Threads that are busy keep the event loop waiting for the interpreter, and with it everybody's steps: small opens
        # mostly wait for Redis, together, and large ones go one after the other.
        self._pool = ThreadPoolExecutor(_OPENING_THREADS, "open")
        self._large = ThreadPoolExecutor(1, "open-large")
        self._holders = Together(store.holders, self._pool)
        self._places = Together(store.tally.take_each, self._pool)
        self._claims = Together(store.claim, self._pool)
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
                    if late:
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
        claims = await self._ask(deadline, self._claims, requests)
        lost = self._store.losses != losses
        again = [n for n, claim in enumerate(claims) if lost or claim.status is ClaimStatus.CHANGED]
        done = [n for n, claim in enumerate(claims) if not lost and claim.status is not ClaimStatus.CHANGED]
        # Former holders on this server.
        held = [keys[n] for n in done if claims[n].status in (ClaimStatus.CREATED, ClaimStatus.CARRIED)]
        await self._holds.dismiss(held, deadline, TAKEN_OVER)
        result.losses = losses
        self._entering.enter(stream, wanted, served, [asked[n][0] for n in done], [requests[n] for n in done],
                    [claims[n] for n in done], result)  # fmt: skip
        return [asked[n] for n in again]

    async def _settle_places(self, keys: Sequence[str]) -> None:
        """After an open that failed half way: sessions that were not made need no place in their tenant's tally."""
        async with self._holds.hold(keys, math.inf):
            tokens = await self._ask(math.inf, self._holders, keys)
            unmade = [key for key, token in zip(keys, tokens, strict=True) if not token]
            await self._calls.call(math.inf, self._store.tally.give_back, unmade, pool=self._pool)

    async def _above_limit(self, ids: Sequence[str], ttl_ms: int, deadline: float) -> set[str]:
        """Before sessions of one tenant are created: those of which it may have no more. The others have their place."""
        if not ids or not (tenant := tenant_of(ids[0])):
            return set()
        limit = self._shares.of(tenant).stored_max
        ttl_ms = ttl_ms or self._settings.session_ttl_s * 1000
        given = await self._ask(deadline, self._places, [Place(session_id, ttl_ms, limit) for session_id in ids])
        return {session_id for session_id, has in zip(ids, given, strict=True) if not has}

    async def _ask(self, deadline: float, what: Together[T, R], things: Sequence[T]) -> list[R]:
        """Of the store, for each session; small opens ask together."""
        if len(things) > _SMALL:
            return list(await self._calls.call(deadline, what.work, things, pool=self._large))
        return await self._calls.together(deadline, what, things)

    async def _seen(self, stream: Stream, wanted: Wanted, ids: Sequence[str], deadline: float) -> tuple[int, list[str]]:
        """How often the store has lost its data, and the claims that the sessions are under ("" none), at a time when the
        client was there: it has been heard from since, if it can be asked.

        An open replaces these claims and no others. So it does nothing where it comes late, over a wire that held it back or
        from a server that hung, when its client is gone and the session goes on elsewhere.
        """
        losses = self._store.losses
        tokens = await self._ask(deadline, self._holders, ids)
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
