"""Commits as the event loop sends them: what is not taken at once goes on as the descriptor says, and the loop is not held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from engram_service.steps.commits import IN_LINE_S, Commits
from engram_service.store import RecordLayout, Store, Verdict

pytest.importorskip("engram_native", reason="the extension is not built: make install builds it where cargo is")

MEGABYTE = 1 << 20
WAIT_S = 15.0


@pytest.mark.parametrize("over", ["unix", "tls"])
@pytest.mark.parametrize(("rows", "nbytes"), [(1, 8 * MEGABYTE), (4, 2 * MEGABYTE)])
def test_records_larger_than_any_buffer_are_sent_in_several_rounds(
    open_store: Callable[..., Store], redis_process: Any, reached: Callable[..., str], holder: Callable[..., Any], over: str, rows: int,
    nbytes: int,
) -> None:  # fmt: skip
    """A record that is not sent whole is answered by nothing: the line must hear that there is room for more of it."""
    store = open_store(reached(over, redis_process.socket))
    layout = RecordLayout("0123456789abcdef" * 2, nbytes, 12)
    owner = holder(store, *(f"s{n}" for n in range(rows)), layout=layout).claim()
    left: list[Any] = []

    async def main() -> None:
        nothing: Any = None
        commits = Commits(store, nothing, nothing, nothing)
        commits.open()
        commit, job = owner.begun(1)
        store._committers.go_on = left.append  # type: ignore[method-assign]
        redis_process.pause()
        begun = time.monotonic()
        line = commits._free.pop()
        line.send(job)
        commits._finish(line) if line.ready(IN_LINE_S) else commits._park(line)
        held = time.monotonic() - begun
        redis_process.go_on()
        deadline = time.monotonic() + WAIT_S
        while not commit.settled and not left and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert commit.verdicts == [Verdict.OK] * rows and not left
        assert held < 0.5
        assert not commits.full

    asyncio.run(main())
    assert owner.stored() == [1] * rows
