"""Hostile bytes that a fuzzer or a reader found: forged exports, and what one session could do to the listing of all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram.v1 import memory_pb2, session_pb2
from engram_models import TensorSpec
from engram_service.errors import InvalidArgumentError
from engram_service.protocols.engram.exported import Exported, exported, imported
from engram_service.protocols.engram.unary import place_of
from engram_service.runtimes.arena import from_bytes

Raw = Any


@pytest.fixture
def raw(shared_server: Any, connect: Callable[[Any], Raw]) -> Raw:
    return connect(shared_server)


def sealed(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=16).digest()


@pytest.mark.promise(6)
def test_a_forged_export_is_refused() -> None:
    """Lengths that point beyond the end, bytes that nobody asked for, names that are no text: with the right digest."""
    body = exported(Exported("cam", "m", "1", b"record", [b"chunk"]))[:-16]
    count = 8 + 2 * 3 + 4
    for forged in (
        body[:count] + b"\xff\xff\xff\xff" + body[count + 4 :],
        body[:count] + b"\0\0\0\0" + body[count + 4 :],
        body[:8] + b"\xff\xff" + body[10:],
        body + b"more",
        body.replace(b"cam", b"c\xff\xfe"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            imported(sealed(forged))
        assert caught.value.reason == "INVALID_EXPORT"
    assert imported(sealed(body)).memory == [b"chunk"]


@pytest.mark.parametrize("token", ["\N{SUPERSCRIPT TWO}", "9" * 5000, "9" * 23, str(2**76), "-1", "1_0"])
def test_page_tokens_that_no_server_gave(token: str) -> None:
    with pytest.raises(InvalidArgumentError):
        place_of(token)


def test_a_place_beyond_every_page_is_empty(raw: Raw) -> None:
    request = session_pb2.ListSessionsRequest(page_token="9" * 22)
    found = raw.unary("ListSessions", request, session_pb2.ListSessionsResponse)
    assert not found.sessions and not found.next_page_token


def test_no_rows_of_bytes_are_a_tensor_too() -> None:
    """A record without outputs, of a model that runs on its own: what fills the arena's last outputs has no rows."""
    assert from_bytes(np.zeros((0, 16), np.uint8), TensorSpec("y", "float32", (4,))).shape == (0, 4)


@pytest.mark.promise(6)
def test_a_lifetime_beyond_the_calendar_is_refused_and_spoils_no_listing(raw: Raw) -> None:
    for ttl_ms in (2**64 - 1, 2**62, 10**17):
        begun = time.monotonic()
        response = raw.open(f"for-ever-{ttl_ms}", ttl_ms=ttl_ms)
        assert [row.error.reason for row in response.errors] == ["INVALID_ARGUMENT"]
        assert time.monotonic() - begun < 5
    raw.unary("ListSessions", session_pb2.ListSessionsRequest(page_size=1000), session_pb2.ListSessionsResponse)
    assert not raw.open(f"a-century-{time.time()}", ttl_ms=100 * 365 * 86_400_000).errors


def test_a_huge_page_of_patterns_is_empty(raw: Raw) -> None:
    name = f"letters-{time.time()}"
    assert not raw.open(name, model="letters-hopfield").errors
    request = memory_pb2.ListPatternsRequest(session_id=name, page_token="9" * 22)
    found = raw.unary("ListPatterns", request, memory_pb2.ListPatternsResponse)
    assert not found.labels and found.count == 26
