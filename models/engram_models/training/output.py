"""Writes files of training and of the demo, so that a kill or a full disk leaves the old content or the new one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from engram_models.training.errors import TrainingError


def write_whole(path: Path, data: bytes) -> None:
    """A file's new content, whole or not at all. Raises TrainingError."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):  # there may be no folder to remove it from
            beside.unlink(missing_ok=True)
        raise TrainingError(f"{path}: {error.strerror or error}; nothing was written") from error
