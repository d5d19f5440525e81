"""The client: opens sessions and steps many at once. The blocking one of _blocking.py is made of this one."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from operator import attrgetter
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._calls import Call
from engram._constants import Constants
from engram._errors import (
    CloseIncompleteError,
    EngramError,
    InvalidInputError,
)
from engram._opening import Opening
from engram._options import UNSET, ClientOptions
from engram._poller import mark
from engram._session import Session
from engram._tensors import Input
from engram._types import ServerInfo
from engram.v1 import session_pb2, stream_pb2

_DURABILITIES = {
    None: stream_pb2.DURABILITY_UNSPECIFIED,
    "step": stream_pb2.DURABILITY_STEP,
    "interval": stream_pb2.DURABILITY_INTERVAL,
}
_UID = attrgetter("_uid")


class AsyncClient(Opening):
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
        super().__init__(addresses, replace(options or ClientOptions(), **wanted))

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

    def _durability(self, name: str | None) -> int:
        if name not in _DURABILITIES:
            raise InvalidInputError(f'durability is "step" or "interval"; got {name!r}', reason="INVALID_ARGUMENT")
        return _DURABILITIES[name]

    def _explain(self, sessions: Sequence[Session]) -> None:
        """Raises the error for a session that cannot be stepped by this client."""
        for session in sessions:
            if session._client is not self:
                message = f"session {session.id!r} is of another client"
                raise InvalidInputError(message, reason="INVALID_HANDLE")
            session._live()
