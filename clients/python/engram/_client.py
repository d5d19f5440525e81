"""The client: opens sessions and steps many at once. The blocking one of _blocking.py is made of this one."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from operator import attrgetter
from types import TracebackType
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from engram._calls import Call
from engram._constants import Constants, Encoded, encoded
from engram._core import Core
from engram._errors import (
    RETRYABLE,
    AbortedError,
    ClientClosedError,
    CloseIncompleteError,
    DataLossError,
    DeadlineExceededError,
    EngramError,
    FailedPreconditionError,
    InvalidInputError,
    NotFoundError,
    SessionClosedError,
    of_detail,
)
from engram._frames import close_frame
from engram._link import Link, StreamLostError
from engram._manage import Models, Sessions
from engram._options import UNSET, ClientOptions, checked_seconds
from engram._poller import check, mark, refuse_patched_threads
from engram._session import Session
from engram._state import ModelLink
from engram._table import VOID_HANDLE
from engram._tensors import Input, codec_of
from engram._types import ModelInfo, ServerInfo
from engram._unary import Response
from engram.v1 import model_pb2, session_pb2, stream_pb2

_OPEN_ROWS = 1024  # sessions in one OpenFrame
_GOODBYE_S = 5.0
_NAMED = 3  # sessions in a message
_ATTACHING_S = 0.01
_DURABILITIES = {
    None: stream_pb2.DURABILITY_UNSPECIFIED,
    "step": stream_pb2.DURABILITY_STEP,
    "interval": stream_pb2.DURABILITY_INTERVAL,
}
_UID = attrgetter("_uid")


class AsyncClient:
    """A client of one Engram service, on the running event loop. One client holds one stream.

        async with engram.AsyncClient("127.0.0.1:50051") as client:
            session = await client.open("digits-reader", session_id="cam-7")
            y = await session.step(x)

    Args:
        addresses: "host:port", or several that serve the same sessions; a DNS name is resolved by gRPC.
        options: see ClientOptions.
        token, tls, ca_file, cert_file, key_file: the options of these names; given here, they win.

    A lost connection is taken up again at any of the addresses; sessions are carried on, unanswered steps are sent again
    with their numbers, so that each is applied once, and callers only see that it took longer. Errors that may pass are
    tried again until the call's `timeout` (seconds; None: no limit; not given: the option timeout_s).
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        options: ClientOptions | None = None,
        *,
        token: str | Callable[[], str] | None = None,
        tls: bool | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> None:
        given = {"token": token, "tls": tls, "ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
        wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.options = replace(options or ClientOptions(), **wanted)
        self.addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        if not self.addresses:
            raise InvalidInputError("AsyncClient needs at least one address", reason="INVALID_ARGUMENT")
        self.options.check(self.addresses)
        refuse_patched_threads()
        self.sessions = Sessions(self._unary)
        self.models = Models(self._unary)
        self._client_id = secrets.randbits(63) | 1
        self._link: Link | None = None
        self._closed = False
        self._ended = asyncio.Event()
        self._open_sessions: dict[int, Session] = {}

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.connect()
        except BaseException:
            await self.aclose()  # nobody else does, and it would go on trying
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self.aclose()
            return
        try:
            await self.aclose()
        except CloseIncompleteError as unfinished:
            error.add_note(str(unfinished))

    async def connect(self) -> None:
        """Returns when there is a connection. Raises UnavailableError when there is none in time. Done by `async with`."""
        await self._linked().up()

    async def aclose(self) -> None:
        """Lets go of all sessions, which keeps their records, and ends the stream. Closing again only waits for the first close.

        Raises CloseIncompleteError where something could not be done: a step whose fate is open, answered steps of which it is not
        known that they are durable, a session that the server refuses to let go of. The client is closed all the same. At the
        end of an `async with` that another error leaves, it is a note to that error.
        """
        link = self._link
        ended = link is None or link.loop.is_closed() or link.mark != mark()  # nothing of it is here any more
        if link is not None and not ended:
            self._here(link)
        again, self._closed = self._closed, True
        if link is None or ended:
            return
        if again:
            await self._ended.wait()
            return
        try:
            unfinished = await self._let_all_go(link)
        finally:
            await link.close()
            self._ended.set()
        if unfinished is not None:
            raise unfinished

    async def _let_all_go(self, link: Link) -> CloseIncompleteError | None:
        """Detaches what is open, in good time; what could not be done."""
        table, doubts = link.core.table, link.core.doubts
        alive = [session for session in self._open_sessions.values() if not table.lost[session._slot]]
        ahead = {session: int(table.sent[session._slot]) for session in alive}
        why: EngramError | None = None
        if alive and link._up.is_set():
            try:
                await self._let_go(alive, detach=True, timeout=_GOODBYE_S)
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

    # Sessions

    async def open(
        self,
        model: str,
        session_id: str | None = None,
        *,
        version: str = "",
        durability: str | None = None,
        constants: Constants | None = None,
        timeout: float | None = UNSET,
    ) -> Session:
        """Creates a session, or carries it on where it stood.

        Args:
            model: its name.
            session_id: 1 to 128 bytes of UTF-8 without white space; None: the server makes one.
            version: of the model; "": the one an existing session is on, else the latest.
            durability: "step" (each step is in Redis before its answer), "interval", or None for the server's default.
            constants: by name, of a session that this creates, {"sr": 8000}; see ModelInfo.constants. One that exists keeps
                its own.

        A session that this client has open already is returned as it is. The newest open wins: another client that had
        the session gets TakenOverError.
        """
        given = [constants or {}]
        opened = await self._open(model, [session_id or ""], version, self._durability(durability), timeout, given)
        return opened[0]

    async def open_many(
        self,
        model: str,
        session_ids: Sequence[str] | int,
        *,
        version: str = "",
        durability: str | None = None,
        constants: Constants | Sequence[Constants] | None = None,
        timeout: float | None = UNSET,
    ) -> list[Session]:
        """Like `open`, for many sessions (or for so many new ones) in a few frames. If one fails, its error is raised, and
        those that were opened with it are let go. constants: the same for all, or a list with those of each."""
        ids = [""] * session_ids if isinstance(session_ids, int) else list(session_ids)
        named = [session_id for session_id in ids if session_id]
        if len(set(named)) < len(named):
            raise InvalidInputError("open_many got a session id twice", reason="INVALID_SESSION_ID")
        given: list[Any] = list(constants) if isinstance(constants, list | tuple) else [constants or {}] * len(ids)
        if len(given) != len(ids):
            message = f"open_many got constants of {len(given)} sessions for {len(ids)}"
            raise InvalidInputError(message, reason="INVALID_ARGUMENT")
        return await self._open(model, ids, version, self._durability(durability), timeout, given)

    def step_many(
        self, sessions: Sequence[Session], X: Input, *, timeout: float | None = UNSET
    ) -> Coroutine[Any, Any, Any]:
        """One step of each of many sessions of one model: inputs [n, *input shape] -> outputs [n, *output shape]; of several inputs
        or outputs a dict of them by name.

        If rows fail, the others are still applied; the error of the first is raised, with `rows` and `outputs` set.
        X is copied when this is called.
        """
        inputs: NDArray[np.uint8] | EngramError | None = None
        try:
            inputs = sessions[0]._codec.many(X, len(sessions)) if len(sessions) else None
        except EngramError as error:
            inputs = error
        return self._step_many(sessions, inputs, timeout)

    async def _step_many(
        self, sessions: Sequence[Session], inputs: NDArray[np.uint8] | EngramError | None, timeout: float | None
    ) -> Any:
        core = self._linked().core
        table = core.table
        uids = np.fromiter(map(_UID, sessions), np.int64, len(sessions))
        if not len(uids):
            return np.zeros((0,), np.float32)
        slots = uids - table.base
        if int(slots.min()) < 1 or int(slots.max()) >= table.count:
            self._explain(sessions)
        if table.lost[slots].any():
            raise table.error_of(int(slots[np.argmax(table.lost[slots])]))
        models = table.model[slots]
        if (models != models[0]).any():
            raise InvalidInputError(
                "step_many takes sessions of one model version and durability", reason="INVALID_ARGUMENT"
            )
        link = core.models[int(models[0])]
        if isinstance(inputs, EngramError):
            raise inputs
        call = Call(len(slots), inputs, link.output, 0, True, core.loop)
        return await core.submit(call, slots, self._timeout(timeout))

    async def close_many(self, sessions: Sequence[Session], *, timeout: float | None = UNSET) -> None:
        """Ends sessions and deletes their records, in one frame."""
        await self._let_go(sessions, detach=False, timeout=timeout)

    async def detach_many(self, sessions: Sequence[Session], *, timeout: float | None = UNSET) -> None:
        """Lets go of sessions and keeps their records, in one frame."""
        await self._let_go(sessions, detach=True, timeout=timeout)

    async def server(self, *, timeout: float | None = UNSET) -> ServerInfo:
        """What the server says of itself."""
        response = await self._unary(
            "GetServer", session_pb2.GetServerRequest(), session_pb2.GetServerResponse, timeout
        )
        return ServerInfo.of(response)

    # Inside

    @property
    def _core(self) -> Core:
        if self._link is None:
            raise ClientClosedError("the client is not connected; use `async with`", reason="CLIENT_CLOSED")
        return self._link.core

    def _linked(self) -> Link:
        if self._closed:
            raise ClientClosedError("the client was closed", reason="CLIENT_CLOSED")
        if self._link is None:
            self._link = Link(self.addresses, self.options, self._client_id, (self._client_id & 0x3FFFFFFF) << 32)
        return self._here(self._link)

    def _here(self, link: Link) -> Link:
        """Raises FailedPreconditionError where this is another process, or another event loop, than the one of the connection."""
        if asyncio._get_running_loop() is not link.loop:
            check(link.mark)
            message = "this client is connected on another event loop; use one client for each loop, or `engram.Client`"
            raise FailedPreconditionError(message, reason="OTHER_EVENT_LOOP")
        return link

    def _timeout(self, timeout: float | None) -> float | None:
        if self._closed:
            raise ClientClosedError("the client was closed", reason="CLIENT_CLOSED")
        if self._link is not None:
            self._here(self._link)
        return self._seconds(timeout)

    def _seconds(self, timeout: float | None) -> float | None:
        return self.options.timeout_s if timeout == UNSET else checked_seconds("timeout", timeout)

    def _durability(self, name: str | None) -> int:
        if name not in _DURABILITIES:
            raise InvalidInputError(f'durability is "step" or "interval"; got {name!r}', reason="INVALID_ARGUMENT")
        return _DURABILITIES[name]

    async def _unary(
        self, method: str, request: Message, response_type: type[Response], timeout: float | None
    ) -> Response:
        return await self._linked().unary(method, request, response_type, self._timeout(timeout))

    def _explain(self, sessions: Sequence[Session]) -> None:
        """Raises the error for a session that cannot be stepped by this client."""
        for session in sessions:
            if session._client is not self:
                message = f"session {session.id!r} is of another client"
                raise InvalidInputError(message, reason="INVALID_HANDLE")
            session._live()

    async def _open(
        self, model: str, ids: Sequence[str], version: str, durability: int, timeout: float | None,
        constants: Sequence[Constants] = (),
    ) -> list[Session]:  # fmt: skip
        """constants: of each session, where there are any."""
        link = self._linked()
        limit_s = self._timeout(timeout)
        given = await self._encoded(model, version, constants, timeout)
        opened: list[Session | EngramError | None] = [self._already(model, name, version) for name in ids]
        new = [row for row, session in enumerate(opened) if session is None]
        deadline = None if limit_s is None else link.loop.time() + limit_s
        alike: dict[Encoded, list[int]] = {}  # one frame has one set of constants
        for row in new:
            alike.setdefault(given[row] if given else (), []).append(row)
        pieces = [
            (rows[at : at + _OPEN_ROWS], which)
            for which, rows in alike.items()
            for at in range(0, len(rows), _OPEN_ROWS)
        ]
        chunks = [chunk for chunk, _ in pieces]
        results = await asyncio.gather(
            *(
                self._open_chunk(model, [ids[row] for row in chunk], version, durability, which, deadline)
                for chunk, which in pieces
            ),
            return_exceptions=True,
        )
        for chunk, result in zip(chunks, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, EngramError):
                raise result
            for place, row in enumerate(chunk):
                opened[row] = result if isinstance(result, EngramError) else result[place]
        failed = next((one for one in opened if isinstance(one, EngramError)), None)
        good = [one for one in opened if isinstance(one, Session)]
        if failed is None:
            return good
        with contextlib.suppress(EngramError):
            created = {id(opened[row]) for row in new}
            await self._let_go([session for session in good if id(session) in created], detach=True, timeout=_GOODBYE_S)
        raise failed

    async def _encoded(
        self, model: str, version: str, constants: Sequence[Constants], timeout: float | None
    ) -> list[Encoded]:
        """Constants as they are sent; none where nobody gave any. What the model has is asked of the server, if it may have
        changed since sessions of it were opened."""
        if not any(constants):
            return []
        links = self._core.models if self._link is not None and version else []
        known = (link.info for link in reversed(links) if (link.info.name, link.info.version) == (model, version))
        info = next(known, None) or await self.models.get(model, version, timeout=timeout)
        return [encoded(one, info) for one in constants]

    def _already(self, model: str, session_id: str, version: str) -> Session | None:
        if self._link is None or not session_id:
            return None
        core = self._link.core
        slot = core.table.by_id.get(session_id)
        if slot is None or slot not in self._open_sessions:
            return None
        info = core.models[int(core.table.model[slot])].info
        fits = info.name == model and version in ("", info.version)
        return self._open_sessions[slot] if fits else None

    async def _open_chunk(
        self, model: str, ids: Sequence[str], version: str, durability: int, constants: Encoded, deadline: float | None
    ) -> list[Session | EngramError]:
        """One OpenFrame, again while it may succeed later, for the rows that have not succeeded yet."""
        opened: list[Session | EngramError | None] = [None] * len(ids)
        attempt = 0
        while left := [row for row, one in enumerate(opened) if one is None]:
            frame = stream_pb2.OpenFrame(
                model=model, version=version, session_ids=[ids[row] for row in left],
                durability=stream_pb2.Durability.Name(durability),
                client_id=self._client_id, ttl_ms=self._ttl_ms(), confirms=True,
                constants=[model_pb2.Constant(name=name, data=data) for name, data in constants],
            )  # fmt: skip
            answer = await self._request(stream_pb2.StreamRequest(open=frame), deadline)
            if answer is None:
                continue  # the stream was lost: an open may be repeated
            for row, one in zip(
                left, self._take_opened(model, frame.session_ids, answer.opened, durability), strict=True
            ):
                opened[row] = one
            attempt += 1
            wait = self._again(opened, attempt, deadline)
            if wait is not None:
                await asyncio.sleep(wait)
        return [one for one in opened if one is not None]

    def _again(self, opened: list[Session | EngramError | None], attempt: int, deadline: float | None) -> float | None:
        """Clears the rows to be tried again, and says how long to wait first; None: there are none."""
        again = [row for row, one in enumerate(opened) if isinstance(one, EngramError) and one.code in RETRYABLE]
        if not again:
            return None
        hints = [one.retry_after or 0.0 for one in opened if isinstance(one, EngramError)]
        link = self._linked()
        wait = max(*hints, link._backoff(attempt))
        if deadline is not None and link.loop.time() + wait >= deadline:
            return None
        for row in again:
            opened[row] = None
        return wait

    async def _request(
        self, request: stream_pb2.StreamRequest, deadline: float | None
    ) -> stream_pb2.StreamResponse | None:
        """A request on the stream; None if the stream was lost first. Raises DeadlineExceededError, UnavailableError."""
        link = self._linked()
        try:
            async with _until(deadline):
                await link.up()
                return await link.request(request)
        except StreamLostError:
            return None

    def _take_opened(
        self, model: str, ids: Sequence[str], answer: stream_pb2.OpenedFrame, durability: int
    ) -> list[Session | EngramError]:
        refused = {row.row: of_detail(row.error) for row in answer.errors}
        core = self._core
        index = self._model_index(answer, durability) if answer.HasField("model") else -1
        handles = np.frombuffer(answer.handles, "<u4").tolist()
        seqs = np.frombuffer(answer.seqs, "<i8").tolist()
        opened: list[Session | EngramError] = []
        for row, given in enumerate(ids):
            session_id = answer.session_ids[row] if answer.session_ids else given
            if row in refused or index < 0:
                error = refused.get(row) or of_detail(stream_pb2.RowError().error)
                error.metadata.setdefault("session", session_id)
                opened.append(error)
                continue
            former = self._open_sessions.pop(core.table.by_id.get(session_id, -1), None)
            if former is not None:
                former._let_go(SessionClosedError("the session was opened again here", reason="SESSION_CLOSED"))
            interval = durability == stream_pb2.DURABILITY_INTERVAL
            slot = core.enter(session_id, index, answer.window, interval, handles[row], seqs[row])
            session = self._open_sessions[slot] = Session(self, slot, session_id)
            opened.append(session)
        return opened

    def _model_index(self, answer: stream_pb2.OpenedFrame, durability: int) -> int:
        """The link for this model version and durability; a new one for the first session of it."""
        core, info = self._core, ModelInfo.of(answer.model)
        for index, link in enumerate(core.models):
            same_version = (link.info.name, link.info.version) == (info.name, info.version)
            if same_version and link.info.fingerprint == info.fingerprint and link.durability == durability:
                return index
        row = codec_of(info.inputs, "input", info.name)
        by_bytes = max(1, self.options.frame_bytes_max // max(1, row.nbytes))
        limits = [self.options.frame_rows_max, by_bytes, *([answer.rows_max] if answer.rows_max else [])]
        output = codec_of(info.outputs, "output", info.name)
        core.models.append(ModelLink(info, durability, self._ttl_ms(), row, output, min(limits)))
        return len(core.models) - 1

    def _ttl_ms(self) -> int:
        return int((self.options.ttl_s or 0) * 1000)

    async def _let_go(self, sessions: Sequence[Session], detach: bool, timeout: float | None) -> None:
        """Closes or detaches, again while it may succeed later; sessions that are gone already count as let go. Those that could
        not be stay as they are, and the first one's error is raised: so the call can be made again."""
        link = self._link
        if link is None or not sessions:
            return
        table = self._here(link).core.table
        limit_s = self._seconds(timeout)
        deadline = None if limit_s is None else link.loop.time() + limit_s
        mine = [session for session in sessions if session._uid >= 0 and session._client is self]
        failed: dict[Session, EngramError] = {}
        attempt = 0
        while alive := [one for one in mine if one._uid >= 0 and not table.lost[one._slot] and one not in failed]:
            async with _until(deadline):
                await link.up()
                if detach:
                    await asyncio.gather(*(link.core.settle(one._slot, None) for one in alive if one.in_doubt))
            slots = np.array([session._slot for session in alive])
            handles = table.handle[slots]
            if (handles == VOID_HANDLE).any():  # they are being attached again
                async with _until(deadline):
                    await asyncio.sleep(_ATTACHING_S)
                continue
            try:
                async with _until(deadline):
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


@contextlib.asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    """Raises DeadlineExceededError at the deadline (the loop's time; None: never)."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        if isinstance(error, EngramError):
            raise
        raise DeadlineExceededError("the timeout passed before the server answered") from None
