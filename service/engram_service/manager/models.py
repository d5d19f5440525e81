"""Looks at the directories of models, and has the data process look where something has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from engram_models.bundle import GRAPH, MANIFEST, WEIGHTS, Repository
from engram_service.errors import UnavailableError
from engram_service.manager.data_process import DataProcess
from engram_service.settings import Settings

log = logging.getLogger(__name__)

Seen = tuple[tuple[str, int, int, int], ...]


async def watch_models(settings: Settings, data: DataProcess, look: asyncio.Event) -> None:
    """Every models_poll_s, and when `look` is set; runs until cancelled."""
    repository = Repository(settings.model_directories())
    before: tuple[Seen, list[str]] | None = None
    again = True  # what failed may not the next time
    while True:
        asked = look.is_set()
        look.clear()
        seen = await asyncio.to_thread(_seen, repository)
        if asked or again or seen != before:
            with contextlib.suppress(UnavailableError):  # its next one looks as it starts
                _, again = await data.reload()
                before = seen
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(look.wait(), settings.models_poll_s or None)


def _seen(repository: Repository) -> tuple[Seen, list[str]]:
    """The files of all bundles that are there, and what is wrong with the directories."""
    found, errors = repository.scan()
    seen = []
    for ref in found:
        for name in (MANIFEST, WEIGHTS, GRAPH):
            with contextlib.suppress(OSError):
                file = os.stat(ref.path / name)
                seen.append((str(ref.path / name), file.st_mtime_ns, file.st_size, file.st_ino))
    return tuple(seen), errors
