"""The blocking client's sessions."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._loop_thread import LoopThread
from engram._options import UNSET
from engram._patterns import Patterns, Recreation, Stored
from engram._session import Session
from engram._tensors import Input
from engram._types import ModelInfo, Settled


class BlockingSession:
    """See Session: the same names, blocking."""

    def __init__(self, loop: LoopThread, session: Session) -> None:
        self._loop = loop
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
        return BlockingSession(self._loop, self._loop.wait(self._session.fork(session_id, timeout=timeout)))

    def close(self, *, timeout: float | None = UNSET) -> None:
        """See Session.close."""
        self._loop.wait(self._session.close(timeout=timeout))

    def detach(self, *, timeout: float | None = UNSET) -> None:
        """See Session.detach."""
        self._loop.wait(self._session.detach(timeout=timeout))
