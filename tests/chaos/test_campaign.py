"""The campaign in small, with real faults on real processes: `make chaos-quick`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from chaos.campaign import WORLDS, Campaign, Load
from chaos.fleet import World

QUICK = ("always", "emptied", "replicated", "cluster")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("chaos"), lambda text: print(text, flush=True))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", [world for world in WORLDS if world.name in QUICK], ids=lambda world: world.name)
def test_nothing_is_lost_and_nobody_sees_an_error(campaign: Campaign, world: World) -> None:
    outcome = campaign.run(world, secrets.randbelow(1_000_000), Load(seconds=12.0, clients=2, sessions=16))
    assert outcome.clean, f"seed {outcome.seed}: {outcome.report} {outcome.errors}"
    assert outcome.faults.total() >= 5 and outcome.report.acknowledged >= 1000
