"""The blocking client: AsyncClient on an event loop in a thread of its own. Nothing is implemented twice."""

from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._client import AsyncClient
from engram._constants import Constants
from engram._errors import ClientClosedError, CloseIncompleteError
from engram._options import UNSET, ClientOptions
from engram._patterns import Patterns, Recreation, Stored
from engram._poller import check, mark
from engram._session import Session
from engram._tensors import Input
from engram._types import ModelInfo, ServerInfo, SessionInfo, Settled

_T = TypeVar("_T")

_END_S = 0.5


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._mark = mark()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engram-client", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs it there; its result here. Interrupting the wait cancels the work."""
        if not self._thread.is_alive():
            work.close()
            check(self._mark)
            raise ClientClosedError("the client was closed", reason="CLIENT_CLOSED")
        # Held until the work has ended. A bare lock, which Ctrl-C leaves whole: raised inside a Future's condition, it may
        # leave that locked for ever.
        under_way = threading.Lock()
        under_way.acquire()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(ended)

        def ended(task: asyncio.Task[_T]) -> None:
            if not task.cancelled():
                task.exception()  # looked at, also where an interrupted caller does not
            under_way.release()

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            under_way.acquire()
        except BaseException:
            self._loop.call_soon_threadsafe(cancel)
            raise
        return tasks[0].result()

    def iterate(self, items: AsyncIterator[_T]) -> Iterator[_T]:
        """The items, one by one as they are asked for."""
        end = object()
        running: list[asyncio.Task[Any]] = []

        async def following() -> Any:
            task = asyncio.current_task()
            assert task is not None  # a coroutine runs in one
            running[:] = [task]
            return await anext(items, end)

        async def ending() -> None:
            # An interrupted wait leaves the step towards the next item to be cancelled first.
            for task in running:
                task.cancel()
                await asyncio.wait([task])
            if isinstance(items, AsyncGenerator):
                await items.aclose()

        try:
            while (item := self.wait(following())) is not end:
                yield item
        finally:
            if self._thread.is_alive():
                self.wait(ending())

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in a process from which this one was forked."""
        return self._mark != mark()

    def stop(self) -> None:
        """Ends what still runs there, gRPC's own tasks with it, and the thread."""
        if self._thread.is_alive():
            self.wait(_end_tasks())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _end_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_END_S)  # gRPC's tasks end by themselves once a call has its status
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


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
        self._loop = _Loop()
        self.sessions = BlockingSessions(self)
        self.models = BlockingModels(self)

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
        return BlockingSession(self, self._loop.wait(work))

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
        return [BlockingSession(self, session) for session in self._loop.wait(work)]

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


