"""Several servers behind one name: failover, and the way back to the server that still holds the sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

import engram

MODEL = "digits-reader"
QUICK = {"backoff_initial_s": 0.02, "backoff_max_s": 0.2}


@pytest.fixture
def pair(tmp_path, redis_process, server_type, digits_alone) -> Iterator[list]:
    """Two servers on one Redis, each of which says where it is."""
    servers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        server = server_type(tmp_path / name, "--redis-url", redis_process.url, *digits_alone)
        server.flags += ("--advertise", server.address)
        servers.append(server)
    with servers[0], servers[1]:
        yield servers


def name_of(servers) -> str:
    """What a name with an address for each server resolves to; the first one that answers is taken."""
    return "ipv4:" + ",".join(server.address for server in servers)


async def lose(client: engram.AsyncClient) -> None:
    """The connection is cut under the client."""
    link = client._link
    assert link is not None
    assert link._channel is not None
    await link._channel.close()


@pytest.mark.parametrize("durability", ["step", "interval"])
def test_a_name_with_two_servers_survives_either(pair, durability: str) -> None:
    one, two = pair
    X = np.random.default_rng(1).random((2000, 8), np.float32)

    async def main() -> None:
        async with engram.AsyncClient(name_of(pair), engram.ClientOptions(**QUICK)) as client:
            assert (await client.server()).address == one.address
            sessions = await client.open_many(MODEL, 8, durability=durability)
            runs = [asyncio.create_task(session.run(X)) for session in sessions]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(one.kill)
            while (await client.server()).address != two.address:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(one.start)
            await asyncio.to_thread(two.stop)  # drains: its clients are sent away
            results = await asyncio.gather(*runs)
            reference = await (await client.open(MODEL)).run(X)
            assert all((reference == Y).all() for Y in results)
            assert (await client.server()).address == one.address

    asyncio.run(asyncio.wait_for(main(), 100))


@pytest.mark.parametrize("follow", [True, False])
def test_a_client_goes_back_to_the_server_that_has_its_sessions(pair, follow: bool) -> None:
    one, two = pair
    one.kill()

    async def main() -> None:
        async with engram.AsyncClient(name_of(pair), engram.ClientOptions(follow=follow, **QUICK)) as client:
            session = await client.open(MODEL)
            await asyncio.to_thread(one.start)
            for _ in range(3):
                await session.step(np.zeros(8))
                await lose(client)
            await session.step(np.zeros(8))
            assert (await client.server()).address == (two.address if follow else one.address)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_advertised_address_that_nobody_reaches_is_passed_over(pair) -> None:
    one, two = pair
    two.stop()
    one.kill()
    one.flags += ("--advertise", two.address)
    one.start()

    async def main() -> None:
        async with engram.AsyncClient(one.address, engram.ClientOptions(**QUICK)) as client:
            session = await client.open(MODEL)
            await session.step(np.zeros(8))
            assert (await client.server()).address == two.address
            await lose(client)
            await session.step(np.zeros(8))
            assert session.seq == 2

    asyncio.run(asyncio.wait_for(main(), 60))
