"""Names and numbers in a stranger's file: names can be printed, numbers are as many as dimensions say. For reading.py."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import TensorProto

from engram_models.importing.errors import ImportRefusedError, shown

NAME_MAX = 1_024
RANK_MAX = 16
DIM_MAX = 1 << 31

_BITS = {  # of an element in raw_data
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8, "FLOAT16": 16,
    "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128, "BFLOAT16": 16, "FLOAT8E4M3FN": 8,
    "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "FLOAT8E8M0": 8,
    "UINT2": 2, "INT2": 2,
}  # fmt: skip
_TYPED = {
    "FLOAT": ("float_data", 1), "COMPLEX64": ("float_data", 2), "DOUBLE": ("double_data", 1),
    "COMPLEX128": ("double_data", 2), "INT64": ("int64_data", 1), "UINT32": ("uint64_data", 1), "UINT64": ("uint64_data", 1),
}  # fmt: skip
_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_tensor(tensor: TensorProto, what: str) -> None:
    """Type and dimensions are those of the bytes that are there: no more and no fewer."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise ImportRefusedError(
            f"{what} is in another file, which is not opened; put the weights inline: torch.onnx.export(..., external_data=False), "
            "or onnx.save(onnx.load(file), new_file)"
        )
    kind = next((name for name, number in TensorProto.DataType.items() if number == tensor.data_type), "UNDEFINED")
    if kind not in _BITS or tensor.HasField("segment"):
        raise ImportRefusedError(f"{what} is of type {kind}, which is not served")
    if len(tensor.dims) > RANK_MAX or any(not 0 <= size < DIM_MAX for size in tensor.dims):
        raise ImportRefusedError(f"{what} has impossible dimensions")
    size, bits = prod(tensor.dims), _BITS[kind]
    packed = -(-size * bits // 8) if bits < 8 else size  # below a byte, an int32 holds one byte
    if tensor.HasField("raw_data"):
        field, found, wanted, unit = "raw_data", len(tensor.raw_data), -(-size * bits // 8), "bytes"
    else:
        field, each = _TYPED.get(kind, ("int32_data", 1))
        found, wanted, unit = len(getattr(tensor, field)), packed * each, "numbers"
    if others := [other for other in _TYPED_FIELDS if other != field and len(getattr(tensor, other))]:
        raise ImportRefusedError(f"{what} has numbers in {field} and in {others[0]}; save the model again")
    if found != wanted:
        raise ImportRefusedError(
            f"{what} has {found} {unit}; its dimensions {_dims(tensor.dims)} ask for {wanted}: the file is damaged or truncated"
        )


def check_name(name: str, what: str) -> None:
    if not isinstance(name, str):
        raise ImportRefusedError(f"the name of {what} is not UTF-8: {shown(name)}")
    if len(name) > NAME_MAX:
        raise ImportRefusedError(
            f"the name of {what} has {len(name)} characters; at most {NAME_MAX} are read: {shown(name)}"
        )
    if not name.isprintable():
        raise ImportRefusedError(f"the name of {what} has control characters: {shown(name)}")


def _dims(dims: Sequence[int]) -> str:
    return "x".join(map(str, dims)) or "()"
