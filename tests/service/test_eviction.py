"""A full arena: who leaves it, as a pure decision, and more sessions than slots through a real server."""

from __future__ import annotations

import asyncio
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engram
from engram_service.bench.workload import W, write_w
from engram_service.sessions.eviction import GRACE_S, TURN_S, leaving

SLOTS, SESSIONS, STEPS = 8, 32, 12
NOW = 100.0

times = st.one_of(
    st.floats(0, NOW), st.sampled_from([NOW, NOW - GRACE_S, NOW - TURN_S, NOW - GRACE_S / 2, NOW - TURN_S / 2])
)
residents = st.lists(st.tuples(times, times, st.booleans()), max_size=20)


@given(residents, st.integers(0, 25))
def test_who_leaves(found: list[tuple[float, float, bool]], count: int) -> None:
    used = np.array([one[0] for one in found])
    since = np.array([one[1] for one in found])
    still = np.array([one[2] for one in found], np.bool_)
    gone = leaving(used, since, still, NOW, count)
    may_go = [at for at in range(len(found)) if still[at] and (used[at] <= NOW - GRACE_S or since[at] <= NOW - TURN_S)]
    assert set(gone) <= set(may_go), "nobody with rows under way, nobody who has just come and just stepped"
    assert len(gone) == min(count, len(may_go)), "and as many as are needed, where they are to be had"
    left = set(may_go) - set(gone)
    assert not gone.size or not left or max(used[gone]) <= min(used[at] for at in left), "the longest unused first"


@pytest.mark.promise(7)
@given(st.integers(2, 6), st.integers(0, 20), st.integers(0, 2**32))
def test_everybody_gets_a_slot_however_busy_the_others_are(slots: int, more: int, seed: int) -> None:
    """All sessions want to step all the time. A model of the arena in small: who waits is served in turn."""
    rng, step_s = random.Random(seed), GRACE_S / 4
    waiting = list(range(slots, slots + more))
    inside = dict.fromkeys(range(slots), 0.0)  # since when
    used = dict.fromkeys(inside, 0.0)
    steps = dict.fromkeys(range(slots + more), 0)
    now, brought = 0.0, 0
    for _ in range(4 * int(TURN_S / step_s) * (1 + more // slots)):
        now += step_s
        under_way = {who for who in inside if rng.random() < 0.5}
        for who in inside.keys() - under_way:  # answered
            used[who], steps[who] = now, steps[who] + 1
        names = list(inside)
        columns = (np.array([used[who] for who in names]), np.array([inside[who] for who in names]))
        still = np.array([who not in under_way for who in names])
        for at in leaving(*columns, still, now, len(waiting)).tolist():
            waiting.append(names[at])
            del inside[names[at]]
            inside[waiting[0]], used[waiting[0]] = now, now
            waiting.pop(0)
            brought += 1
    assert min(steps.values()) > 0
    assert brought <= slots * (now / GRACE_S), "a slot changes hands no more often than it may"


@pytest.mark.promise(7)
def test_more_sessions_than_slots_all_go_on_with_the_same_bits(
    server_with: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    write_w(tmp_path / "models")
    x = np.random.default_rng(3).standard_normal((STEPS, SESSIONS, 64)).astype(np.float32)
    with server_with("--models", str(tmp_path / "models"), "--arena-slots-max", str(SLOTS)) as server:
        crowded, together, alone = asyncio.run(_outputs(server, x))
        series = server.series()
    np.testing.assert_array_equal(crowded, together)
    np.testing.assert_array_equal(crowded[:, :SLOTS], alone)
    loaded = series[f'engram_records_loaded_total{{model="{W}"}}']
    assert loaded >= SESSIONS - SLOTS, "the arena was full, and they took turns"


async def _outputs(server: Any, x: Any) -> tuple[Any, Any, Any]:
    """Every session in a loop of its own; all of them in one frame a step; and as many as there are slots."""
    async with engram.AsyncClient(server.address) as client:
        sessions = await client.open_many(W, [f"crowd-{number}" for number in range(SESSIONS)])

        async def loop(at: int) -> Any:
            return np.stack([await sessions[at].step(row[at]) for row in x])

        crowded = np.stack(await asyncio.gather(*(loop(at) for at in range(SESSIONS))), 1)
        twins = await client.open_many(W, [f"together-{number}" for number in range(SESSIONS)])
        together = np.stack([await client.step_many(twins, row) for row in x])
        await client.detach_many([*sessions, *twins])
        few = await client.open_many(W, [f"alone-{number}" for number in range(SLOTS)])
        alone = np.stack([await client.step_many(few, row[:SLOTS]) for row in x])
        return crowded, together, alone
