"""The blocking client's management calls: Client.sessions and Client.models."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._loop_thread import LoopThread
from engram._manage import Models, Sessions
from engram._options import UNSET
from engram._patterns import Patterns, Recreation, Stored
from engram._types import ModelInfo, SessionInfo


class BlockingSessions:
    """See Sessions: the same names, blocking."""

    def __init__(self, loop: LoopThread, sessions: Sessions) -> None:
        self._loop = loop
        self._sessions = sessions

    def list(self, model: str = "", *, timeout: float | None = UNSET) -> Iterator[SessionInfo]:
        """See Sessions.list."""
        return self._loop.iterate(self._sessions.list(model, timeout=timeout))

    def get(self, session_id: str, *, timeout: float | None = UNSET) -> SessionInfo:
        """See Sessions.get."""
        return self._loop.wait(self._sessions.get(session_id, timeout=timeout))

    def state(self, session_id: str, *, min_seq: int = 0, timeout: float | None = UNSET) -> dict[str, NDArray[Any]]:
        """See Sessions.state."""
        return self._loop.wait(self._sessions.state(session_id, min_seq=min_seq, timeout=timeout))

    def store(
        self,
        session_id: str,
        patterns: ArrayLike,
        labels: Sequence[str] | str | None = None,
        *,
        timeout: float | None = UNSET,
    ) -> Stored:
        """See Session.store."""
        return self._loop.wait(self._sessions.store(session_id, patterns, labels, timeout=timeout))

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
        return self._loop.wait(
            self._sessions.recall(
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
        return self._loop.wait(self._sessions.forget(session_id, labels, all=all, timeout=timeout))

    def patterns(self, session_id: str, *, values: bool = False, timeout: float | None = UNSET) -> Patterns:
        """See Session.patterns."""
        return self._loop.wait(self._sessions.patterns(session_id, values=values, timeout=timeout))

    def address(
        self, session_id: str, key: ArrayLike, strength: ArrayLike = 1.0, *, timeout: float | None = UNSET
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See Session.address."""
        return self._loop.wait(self._sessions.address(session_id, key, strength, timeout=timeout))

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
        return self._loop.wait(self._sessions.recreate(session_id, x, mask, sweeps=sweeps, timeout=timeout))

    def fork(
        self, session_id: str, new_session_id: str | None = None, *, min_seq: int = 0, timeout: float | None = UNSET
    ) -> SessionInfo:
        """See Sessions.fork."""
        return self._loop.wait(self._sessions.fork(session_id, new_session_id, min_seq=min_seq, timeout=timeout))

    def close(self, session_id: str, *, timeout: float | None = UNSET) -> None:
        """See Sessions.close."""
        self._loop.wait(self._sessions.close(session_id, timeout=timeout))

    def move(self, session_id: str, version: str, *, timeout: float | None = UNSET) -> SessionInfo:
        """See Sessions.move."""
        return self._loop.wait(self._sessions.move(session_id, version, timeout=timeout))

    def export(self, session_id: str, *, min_seq: int = 0, timeout: float | None = UNSET) -> bytes:
        """See Sessions.export."""
        return self._loop.wait(self._sessions.export(session_id, min_seq=min_seq, timeout=timeout))

    def import_(self, data: bytes, session_id: str | None = None, *, timeout: float | None = UNSET) -> SessionInfo:
        """See Sessions.import_."""
        return self._loop.wait(self._sessions.import_(data, session_id, timeout=timeout))


class BlockingModels:
    """See Models: the same names, blocking."""

    def __init__(self, loop: LoopThread, models: Models) -> None:
        self._loop = loop
        self._models = models

    def list(self, *, timeout: float | None = UNSET) -> list[ModelInfo]:
        """See Models.list."""
        return self._loop.wait(self._models.list(timeout=timeout))

    def get(self, model: str, version: str = "", *, timeout: float | None = UNSET) -> ModelInfo:
        """See Models.get."""
        return self._loop.wait(self._models.get(model, version, timeout=timeout))

    def recreate(
        self, model: str, x: ArrayLike, mask: ArrayLike | None = None, *, version: str = "", sweeps: int = 1,
        timeout: float | None = UNSET,
    ) -> Recreation:  # fmt: skip
        """See Models.recreate."""
        work = self._models.recreate(model, x, mask, version=version, sweeps=sweeps, timeout=timeout)
        return self._loop.wait(work)

    def reload(self, *, timeout: float | None = UNSET) -> tuple[builtins.list[ModelInfo], builtins.list[str]]:
        """See Models.reload."""
        return self._loop.wait(self._models.reload(timeout=timeout))