class BlockingSession:
    """See Session: the same names, blocking."""

    def __init__(self, client: Client, session: Session) -> None:
        self._client = client
        self._loop = client._loop
        self._session = session

    def __repr__(self) -> str:
        return repr(self._session)

    @property
    def id(self) -> str:
        """See Session.id."""
        return self._session.id

    @property
    def seq(self) -> int:
        """See Session.seq."""
        return self._session.seq

    @property
    def durable_seq(self) -> int:
        """See Session.durable_seq."""
        return self._session.durable_seq

    @property
    def model(self) -> ModelInfo:
        """See Session.model."""
        return self._session.model

    def step(self, x: Input, *, timeout: float | None = UNSET) -> Any:
        """See Session.step."""
        return self._loop.wait(self._session.step(x, timeout=timeout))

    def run(self, X: Input, *, timeout: float | None = UNSET) -> Any:
        """See Session.run."""
        return self._loop.wait(self._session.run(X, timeout=timeout))

    def prefill(self, X: Input, *, timeout: float | None = UNSET) -> None:
        """See Session.prefill."""
        self._loop.wait(self._session.prefill(X, timeout=timeout))

    def generate(self, k: int, *, timeout: float | None = UNSET) -> Any:
        """See Session.generate."""
        return self._loop.wait(self._session.generate(k, timeout=timeout))

    def stream(
        self,
        source: Iterable[Input] | AsyncIterable[Input] | Mapping[str, ArrayLike],
        *,
        ahead: int = 64,
        timeout: float | None = UNSET,
    ) -> Iterator[Any]:
        """See Session.stream. The source is read in another thread."""
        return self._loop.iterate(self._session.stream(source, ahead=ahead, timeout=timeout))

    @property
    def in_doubt(self) -> bool:
        """See Session.in_doubt."""
        return self._session.in_doubt

    def settle(self, *, timeout: float | None = UNSET) -> Settled:
        """See Session.settle."""
        return self._loop.wait(self._session.settle(timeout=timeout))

    def state(self, *, timeout: float | None = UNSET) -> dict[str, NDArray[Any]]:
        """See Session.state."""
        return self._loop.wait(self._session.state(timeout=timeout))

    def store(
        self, patterns: ArrayLike, labels: Sequence[str] | str | None = None, *, timeout: float | None = UNSET
    ) -> Stored:
        """See Session.store."""
        return self._loop.wait(self._session.store(patterns, labels, timeout=timeout))

    def recall(
        self,
        cue: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        synchronous: bool = False,
        seed: int = 0,
        sweeps_max: int = 100,
        timeout: float | None = UNSET,
    ) -> Any:
        """See Session.recall."""
        return self._loop.wait(
            self._session.recall(cue, mask, synchronous=synchronous, seed=seed, sweeps_max=sweeps_max, timeout=timeout)
        )

    def forget(
        self, labels: Sequence[str] | str | None = None, *, all: bool = False, timeout: float | None = UNSET
    ) -> int:
        """See Session.forget."""
        return self._loop.wait(self._session.forget(labels, all=all, timeout=timeout))

    def patterns(self, *, values: bool = False, timeout: float | None = UNSET) -> Patterns:
        """See Session.patterns."""
        return self._loop.wait(self._session.patterns(values=values, timeout=timeout))

    def address(
        self, key: ArrayLike, strength: ArrayLike = 1.0, *, timeout: float | None = UNSET
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See Session.address."""
        return self._loop.wait(self._session.address(key, strength, timeout=timeout))

    def recreate(
        self, x: ArrayLike, mask: ArrayLike | None = None, *, sweeps: int = 1, timeout: float | None = UNSET
    ) -> Recreation:
        """See Session.recreate."""
        return self._loop.wait(self._session.recreate(x, mask, sweeps=sweeps, timeout=timeout))

    def fork(self, session_id: str | None = None, *, timeout: float | None = UNSET) -> BlockingSession:
        """See Session.fork."""
        return BlockingSession(self._client, self._loop.wait(self._session.fork(session_id, timeout=timeout)))

    def close(self, *, timeout: float | None = UNSET) -> None:
        """See Session.close."""
        self._loop.wait(self._session.close(timeout=timeout))

    def detach(self, *, timeout: float | None = UNSET) -> None:
        """See Session.detach."""
        self._loop.wait(self._session.detach(timeout=timeout))


class BlockingSessions:
    """See Sessions: the same names, blocking."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, model: str = "", *, timeout: float | None = UNSET) -> Iterator[SessionInfo]:
        """See Sessions.list."""
        return self._client._loop.iterate(self._client._client.sessions.list(model, timeout=timeout))

    def get(self, session_id: str, *, timeout: float | None = UNSET) -> SessionInfo:
        """See Sessions.get."""
        return self._client._loop.wait(self._client._client.sessions.get(session_id, timeout=timeout))

    def state(self, session_id: str, *, min_seq: int = 0, timeout: float | None = UNSET) -> dict[str, NDArray[Any]]:
        """See Sessions.state."""
        return self._client._loop.wait(
            self._client._client.sessions.state(session_id, min_seq=min_seq, timeout=timeout)
        )

    def store(
        self,
        session_id: str,
        patterns: ArrayLike,
        labels: Sequence[str] | str | None = None,
        *,
        timeout: float | None = UNSET,
    ) -> Stored:
        """See Session.store."""
        return self._client._loop.wait(
            self._client._client.sessions.store(session_id, patterns, labels, timeout=timeout)
        )

    def recall(
        self,
        session_id: str,
        cue: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        synchronous: bool = False,
        seed: int = 0,
        sweeps_max: int = 100,
        timeout: float | None = UNSET,
    ) -> Any:
        """See Session.recall."""
        return self._client._loop.wait(
            self._client._client.sessions.recall(
                session_id, cue, mask, synchronous=synchronous, seed=seed, sweeps_max=sweeps_max, timeout=timeout
            )
        )

    def forget(
        self,
        session_id: str,
        labels: Sequence[str] | str | None = None,
        *,
        all: bool = False,
        timeout: float | None = UNSET,
    ) -> int:
        """See Session.forget."""
        return self._client._loop.wait(
            self._client._client.sessions.forget(session_id, labels, all=all, timeout=timeout)
        )

    def patterns(self, session_id: str, *, values: bool = False, timeout: float | None = UNSET) -> Patterns:
        """See Session.patterns."""
        return self._client._loop.wait(
            self._client._client.sessions.patterns(session_id, values=values, timeout=timeout)
        )

    def address(
        self, session_id: str, key: ArrayLike, strength: ArrayLike = 1.0, *, timeout: float | None = UNSET
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See Session.address."""
        return self._client._loop.wait(
            self._client._client.sessions.address(session_id, key, strength, timeout=timeout)
        )

    def recreate(
        self,
        session_id: str,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        sweeps: int = 1,
        timeout: float | None = UNSET,
    ) -> Recreation:
        """See Session.recreate."""
        return self._client._loop.wait(
            self._client._client.sessions.recreate(session_id, x, mask, sweeps=sweeps, timeout=timeout)
        )

    def fork(
        self, session_id: str, new_session_id: str | None = None, *, min_seq: int = 0, timeout: float | None = UNSET
    ) -> SessionInfo:
        """See Sessions.fork."""
        return self._client._loop.wait(
            self._client._client.sessions.fork(session_id, new_session_id, min_seq=min_seq, timeout=timeout)
        )

    def close(self, session_id: str, *, timeout: float | None = UNSET) -> None:
        """See Sessions.close."""
        self._client._loop.wait(self._client._client.sessions.close(session_id, timeout=timeout))

    def move(self, session_id: str, version: str, *, timeout: float | None = UNSET) -> SessionInfo:
        """See Sessions.move."""
        return self._client._loop.wait(self._client._client.sessions.move(session_id, version, timeout=timeout))

    def export(self, session_id: str, *, min_seq: int = 0, timeout: float | None = UNSET) -> bytes:
        """See Sessions.export."""
        return self._client._loop.wait(
            self._client._client.sessions.export(session_id, min_seq=min_seq, timeout=timeout)
        )

    def import_(self, data: bytes, session_id: str | None = None, *, timeout: float | None = UNSET) -> SessionInfo:
        """See Sessions.import_."""
        return self._client._loop.wait(self._client._client.sessions.import_(data, session_id, timeout=timeout))


class BlockingModels:
    """See Models: the same names, blocking."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, *, timeout: float | None = UNSET) -> list[ModelInfo]:
        """See Models.list."""
        return self._client._loop.wait(self._client._client.models.list(timeout=timeout))

    def get(self, model: str, version: str = "", *, timeout: float | None = UNSET) -> ModelInfo:
        """See Models.get."""
        return self._client._loop.wait(self._client._client.models.get(model, version, timeout=timeout))

    def recreate(
        self, model: str, x: ArrayLike, mask: ArrayLike | None = None, *, version: str = "", sweeps: int = 1,
        timeout: float | None = UNSET,
    ) -> Recreation:  # fmt: skip
        """See Models.recreate."""
        work = self._client._client.models.recreate(model, x, mask, version=version, sweeps=sweeps, timeout=timeout)
        return self._client._loop.wait(work)

    def reload(self, *, timeout: float | None = UNSET) -> tuple[builtins.list[ModelInfo], builtins.list[str]]:
        """See Models.reload."""
        return self._client._loop.wait(self._client._client.models.reload(timeout=timeout))
