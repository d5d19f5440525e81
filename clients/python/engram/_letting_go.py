"""Sessions are let go of: closed or detached, some of them or all at the client's end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import numpy as np

from engram._connected import Connected, until
from engram._errors import (
    RETRYABLE,
    AbortedError,
    CloseIncompleteError,
    DataLossError,
    EngramError,
    NotFoundError,
    SessionClosedError,
    of_detail,
)
from engram._frames import close_frame
from engram._link import Link, StreamLostError
from engram._session import Session
from engram._table import VOID_HANDLE

GOODBYE_S = 5.0
_NAMED = 3  # sessions in a message
_ATTACHING_S = 0.01


class LettingGo(Connected):
    """The part of AsyncClient that ends sessions."""

    async def _let_go(self, sessions: Sequence[Session], detach: bool, timeout: float | None) -> None:
        """Closes or detaches, again while it may succeed later; sessions that are gone already count as let go. Those that could
        not be stay as they are, and the first one's error is raised: so the call can be made again."""
        link = self._link
        if link is None or not sessions:
            return
        table = self._here(link).core.table
        limit_s = self._seconds(timeout)
        deadline = None if limit_s is None else link.loop.time() + limit_s
        me: object = self  # an Owner as AsyncClient alone
        mine = [session for session in sessions if session._uid >= 0 and session._client is me]
        failed: dict[Session, EngramError] = {}
        attempt = 0
        while alive := [one for one in mine if one._uid >= 0 and not table.lost[one._slot] and one not in failed]:
            async with until(deadline):
                await link.up()
                if detach:
                    await asyncio.gather(*(link.core.settle(one._slot, None) for one in alive if one.in_doubt))
            slots = np.array([session._slot for session in alive])
            handles = table.handle[slots]
            if (handles == VOID_HANDLE).any():  # they are being attached again
                async with until(deadline):
                    await asyncio.sleep(_ATTACHING_S)
                continue
            try:
                async with until(deadline):
                    answer = await link.request(close_frame(handles, detach))
            except StreamLostError:
                continue
            refused = {alive[row.row]: of_detail(row.error) for row in answer.closed.errors}
            self._forget([one for one in alive if one not in refused], detach)
            attempt += 1
            wait = self._take_refused(refused, failed, link._backoff(attempt), deadline)
            await asyncio.sleep(wait)
        await self._end_lost([one for one in mine if one._uid >= 0 and one not in failed], detach, failed)
        if failed:
            raise next(iter(failed.values()))

    def _take_refused(
        self, refused: dict[Session, EngramError], failed: dict[Session, EngramError], wait: float, deadline: float | None
    ) -> float:  # fmt: skip
        """Sorts sessions that were not let go: those that are gone, that failed, and that are tried again after so many
        seconds."""
        loop = self._core.loop
        later = [error for error in refused.values() if error.code in RETRYABLE]
        wait = max([wait, *(error.retry_after or 0.0 for error in later)]) if later else 0.0
        too_late = deadline is not None and loop.time() + wait >= deadline
        for session, error in refused.items():
            if error.code in RETRYABLE:
                if too_late:
                    failed[session] = error
            elif isinstance(error, (AbortedError, NotFoundError, DataLossError)) and error.reason != "INVALID_HANDLE":
                self._core.lose(session._slot, error)
            else:
                failed[session] = error
        return 0.0 if too_late else wait

    async def _end_lost(self, sessions: Sequence[Session], detach: bool, failed: dict[Session, EngramError]) -> None:
        """Sessions that were lost: to let go of them is done; to close them is not, where a record may be left."""
        for session in sessions:
            error = self._core.table.errors.get(session._slot)
            if detach or error is None or isinstance(error, (SessionClosedError, NotFoundError)):
                continue
            if isinstance(error, DataLossError):
                with contextlib.suppress(NotFoundError):
                    await self.sessions.close(session.id)
            else:
                failed[session] = error.copy()
        self._forget([one for one in sessions if one not in failed], detach)

    def _forget(self, sessions: Sequence[Session], detach: bool) -> None:
        what = "let go of" if detach else "closed"
        for session in sessions:
            if session._uid >= 0:
                self._open_sessions.pop(session._slot, None)
                session._let_go(SessionClosedError(f"the session was {what} here", reason="SESSION_CLOSED"))

    async def _let_all_go(self, link: Link) -> CloseIncompleteError | None:
        """Detaches what is open, in good time; what could not be done."""
        table, doubts = link.core.table, link.core.doubts
        alive = [session for session in self._open_sessions.values() if not table.lost[session._slot]]
        ahead = {session: int(table.sent[session._slot]) for session in alive}
        why: EngramError | None = None
        if alive and link._up.is_set():
            try:
                await self._let_go(alive, detach=True, timeout=GOODBYE_S)
            except EngramError as error:
                why = error
        elif alive:
            why = link._given_up()
        left = [session for session in alive if session._uid >= 0]
        open_steps = {
            one.id: one.seq + 1 for one in alive if ahead[one] > (doubts.seq(one._slot) if one in left else one.seq)
        }
        not_durable = {one.id: one.durable_seq for one in left if one.durable_seq < one.seq}
        if not open_steps and not not_durable and (not left or not link._up.is_set()):
            return None  # a server that is away lets go of them as it finds the stream gone
        return _incomplete([one.id for one in left], open_steps, not_durable, why)


def _incomplete(
    left: list[str], open_steps: dict[str, int], not_durable: dict[str, int], why: EngramError | None
) -> CloseIncompleteError:
    parts: list[str] = []
    if left:
        parts.append(f"{_some(left)} not let go of{f' ({why})' if why is not None else ''}")
    if open_steps:
        parts.append(f"whether steps sent to {_some(list(open_steps))} were applied is not known")
    if not_durable:
        parts.append(f"answered steps of {_some(list(not_durable))} may not be durable")
    error = CloseIncompleteError("the client was closed, but " + "; ".join(parts))
    error.undetached, error.open_steps, error.not_durable = left, open_steps, not_durable
    return error


def _some(ids: list[str]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return f"session{'s' if len(ids) > 1 else ''} {', '.join(map(repr, ids[:_NAMED]))}{more}"
