"""The append-only files of the private Redis, brought to the disk. Owned by private.py, whose watch calls it once a second.

They are held open: a sync needs no file that is free, so connections that use them all up put off no sync.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_DIRECTORY = "appendonlydir"  # from Redis 7 on; before, it was one file
_SETTLED_S = 2.0  # until the time of a directory tells of whatever changes in it from then on


class AppendOnlyFiles:
    """Those in a data directory, under whichever names."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[Path, int] = {}
        self._changed: list[int] = []  # of the directories, when they were listed

    def sync(self) -> dict[str, OSError]:
        """What could not be synced, by name. Raises OSError where the directory has changed and cannot be listed."""
        self._follow()
        failed = {}
        for path, file in self._open.items():
            try:
                os.fdatasync(file)
            except OSError as error:
                failed[path.name] = error
        return failed

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open.clear()

    @property
    def by_directory(self) -> bool:
        """Whether they are in a directory of their own."""
        return (self._directory / _DIRECTORY).is_dir()

    def _follow(self) -> None:
        """Opens those that are new, and lets go of those that are gone. Nothing is listed unless something has changed."""
        changed = [one.stat().st_mtime_ns for one in (self._directory, self._directory / _DIRECTORY) if one.is_dir()]
        if changed == self._changed:
            return
        found = {*self._directory.glob("appendonly*.aof"), *self._directory.glob(f"{_DIRECTORY}/*.incr.aof")}
        for path, file in list(self._open.items()):
            if path not in found or not _same(path, file):
                os.close(self._open.pop(path))
        for path in found - self._open.keys():
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # rewritten meanwhile
        settled = max(changed) < time.time_ns() - _SETTLED_S * 1e9
        self._changed = changed if settled else []


def _same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
