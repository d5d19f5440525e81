"""A look at a protobuf message before it is parsed: depth, number of fields, and that every length fits. For reading.py.

A parser makes 150 bytes of two where a file has millions of empty nodes, and recurses as deep as a file says. This walk
allocates nothing and stops at its limits.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from engram_models.importing.errors import ImportRefusedError

FIELDS_MAX = 1_000_000
DEPTH_MAX = 60  # messages in messages: three for each graph in a graph
VARINT_BYTES_MAX = 1 << 26  # of packed numbers, which may take eight times as much memory

_BROKEN = "it is not an ONNX model, or it is truncated"
_NUMBERS = {
    FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_ENUM,
    FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_BOOL,
}  # fmt: skip
_MESSAGE = FieldDescriptor.TYPE_MESSAGE


def check_wire(data: bytes, descriptor: Descriptor) -> None:
    """Raises ImportRefusedError for what is no such message, or one that would take far more memory than its own size."""
    kinds: dict[str, dict[int, tuple[int, Descriptor | None]]] = {}
    open_messages: list[Iterator[tuple[int, int, int]]] = [_fields(data, 0, len(data))]
    schemas = [_schema(descriptor, kinds)]
    fields, numbers = 0, 0
    while open_messages:
        found = next(open_messages[-1], None)
        if found is None:
            open_messages.pop()
            schemas.pop()
            continue
        number, start, end = found
        fields += 1
        if fields > FIELDS_MAX:
            raise ImportRefusedError(
                f"it has more than {FIELDS_MAX} fields; save numbers as raw data and split the model"
            )
        if end < 0:
            continue
        kind, inner = schemas[-1].get(number, (0, None))
        if kind == _MESSAGE and inner is not None:
            if len(open_messages) >= DEPTH_MAX:
                raise ImportRefusedError(f"graphs or types in it are nested more than {DEPTH_MAX // 3} deep")
            open_messages.append(_fields(data, start, end))
            schemas.append(_schema(inner, kinds))
        elif kind in _NUMBERS:
            numbers += end - start
            if numbers > VARINT_BYTES_MAX:
                raise ImportRefusedError(
                    f"it has more than {VARINT_BYTES_MAX >> 20} MB of packed numbers; save them as raw data"
                )


def _schema(
    descriptor: Descriptor, kinds: dict[str, dict[int, tuple[int, Descriptor | None]]]
) -> dict[int, tuple[int, Descriptor | None]]:
    if descriptor.full_name not in kinds:
        kinds[descriptor.full_name] = {field.number: (field.type, field.message_type) for field in descriptor.fields}
    return kinds[descriptor.full_name]


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field's content; the end is -1 where it has a fixed size."""
    while at < end:
        key, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at, end)
        number, wire_type = key >> 3, key & 7
        if not number:
            raise ImportRefusedError(_BROKEN)
        if wire_type == 2:
            length, at = (data[at], at + 1) if at < end and data[at] < 128 else _varint(data, at, end)
            if length > end - at:
                raise ImportRefusedError(
                    f"{_BROKEN}: at byte {at}, {length} bytes are announced and {end - at} are left"
                )
            yield number, at, at + length
            at += length
            continue
        if wire_type == 0:
            _, at = _varint(data, at, end)
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        else:
            raise ImportRefusedError(_BROKEN)
        if at > end:
            raise ImportRefusedError(_BROKEN)
        yield number, at, -1


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ImportRefusedError(_BROKEN)
