"""Sessions expire when nobody has had them for their time, and only then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import engram

MODEL, TTL_S = "digits-reader", 2


@pytest.fixture
def brief(server_with: Callable[..., Any]) -> Iterator[Any]:
    """A server whose sessions live for two seconds."""
    with server_with("--session-ttl-s", str(TTL_S)) as server:
        yield server


def expired_keys(server: Any) -> float:
    value: float = server.series()["engram_redis_expired_keys"]
    return value


@pytest.mark.promise(7)
def test_a_session_expires_unless_somebody_holds_it(brief: Any) -> None:
    options = engram.ClientOptions(ttl_s=10 * TTL_S)
    with engram.Client(brief.address) as client, engram.Client(brief.address, options) as longer:
        store = brief.redis()
        x = np.zeros(client.models.get(MODEL).inputs[0].shape, np.float32)
        held, never_stepped, left = client.open_many(MODEL, ["held", "never-stepped", "left"])
        kept = longer.open(MODEL, "kept")
        for session in (held, left, kept):
            session.step(x)
        left.detach()
        kept.detach()
        before = expired_keys(brief)
        time.sleep(1.6 * TTL_S)
        assert [info.id for info in client.sessions.list()].count("left") == 0
        with pytest.raises(engram.NotFoundError):
            client.sessions.get("left")
        assert client.sessions.get("kept").seq == 1, "a session's own time counts"
        held.step(x)
        never_stepped.step(x)
        assert (held.seq, never_stepped.seq) == (2, 1), "idle for longer than its time, and still there"
        assert client.open(MODEL, "left").seq == 0, "who comes later starts anew"
        held.close()
        never_stepped.detach()
        client.sessions.close("left")
        time.sleep(1.3 * TTL_S + 0.6)
        assert {info.id for info in client.sessions.list()} == {"kept"}
        assert len(list(store.scan_iter("engram:{*}:*"))) == 1, "no record is left of those that expired"
        assert expired_keys(brief) > before
