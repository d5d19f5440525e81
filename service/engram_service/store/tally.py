"""Which sessions each tenant has stored, for its limit and its listings: a sorted set of tags, by when they expire.

A session's place is taken before it is made, in one script, so that servers which make sessions at the same time cannot exceed
the limit together. It is given back when the session is closed, and is over a quarter of the session's time after the session has
expired: a session that is held renews its place no more often. A place that was taken for a session which then was not
made, because a server died in between, is over as late. Without tenants there are no tallies.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from engram_service.auth.tenants import tenant_of
from engram_service.store import scripts
from engram_service.store.keys import meta_key, session_tag, tally_key
from engram_service.store.scripts import Script
from engram_service.store.types import DamagedError

_LATE = 1.25  # of the session's time
_RENEWED_MAX = 65_536
_SLACK_MS = 3000  # renewals may be as late as this

Pipelined = Callable[[Sequence[bytes], Callable[[Any, int], object]], list[Any]]


class Place(NamedTuple):
    """One that is asked for."""

    session_id: str
    ttl_ms: int
    limit: int  # of its tenant's sessions; 0: none


class Tally:
    """Places of sessions, by their keys. Blocking and thread-safe; raises StoreUnavailableError."""

    def __init__(self, pipelined: Pipelined) -> None:
        self._place = Script(scripts.PLACE)
        self._pipelined = pipelined
        self._renewed: dict[str, float] = {}  # when it is to be done again, of sessions that are looked at alone

    def take(self, session_ids: Sequence[str], ttl_ms: int, limit: int) -> set[str]:
        """Places for sessions, or longer ones for those that have one; which are above the limit (0: none)."""
        given = self.take_each([Place(session_id, ttl_ms, limit) for session_id in session_ids])
        return {session_id for session_id, has in zip(session_ids, given, strict=True) if not has}

    def take_each(self, places: Sequence[Place]) -> list[bool]:
        """The same for sessions of any tenants; which have their place."""
        alike: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        for at, place in enumerate(places):
            if tenant := tenant_of(place.session_id):
                alike[tenant, place.ttl_ms, place.limit].append(at)
        keys, now_ms = [tally_key(tenant) for tenant, _, _ in alike], int(time.time() * 1000)
        args = [
            [
                now_ms,
                now_ms + int(ttl_ms * _LATE) + _SLACK_MS,
                limit,
                *(session_tag(places[at].session_id) for at in members),
            ]
            for (_, ttl_ms, limit), members in alike.items()
        ]
        above = self._pipelined(keys, lambda pipe, at: self._place([keys[at]], args[at], pipe))
        given = [True] * len(places)
        for members, some in zip(alike.values(), above, strict=True):
            for at in some:
                given[members[at]] = False
        return given

    def keep(self, session_ids: Sequence[str], ttl_ms: Sequence[int]) -> None:
        """Renews places, or makes them again where Redis has lost them."""
        self.take_each([Place(session_id, ttl, 0) for session_id, ttl in zip(session_ids, ttl_ms, strict=True)])

    def tags(self, tenant: str, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """About `count` of the tags that have a place, and the cursor of those that follow (0: none)."""
        key = tally_key(tenant)
        found = self._pipelined([key], lambda pipe, at: pipe.zscan(key, cursor, count=count))[0]
        if isinstance(found, DamagedError):  # the next session that is opened or held begins it anew
            return 0, []
        return int(found[0]), [tag for tag, _ in found[1]]

    def renew(self, session_id: str) -> None:
        """The same for a session that is looked at and held by nobody, as long as its hash says that it lives."""
        if not tenant_of(session_id) or time.monotonic() < self._renewed.get(session_id, 0.0):
            return
        key = meta_key(session_tag(session_id))
        kept = self._pipelined([key], lambda pipe, at: pipe.hget(key, "l"))[0]
        if isinstance(kept, bytes) and kept.isdigit() and (ttl_ms := int(kept)):  # else it is damaged, or gone
            self.keep([session_id], [ttl_ms])
            while len(self._renewed) >= _RENEWED_MAX:
                self._renewed.pop(next(iter(self._renewed)), None)
            self._renewed[session_id] = time.monotonic() + ttl_ms / 4000

    def give_back(self, session_ids: Sequence[str]) -> None:
        """These sessions are closed."""
        pairs = [(tally_key(tenant), session_tag(one)) for one in session_ids if (tenant := tenant_of(one))]
        self._pipelined([key for key, _ in pairs], lambda pipe, at: pipe.zrem(*pairs[at]))
