"""Management: sessions and models as the server has them, by unary calls. `client.sessions` and `client.models`."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram import _memories
from engram._arrays import RowCodec
from engram._options import UNSET
from engram._patterns import Patterns, Recreation, Stored
from engram._types import ModelInfo, SessionInfo, TensorSpec
from engram._unary import Unary
from engram.v1 import session_pb2

_PAGE = 500


class Sessions:
    """Sessions by id, whoever has them open. Every method takes `timeout` and raises EngramError."""

    def __init__(self, unary: Unary) -> None:
        self._unary = unary

    async def list(self, model: str = "", *, timeout: float | None = UNSET) -> AsyncIterator[SessionInfo]:
        """All sessions, or those of one model, page by page.

        One that is there all the while is listed at least once, and seldom twice; one that comes or goes meanwhile may be
        listed or not."""
        token = ""
        while True:
            request = session_pb2.ListSessionsRequest(page_size=_PAGE, page_token=token, model=model)
            response = await self._unary("ListSessions", request, session_pb2.ListSessionsResponse, timeout)
            for session in response.sessions:
                yield SessionInfo.of(session)
            token = response.next_page_token
            if not token:
                return

    async def get(self, session_id: str, *, timeout: float | None = UNSET) -> SessionInfo:
        """One session."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        response = await self._unary("GetSession", request, session_pb2.GetSessionResponse, timeout)
        return SessionInfo.of(response.session)

    async def state(
        self, session_id: str, *, min_seq: int = 0, timeout: float | None = UNSET
    ) -> dict[str, NDArray[Any]]:
        """The state tensors by name, as they stand in Redis; bfloat16 as float32. min_seq: see `fork`."""
        request = session_pb2.GetSessionStateRequest(session_id=session_id, min_seq=min_seq)
        response = await self._unary("GetSessionState", request, session_pb2.GetSessionStateResponse, timeout)
        state: dict[str, NDArray[Any]] = {}
        for tensor in response.tensors:
            codec = RowCodec(TensorSpec.of(tensor.spec), f"state {tensor.spec.name}")
            state[tensor.spec.name] = np.array(codec.decode(tensor.data, 1)[0])
        return state

    def store(
        self,
        session_id: str,
        patterns: ArrayLike,
        labels: Sequence[str] | str | None = None,
        *,
        timeout: float | None = UNSET,
    ) -> Coroutine[Any, Any, Stored]:
        """See Session.store."""
        return _memories.store(self._unary, session_id, patterns, labels, timeout)

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
    ) -> Coroutine[Any, Any, Any]:
        """See Session.recall."""
        return _memories.recall(self._unary, session_id, cue, mask, synchronous, seed, sweeps_max, timeout)

    async def forget(
        self,
        session_id: str,
        labels: Sequence[str] | str | None = None,
        *,
        all: bool = False,
        timeout: float | None = UNSET,
    ) -> int:
        """See Session.forget."""
        return await _memories.forget(self._unary, session_id, labels, all, timeout)

    async def patterns(self, session_id: str, *, values: bool = False, timeout: float | None = UNSET) -> Patterns:
        """See Session.patterns."""
        return await _memories.patterns(self._unary, session_id, values, timeout)

    def address(
        self, session_id: str, key: ArrayLike, strength: ArrayLike = 1.0, *, timeout: float | None = UNSET
    ) -> Coroutine[Any, Any, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """See Session.address."""
        return _memories.address(self._unary, session_id, key, strength, timeout)

    def recreate(
        self,
        session_id: str,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        sweeps: int = 1,
        timeout: float | None = UNSET,
    ) -> Coroutine[Any, Any, Recreation]:
        """See Session.recreate."""
        return _memories.recreate(self._unary, {"session_id": session_id}, x, mask, sweeps, timeout)

    async def fork(
        self, session_id: str, new_session_id: str | None = None, *, min_seq: int = 0, timeout: float | None = UNSET
    ) -> SessionInfo:
        """A new session that stands where this one stands in Redis; without an id the server makes one.

        min_seq: the step that it stands at, or a later one. Of a session with durability `interval`, Redis may be behind.
        """
        request = session_pb2.ForkSessionRequest(
            session_id=session_id, new_session_id=new_session_id or "", min_seq=min_seq
        )
        response = await self._unary("ForkSession", request, session_pb2.ForkSessionResponse, timeout)
        return SessionInfo.of(response.session)

    async def close(self, session_id: str, *, timeout: float | None = UNSET) -> None:
        """Ends a session and deletes its record; whoever has it open is told."""
        request = session_pb2.CloseSessionRequest(session_id=session_id)
        await self._unary("CloseSession", request, session_pb2.CloseSessionResponse, timeout)

    async def move(self, session_id: str, version: str, *, timeout: float | None = UNSET) -> SessionInfo:
        """Moves a session to another version of its model with the same state schema."""
        request = session_pb2.MoveSessionRequest(session_id=session_id, version=version)
        response = await self._unary("MoveSession", request, session_pb2.MoveSessionResponse, timeout)
        return SessionInfo.of(response.session)

    async def export(self, session_id: str, *, min_seq: int = 0, timeout: float | None = UNSET) -> bytes:
        """The session as self-contained bytes for `import_`. min_seq: see `fork`."""
        request = session_pb2.ExportSessionRequest(session_id=session_id, min_seq=min_seq)
        response = await self._unary("ExportSession", request, session_pb2.ExportSessionResponse, timeout)
        return response.data

    async def import_(
        self, data: bytes, session_id: str | None = None, *, timeout: float | None = UNSET
    ) -> SessionInfo:
        """A session out of exported bytes, under its own id or another."""
        request = session_pb2.ImportSessionRequest(data=data, session_id=session_id or "")
        response = await self._unary("ImportSession", request, session_pb2.ImportSessionResponse, timeout)
        return SessionInfo.of(response.session)


class Models:
    """What is served. Every method takes `timeout` and raises EngramError."""

    def __init__(self, unary: Unary) -> None:
        self._unary = unary

    async def list(self, *, timeout: float | None = UNSET) -> list[ModelInfo]:
        """Every version of every model."""
        request = session_pb2.ListModelsRequest()
        response = await self._unary("ListModels", request, session_pb2.ListModelsResponse, timeout)
        return [ModelInfo.of(model) for model in response.models]

    async def get(self, model: str, version: str = "", *, timeout: float | None = UNSET) -> ModelInfo:
        """One version of one model; the latest if none is named."""
        request = session_pb2.GetModelRequest(model=model, version=version)
        response = await self._unary("GetModel", request, session_pb2.GetModelResponse, timeout)
        return ModelInfo.of(response.model)

    def recreate(
        self, model: str, x: ArrayLike, mask: ArrayLike | None = None, *, version: str = "", sweeps: int = 1,
        timeout: float | None = UNSET,
    ) -> Coroutine[Any, Any, Recreation]:  # fmt: skip
        """See Session.recreate; no session is needed."""
        of = {"model": model, "version": version}
        return _memories.recreate(self._unary, of, x, mask, sweeps, timeout)

    async def reload(self, *, timeout: float | None = UNSET) -> tuple[builtins.list[ModelInfo], builtins.list[str]]:
        """Looks at the models directory now; what is served, and what is wrong with the rest."""
        request = session_pb2.ReloadModelsRequest()
        response = await self._unary("ReloadModels", request, session_pb2.ReloadModelsResponse, timeout)
        return [ModelInfo.of(model) for model in response.models], list(response.errors)
