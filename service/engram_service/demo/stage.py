"""A story's own server with the models it is about; killed with SIGKILL and started again where the story says so."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models import shipped_models_dir
from engram_service.demo.screen import Screen
from engram_service.local import LocalServer, LocalServerError

# With few sessions there are few sizes of batches to look at and little room to make: the server is ready sooner.
FEW_SESSIONS = ("--batch-rows-max", "32", "--arena-slots-max", "64")


class Stage:
    """The server, and how often it was killed. `address` stays the same."""

    def __init__(self, server: LocalServer, screen: Screen) -> None:
        self._server = server
        self._screen = screen
        self.kills = 0
        self.away_s = 0.0

    @property
    def address(self) -> str:
        return self._server.address

    async def kill(self, meanwhile: str) -> None:
        """Kills the server with SIGKILL and starts it again. The client is told nothing. `meanwhile`: what goes on then."""
        begun = time.monotonic()
        pid = self._server.pid
        await asyncio.to_thread(self._server.kill)
        self.kills += 1
        self._screen.say(f"the server (process {pid}) is killed with SIGKILL, {meanwhile}; starting it again")
        await asyncio.to_thread(self._server.start)
        self.away_s = time.monotonic() - begun
        self._screen.say(
            f"back after {self.away_s:.1f} s as process {self._server.pid}; the sessions carry on where they stood"
        )


@contextmanager
def stage(
    screen: Screen, models: Sequence[str], source: Path | None = None, flags: Sequence[str] = ()
) -> Iterator[Stage]:
    """A private server for the named models alone, from the bundles in `source` (default: the shipped ones).

    Raises LocalServerError where a bundle is missing or the server does not start.
    """
    source = source or shipped_models_dir()
    for model in models:
        if not (source / model).is_dir():
            message = (
                f"there is no bundle {model!r} in {source}; `engram train {model}` makes one, --models names its folder"
            )
            raise LocalServerError(message)
    with tempfile.TemporaryDirectory(prefix="engram-demo-") as scratch:
        for model in models:
            shutil.copytree(source / model, Path(scratch, "models", model))
        screen.say("starting a server with a Redis of its own")
        served = ("--shipped-models", "false", "--log-format", "human", *flags)
        with LocalServer(Path(scratch), Path(scratch, "models"), served) as server:
            yield Stage(server, screen)


def bits_that_differ(one: NDArray[Any], other: NDArray[Any]) -> int:
    """Number of bits in which two arrays of the same shape and dtype differ. Raises ValueError where those differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)} cannot be compared")
    return int(np.unpackbits(_bytes(one) ^ _bytes(other)).sum())


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(array.tobytes(), np.uint8)
