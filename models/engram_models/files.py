"""Files that somebody else wrote: only regular ones are read, and no more of one than a limit. Used wherever a file is taken in.

A named pipe, a terminal or a device in the place of a file would have its reader wait for ever. A file is read and not mapped
into memory: whoever shortens a mapped file ends the process that reads it.
"""

from __future__ import annotations

import errno
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]

TOML_BYTES_MAX = 1 << 20
_LASTING = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENXIO,
    errno.EINVAL,
    errno.EFBIG,
    errno.EACCES,
)
# Without O_NONBLOCK the open itself would wait for a pipe's other end.
_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_READ_BYTES = 1 << 30  # of one system call
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def read_file(path: Path | str, bytes_max: int) -> bytes:
    """The content. Raises OSError, whose strerror says what is wrong, for whatever is no regular file of at most so many bytes."""
    file = os.open(path, _READING)
    try:
        left = _checked_size(os.fstat(file), path, bytes_max)
        parts = []
        while left and (part := os.read(file, min(left, _READ_BYTES))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(file)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def open_regular(path: Path | str, bytes_max: int) -> BinaryIO:
    """For who reads parts of it. Raises OSError as `read_file` does."""
    file = os.open(path, _READING)
    try:
        _checked_size(os.fstat(file), path, bytes_max)
    except OSError:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def require_regular(path: Path | str) -> None:
    """For readers that open the file themselves. Raises OSError."""
    _checked_size(os.stat(path), path, 1 << 62)


def read_toml(path: Path | str, bytes_max: int = TOML_BYTES_MAX) -> dict[str, Any]:
    """Raises OSError where the file cannot be read, and ValueError, `not toml: why`, where it is something else."""
    data = read_file(path, bytes_max)
    try:
        return _of_64_bits(tomllib.loads(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise ValueError("not toml: not UTF-8") from error
    except RecursionError:
        raise ValueError("not toml: arrays or tables are nested too deep") from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise ValueError(f"not toml: {str(error).partition('; use sys.')[0]}") from error


def stamp_of(*paths: Path) -> Stamp:
    """Changes when one of these files does, also when another one is put in its place; None for one that is not there."""
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _of_64_bits(content: dict[str, Any]) -> dict[str, Any]:
    """As toml has it. Python reads hexadecimal numbers of any length, and then cannot print them. Raises ValueError."""
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a whole number has more than 64 bits")
    return content


def is_passing(error: OSError) -> bool:
    """Whether the machine and not the file is to blame (no descriptor left, a file system that is away): the same file may be
    read later."""
    return error.errno not in _LASTING


def _checked_size(found: os.stat_result, path: Path | str, bytes_max: int) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
    if found.st_size > bytes_max:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes; at most {bytes_max} are read", str(path))
    return found.st_size
