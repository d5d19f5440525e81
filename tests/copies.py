"""Copies of what a Redis for tests has on its disk, to put back later: as an operator does, or a replica that was behind."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

from redises import until

_DATA = ("appendonly*", "dump.rdb")


def take(redis: Any, target: pathlib.Path) -> None:
    """Copies the data of a RedisProcess or of each node of a RedisCluster, while it runs."""
    for place, process in enumerate(_nodes(redis)):
        # While a slow disk is busy with an fsync, Redis keeps what it has answered for up to two seconds before it writes it.
        until(lambda process=process: not process.client.info("persistence").get("aof_buffer_length"))
        node = target / str(place)
        node.mkdir(parents=True)
        for pattern in _DATA:
            for path in process.directory.glob(pattern):
                shutil.copytree(path, node / path.name) if path.is_dir() else shutil.copy(path, node)


def put_back(redis: Any, source: pathlib.Path) -> None:
    """Kills it and starts it on the copy. A cluster keeps what it knows of its slots."""
    redis.kill()
    for place, process in enumerate(_nodes(redis)):
        for pattern in _DATA:
            for path in process.directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (source / str(place)).iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, process.directory / path.name)
    redis.start()


def _nodes(redis: Any) -> list[Any]:
    return list(getattr(redis, "processes", None) or [redis])
