"""The blocking client: AsyncClient on an event loop in a thread of its own. Nothing is implemented twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from engram._blocking_manage import BlockingModels, BlockingSessions
from engram._blocking_session import BlockingSession
from engram._client import AsyncClient
from engram._constants import Constants
from engram._errors import ClientClosedError, CloseIncompleteError
from engram._loop_thread import LoopThread
from engram._options import UNSET, ClientOptions
from engram._tensors import Input
from engram._types import ServerInfo


class Client:
    """AsyncClient for programs without an event loop; the same names, blocking. May be used from many threads at once:
    steps that are ready together leave as one frame.

        with engram.Client("127.0.0.1:50051") as client:
            session = client.open("digits-reader", session_id="cam-7")
            y = session.step(x)
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
        self._client = AsyncClient(
            addresses, options, token=token, tls=tls, ca_file=ca_file, cert_file=cert_file, key_file=key_file
        )
        self._loop = LoopThread()
        self.sessions = BlockingSessions(self._loop, self._client.sessions)
        self.models = BlockingModels(self._loop, self._client.models)

    @property
    def options(self) -> ClientOptions:
        """How this client behaves."""
        return self._client.options

    def __enter__(self) -> Client:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CloseIncompleteError as unfinished:
            error.add_note(str(unfinished))

    def connect(self) -> None:
        """See AsyncClient.connect."""
        self._loop.wait(self._client.connect())

    def close(self) -> None:
        """See AsyncClient.aclose. In a forked process nothing: the client is its parent's."""
        if self._loop.elsewhere:
            return
        try:
            self._loop.wait(self._client.aclose())
        except ClientClosedError:
            return
        finally:
            self._loop.stop()

    def open(
        self,
        model: str,
        session_id: str | None = None,
        *,
        version: str = "",
        durability: str | None = None,
        constants: Constants | None = None,
        timeout: float | None = UNSET,
    ) -> BlockingSession:
        """See AsyncClient.open."""
        work = self._client.open(
            model, session_id, version=version, durability=durability, constants=constants, timeout=timeout
        )
        return BlockingSession(self._loop, self._loop.wait(work))

    def open_many(
        self,
        model: str,
        session_ids: Sequence[str] | int,
        *,
        version: str = "",
        durability: str | None = None,
        constants: Constants | Sequence[Constants] | None = None,
        timeout: float | None = UNSET,
    ) -> list[BlockingSession]:
        """See AsyncClient.open_many."""
        work = self._client.open_many(
            model, session_ids, version=version, durability=durability, constants=constants, timeout=timeout
        )
        return [BlockingSession(self._loop, session) for session in self._loop.wait(work)]

    def step_many(self, sessions: Sequence[BlockingSession], X: Input, *, timeout: float | None = UNSET) -> Any:
        """See AsyncClient.step_many."""
        return self._loop.wait(self._client.step_many([one._session for one in sessions], X, timeout=timeout))

    def close_many(self, sessions: Sequence[BlockingSession], *, timeout: float | None = UNSET) -> None:
        """See AsyncClient.close_many."""
        self._loop.wait(self._client.close_many([one._session for one in sessions], timeout=timeout))

    def detach_many(self, sessions: Sequence[BlockingSession], *, timeout: float | None = UNSET) -> None:
        """See AsyncClient.detach_many."""
        self._loop.wait(self._client.detach_many([one._session for one in sessions], timeout=timeout))

    def server(self, *, timeout: float | None = UNSET) -> ServerInfo:
        """See AsyncClient.server."""
        return self._loop.wait(self._client.server(timeout=timeout))
