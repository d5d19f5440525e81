"""What sessions are stored: one of them, all, or those of a tenant, page by page. Blocking and thread-safe."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engram_service.store.commands import Commands
from engram_service.store.keys import META_PREFIX, meta_key, session_tag
from engram_service.store.reading import info_of, meta_of
from engram_service.store.record import read_headers
from engram_service.store.tally import Tally
from engram_service.store.types import DamagedError, SessionInfo

log = logging.getLogger(__name__)

Wanted = Callable[[str, str], bool]  # by session id and model

_PAGE_S = 0.5
_DESCRIBED_AT_ONCE = 250
_CURSORS = 2**64
_NODES_MAX = 4096  # of a cluster; a page's cursor is a node's cursor and its place
_LOOKS = 3  # at a session whose record is not where its hash says


class Listing:
    """`check_loss` raises RedisError where a session that is not found may be one that Redis has lost."""

    def __init__(self, commands: Commands, tally: Tally, check_loss: Callable[[], None]) -> None:
        self._commands = commands
        self._tally = tally
        self._check_loss = check_loss

    def describe(self, session_id: str, with_record: bool = False) -> SessionInfo | None:
        """A session's hash and record header (or whole record); None if there is no such session."""

        def run() -> list[SessionInfo]:
            found = self._describe([meta_key(session_tag(session_id))], with_record)
            if not found:
                self._check_loss()
            return found

        found = self._commands.call(run)
        return found[0] if found else None

    def page(
        self, cursor: int, count: int, wanted: Wanted = lambda session_id, model: True
    ) -> tuple[int, list[SessionInfo]]:
        """About `count` of the sessions that are wanted, and the cursor of the next page (0: no more).

        Redis looks at no more than `count` keys at a time. Where those that are wanted lie far apart, the page ends early, maybe
        with none. A session that is there from the first page to the last is found once, or twice where Redis grew or shrank its
        table of keys meanwhile.
        """
        enough = time.monotonic() + _PAGE_S

        def run() -> tuple[int, list[SessionInfo]]:
            found: list[SessionInfo] = []
            nodes = self._commands.nodes.all()
            at, place = divmod(cursor, _NODES_MAX)  # one node after the other
            while place < len(nodes):
                at, keys = nodes[place].client.scan(at, match=META_PREFIX + b"*}", count=max(count, 10))
                own = [key for key in keys if isinstance(key, bytes)]
                found.extend(self._describe(own, False, wanted, self._leave_out))
                place += at == 0
                if len(found) * 2 >= count or time.monotonic() > enough:
                    break
            return (at * _NODES_MAX + place if place < len(nodes) else 0), found

        return self._commands.call(run)

    def page_of(
        self, tenant: str, cursor: int, count: int, wanted: Wanted = lambda session_id, model: True
    ) -> tuple[int, list[SessionInfo]]:
        """The same of the sessions that have a place in this tenant's tally: it costs what the tenant has."""
        enough = time.monotonic() + _PAGE_S
        found: list[SessionInfo] = []
        while True:
            cursor, tags = self._tally.tags(tenant, cursor % _CURSORS, max(count, 10))
            for at in range(0, len(tags), _DESCRIBED_AT_ONCE):
                some = [meta_key(tag) for tag in tags[at : at + _DESCRIBED_AT_ONCE]]
                found += self._commands.call(lambda some=some: self._describe(some, False, wanted, self._leave_out))  # type: ignore[misc]
            if not cursor or len(found) * 2 >= count or time.monotonic() > enough:
                return cursor, found

    def _describe(
        self, keys: Sequence[bytes], with_record: bool, wanted: Wanted = lambda session_id, model: True,
        damaged: Callable[[bytes, DamagedError], None] | None = None, looks: int = _LOOKS,
    ) -> list[SessionInfo]:  # fmt: skip
        """Sessions by their hashes. What is damaged is given to `damaged`, or raised. A record goes with its claim to another key:
        one that was taken over between the look at its hash and that at its record is looked at again."""

        def sound(found: list[tuple[bytes, Any]]) -> Iterator[tuple[bytes, Any]]:
            for key, value in found:
                if not isinstance(value, DamagedError):
                    yield key, value
                elif damaged is not None:
                    damaged(key, value)
                else:
                    raise value

        metas = self._commands.pipelined(
            keys, lambda pipe, at: pipe.hmget(keys[at], "i", "m", "f", "t", "e", "c"), each=True
        )
        read = [(key, meta_of(key, meta)) for key, meta in zip(keys, metas, strict=True)]
        known = [(key, meta) for key, meta in sound(read) if meta is not None and wanted(meta.session_id, meta.model)]
        names = [key + b":" + meta.token.encode() for key, meta in known]
        records = self._commands.pipelined(
            names,
            lambda pipe, at: pipe.get(names[at]) if with_record else pipe.getrange(names[at], 0, 63),
            each=True,
        )
        times = self._commands.pipelined(names, lambda pipe, at: pipe.pttl(names[at]))
        headers = read_headers([record if isinstance(record, bytes) else b"" for record in records])
        found = [
            (key, info_of(meta, records[n], headers[n], int(times[n]), with_record))
            for n, (key, meta) in enumerate(known)
        ]
        infos = list(sound(found))
        gone = [key for key, info in infos if info is None]
        again = self._describe(gone, with_record, wanted, damaged, looks - 1) if gone and looks > 1 else []
        return [info for _, info in infos if info is not None] + again

    def _leave_out(self, key: bytes, why: DamagedError) -> None:
        log.warning(
            "a listing leaves out a session that is damaged (%s); close it to start over",
            why,
            extra={"key": key.decode(errors="replace")},
        )
