"""Reads somebody's .npz (--initial, --verify): numbers alone, and no more than its size says. For the import command."""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from engram_models.files import read_file
from engram_models.importing.errors import ImportRefusedError, shown

FILE_BYTES_MAX = 1 << 30
CONTENT_BYTES_MAX = 1 << 30  # unpacked
ARRAYS_MAX = 4_096
_HEADER_MAX = 10_000
_KINDS = "fiub"
_BROKEN = (  # NumPy reads an array's header as Python
    zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, SyntaxError, tokenize.TokenError,
    MemoryError,
)  # fmt: skip


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Name: array. Raises ImportRefusedError for what is no .npz of numbers, or unpacks to more than CONTENT_BYTES_MAX."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(read_file(path, FILE_BYTES_MAX)))
        entries = archive.infolist()
        if len(entries) > ARRAYS_MAX:
            raise ImportRefusedError(f"{path}: it has {len(entries)} arrays; at most {ARRAYS_MAX} are read")
        if sum(entry.file_size for entry in entries) > CONTENT_BYTES_MAX:
            raise ImportRefusedError(f"{path}: its arrays have more than {CONTENT_BYTES_MAX >> 20} MB")
        return {entry.filename.removesuffix(".npy"): _array(archive, entry, path) for entry in entries}
    except OSError as error:
        raise ImportRefusedError(f"{path}: cannot be read: {error.strerror}") from error
    except _BROKEN as error:
        raise ImportRefusedError(f"{path}: it is not an .npz file of numpy.savez, or it is damaged") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    with archive.open(entry) as file:
        # One byte more than it says: unpacking stops there, whatever the archive goes on with.
        data = file.read(entry.file_size + 1)
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ImportRefusedError(f"{path}: {shown(entry.filename)} is of a version of .npy that is not read")
    shape, fortran, dtype = read(stream, max_header_size=_HEADER_MAX)
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise ImportRefusedError(
            f"{path}: {shown(entry.filename)} holds {shown(str(dtype))}; numbers are read and nothing else"
        )
    rest = len(data) - stream.tell()
    if prod(shape) * dtype.itemsize != rest or any(size < 0 for size in shape):
        raise ImportRefusedError(
            f"{path}: {shown(entry.filename)} has {rest} bytes; its shape {list(shape)} asks for another number"
        )
    array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape)
