"""Failed RPCs as EngramErrors: reads google.rpc.Status out of the trailing metadata. Used wherever an RPC is awaited.

The three messages (Status, ErrorInfo, RetryInfo) are read from the wire format itself, so that the SDK needs no further
package for a handful of fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import grpc
import grpc.aio

from engram._errors import EngramError, make_error

_STATUS_KEY = "grpc-status-details-bin"
_ERROR_INFO = "google.rpc.ErrorInfo"
_RETRY_INFO = "google.rpc.RetryInfo"


@dataclass
class Details:
    """What google.rpc details say of a failed call."""

    reason: str = ""
    retry_after: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def of_rpc_error(error: grpc.aio.AioRpcError) -> EngramError:
    """The error that a failed RPC stands for."""
    code, message = error.code(), error.details() or ""
    details = Details()
    for key, value in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key == _STATUS_KEY and isinstance(value, bytes):
            details = read_details(value)
    if code is grpc.StatusCode.CANCELLED and not details.reason:
        # Nobody here has cancelled it, for that would be a CancelledError: a server that stopped, or something on the way.
        code, message = grpc.StatusCode.UNAVAILABLE, f"the call was cancelled on its way ({message})"
    if code is grpc.StatusCode.UNAVAILABLE and not details.reason:
        details.reason = "CONNECTION_LOST"
    return make_error(int(code.value[0]), message, details.reason, details.retry_after, details.metadata)


def read_details(status: bytes) -> Details:
    """Reads a serialized google.rpc.Status. Bytes that are none give empty details: the code is known without them."""
    details = Details()
    try:
        for number, value in _fields(status):
            if number == 3 and isinstance(value, bytes):
                _read_any(value, details)
    except (IndexError, UnicodeDecodeError, ValueError):
        return Details()
    return details


def _read_any(data: bytes, details: Details) -> None:
    fields = dict(_fields(data))
    url, value = fields.get(1, b""), fields.get(2, b"")
    if not isinstance(url, bytes) or not isinstance(value, bytes):
        return
    name = url.decode().rpartition("/")[2]
    if name == _ERROR_INFO:
        for number, item in _fields(value):
            if number == 1 and isinstance(item, bytes):
                details.reason = item.decode()
            elif number == 3 and isinstance(item, bytes):
                entry = dict(_fields(item))
                details.metadata[_text(entry.get(1))] = _text(entry.get(2))
    elif name == _RETRY_INFO:
        for number, item in _fields(value):
            if number == 1 and isinstance(item, bytes):
                delay = dict(_fields(item))
                seconds, nanos = delay.get(1, 0), delay.get(2, 0)
                if isinstance(seconds, int) and isinstance(nanos, int):
                    details.retry_after = seconds + nanos / 1e9


def _text(value: int | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else ""


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a serialized message: (number, value). Raises IndexError or ValueError where it is cut or unknown."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise IndexError("the message is cut short")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
