"""Looks at the directories of models, and has the data process look where something has changed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from engram_models.bundle import GRAPH, MANIFEST, WEIGHTS, Repository
from engram_models.files import Stamp, stamp_of
from engram_service.errors import UnavailableError
from engram_service.manager.data_process import DataProcess
from engram_service.settings import Settings

Seen = tuple[dict[Path, Stamp], list[str]]


async def watch_models(settings: Settings, data: DataProcess, look: asyncio.Event) -> None:
    """Every models_poll_s, and when `look` is set; runs until cancelled."""
    repository = Repository(settings.model_directories())
    before: Seen | None = None
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


def _seen(repository: Repository) -> Seen:
    """The files of all bundles that are there, and what is wrong with the directories."""
    found, errors = repository.scan()
    stamps = {ref.path: stamp_of(*(ref.path / name for name in (MANIFEST, WEIGHTS, GRAPH))) for ref in found}
    return stamps, errors
