"""Files in memory: what a library is to read as a file, and nobody else may change meanwhile. Linux has them. And how much memory
there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from engram_models.files import open_regular
from engram_models.fingerprints import new_digest

OPEN_FILES = "/proc/self/fd"
_PIECE_BYTES = 1 << 20
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


def has_memory_files() -> bool:
    return hasattr(os, "memfd_create") and os.path.isdir(OPEN_FILES)


def open_in_memory() -> BinaryIO:
    """An empty one, which is gone when it is closed."""
    return open(os.memfd_create("engram"), "wb", 0)


def copied(path: Path, copy: BinaryIO, bytes_max: int) -> str:
    """Copies a file there, piece by piece; returns the digest of what was copied. Raises OSError, as files.read_file does."""
    digest = new_digest()
    with open_regular(path, bytes_max) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0 and (piece := file.read(min(left, _PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
            view = memoryview(piece)
            while view:
                view = view[copy.write(view) :]
    return digest.hexdigest()


def memory_bytes() -> int:
    """Of the machine, or of the container."""
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_MEMORY.read_text().strip()
    except OSError:
        return own
    return min(own, int(limit)) if limit.isdigit() else own
