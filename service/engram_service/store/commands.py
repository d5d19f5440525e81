"""Commands and scripts for keys of sessions, each asked of the node that has the key. Blocking and thread-safe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis

from engram_service.store.generations import Generations
from engram_service.store.nodes import Add, Nodes, Wait, open_nodes, pipelined
from engram_service.store.reading import damaged
from engram_service.store.scripts import Script
from engram_service.store.types import LOST, UNACKNOWLEDGED, DamagedError, StoreSettings, StoreUnavailableError

T = TypeVar("T")

_TIMEOUT_S = 5.0
_RUN = re.compile(rb"run_id:(\w{1,12})")  # enough to tell runs apart; it stands in each session's hash


class Commands:
    """The nodes of one Redis, and what is asked of them. Raises RedisError where it is not said otherwise."""

    def __init__(self, settings: StoreSettings, generations: Generations) -> None:
        self._settings = settings
        self._generations = generations
        self.nodes = open_nodes(settings.url, _TIMEOUT_S, settings.tls, self._greet)

    def call(self, work: Callable[[], T]) -> T:
        """Raises StoreUnavailableError, and DataLossError where a session is damaged."""
        try:
            return work()
        except DamagedError as error:
            raise damaged(error) from error
        except (redis.exceptions.RedisError, OSError) as error:
            some = self.nodes.in_slots or isinstance(error, redis.exceptions.ResponseError)
            raise StoreUnavailableError(why(error), everybodys=not some) from error

    def tokens(self, keys: Sequence[bytes]) -> list[bytes | DamagedError | None]:
        """The tokens in sessions' hashes."""
        return self.pipelined(keys, lambda pipe, at: pipe.hget(keys[at], "t"), each=True)

    def in_run(
        self, script: Script, keys: Sequence[bytes], args: Sequence[Sequence[Any]], more: Sequence[bytes] = (), each: bool = False
    ) -> list[Any]:  # fmt: skip
        """Runs a script that claims, and is told in which run of Redis it does. Raises ConnectionError where Redis was started
        meanwhile: to be asked again."""

        def runs() -> list[str]:
            names = [""] * len(keys)
            for node, rows in self.nodes.of_keys(keys) if keys else []:
                for at in rows.tolist():
                    names[at] = self._generations.run(node.name)
            return names

        for _ in range(2):  # before the first connection its run is not known
            now = runs()
            told = [[*some, run, *more] for some, run in zip(args, now, strict=True)]
            answers = self.scripted(script, keys, told, self._settings.wait, each)
            if runs() == now:
                return answers
        raise redis.exceptions.ConnectionError("Redis was started again meanwhile")

    def scripted(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Sequence[Any]],
        wait: Wait = None,
        each: bool = False,
    ) -> list[Any]:
        """Runs a script for each of these hashes; see scripts.py for why a cluster is told the other keys too."""
        named = [[key] for key in keys]
        if self.nodes.in_slots:
            held = self.pipelined(keys, lambda pipe, at: pipe.hmget(keys[at], "t", "g"), each=True)
            pairs = [(None, None) if isinstance(pair, DamagedError) else pair for pair in held]
            named = [
                [key, key + b":" + (token or b""), *([key + b":m"] if revision else [])]
                for key, (token, revision) in zip(keys, pairs, strict=True)
            ]
        return self.pipelined(keys, lambda pipe, at: script(named[at], args[at], pipe), wait, counted=True, each=each)

    def pipelined(
        self, keys: Sequence[bytes], add: Add, wait: Wait = None, nodes: Nodes | None = None, counted: bool = False,
        each: bool = False,
    ) -> list[Any]:  # fmt: skip
        """`add(pipe, at)` for each key, on the node that has it; with `wait`, as safe as a commit when this returns."""
        nodes = nodes or self.nodes
        generations = self._generations if counted else None
        try:
            return pipelined(nodes, keys, add, wait, self._settings.waited, generations, each)
        except (
            redis.exceptions.MovedError,
            redis.exceptions.ClusterDownError,
            redis.exceptions.ConnectionError,
        ) as error:
            if not nodes.in_slots or str(error) in (LOST, UNACKNOWLEDGED):  # which a new map does not mend
                raise
            nodes.refresh()
            return pipelined(nodes, keys, add, wait, self._settings.waited, generations, each)  # all may be asked twice

    def losses_of(self, keys: Sequence[bytes]) -> list[tuple[str, int]]:
        """For each key its node, and the last loss of that."""
        last: dict[str, int] = {}
        told = self._generations.lost_at()
        counters = list(told)
        for node, rows in self.nodes.of_keys(counters):
            last[node.name] = max((told[counters[at]] for at in rows.tolist()), default=0)
        found = [("", 0)] * len(keys)
        for node, rows in self.nodes.of_keys(keys):
            for at in rows.tolist():
                found[at] = (node.name, last.get(node.name, 0))
        return found

    def _greet(self, connection: Any, node: str) -> None:
        """A connection reaches one life of a Redis: what is asked on it cannot meet one that has lost data and that nobody
        knows of yet. A claim would begin sessions anew there, and a look at their hashes find them closed."""
        marks = self._generations.marks()
        connection.send_command("INFO", "server")
        for mark in marks:
            connection.send_command("GET", mark.key)
        answers = [_answer(connection) for _ in range(1 + len(marks))]
        run = _RUN.search(answers[0] if isinstance(answers[0], bytes) else b"")
        self._generations.met(node, run[1].decode() if run else "")
        for mark, found in zip(marks, answers[1:], strict=True):
            # An error: another node of the cluster has it.
            if not isinstance(found, redis.exceptions.ResponseError) and int(found or 0) < mark.seen:
                raise redis.exceptions.ConnectionError(LOST)


def why(error: BaseException) -> str:
    """What is said of an error."""
    return str(error) or type(error).__name__


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.exceptions.ResponseError as error:
        return error
