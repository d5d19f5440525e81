"""Named arrays in safetensors files, read and written without torch. For bundle.py and bundle_writing.py."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import save_file

from engram_models.files import open_regular, read_file
from engram_models.spec import NP_DTYPES

_STORED = {
    "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "I8": "int8", "I16": "int16", "I32": "int32",
    "I64": "int64", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_BFLOAT16_EXPONENT = 0x7F80
_HEADER_BYTES_MAX = 100_000_000  # as the library has it


class StoredTensor(NamedTuple):
    """An array and its dtype's name, for bfloat16 has no NumPy dtype of its own: its values are raw uint16."""

    dtype: str
    values: NDArray[Any]

    @property
    def finite(self) -> bool:
        if self.dtype == "bfloat16":
            return not ((self.values & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
        return self.values.dtype.kind != "f" or bool(np.isfinite(self.values).all())

    @property
    def text(self) -> str:
        return f"{self.dtype} {tuple(self.values.shape)}"


Tensors = Mapping[str, StoredTensor]


def read_tensors(path: Path, bytes_max: int, prefixes: tuple[str, ...] = ()) -> dict[str, StoredTensor]:
    """Those whose names begin with one of `prefixes`, or all. Raises OSError, and SafetensorError or ValueError where the content
    is something else."""
    data = _part(path, bytes_max, prefixes) if prefixes else read_file(path, bytes_max)
    tensors: dict[str, StoredTensor] = {}
    for name, stored in deserialize(data):  # type: ignore[no-untyped-call]
        dtype = _STORED.get(stored["dtype"])
        if dtype is None:
            raise ValueError(f"{name} is of type {stored['dtype']}, which is not one of {', '.join(NP_DTYPES)}")
        values = np.frombuffer(stored["data"], NP_DTYPES[dtype]).reshape(stored["shape"])
        if dtype == "bool" and (np.frombuffer(stored["data"], np.uint8) > 1).any():
            raise ValueError(f"{name} has bytes that are neither true nor false")
        tensors[name] = StoredTensor(dtype, values)
    return tensors


def _part(path: Path, bytes_max: int, prefixes: tuple[str, ...]) -> bytes:
    """The content of a smaller file, which has these tensors alone; the others are not read."""
    with open_regular(path, bytes_max) as file:
        length = int.from_bytes(_exactly(file, 8), "little")
        if length > _HEADER_BYTES_MAX:
            raise ValueError(f"its header has {length} bytes; at most {_HEADER_BYTES_MAX} are read")
        header, parts, at = {}, [], 0
        for name, table in _header(_exactly(file, length)).items():
            if name.startswith(prefixes):
                begin, end = _place(table)
                file.seek(8 + length + begin)
                parts.append(_exactly(file, end - begin))
                header[name] = table | {"data_offsets": [at, at := at + end - begin]}
    named = json.dumps(header, allow_nan=False).encode()
    return b"".join((len(named).to_bytes(8, "little"), named, *parts))


def _header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except RecursionError:
        header = None
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    return header


def _place(table: Any) -> tuple[int, int]:
    """Where a tensor begins and ends."""
    match table:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError("its header does not say where a tensor is")


def _exactly(file: BinaryIO, nbytes: int) -> bytes:
    if nbytes < 0 or nbytes > os.fstat(file.fileno()).st_size or len(data := file.read(nbytes)) < nbytes:
        raise ValueError("it ends before its tensors do")
    return data


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Raises OSError or SafetensorError."""
    save_file({name: _named(tensor) for name, tensor in tensors.items()}, path)


def _named(tensor: StoredTensor) -> NDArray[Any]:
    """With the dtype that the file shall name."""
    values = np.ascontiguousarray(tensor.values)
    if tensor.dtype != "bfloat16":
        return values
    from ml_dtypes import bfloat16  # comes with onnx, which whoever writes bundles has

    named: NDArray[Any] = values.view(bfloat16)
    return named
