"""Where keys live: one Redis, or the primaries of a Redis Cluster. Asked by the store and the committers, from any thread.

The map of a cluster's slots is redis-py's; here it is kept as an array, so that a batch is split with numpy.
"""

from __future__ import annotations

import binascii
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from engram_service.store import scripts
from engram_service.store.generations import Generations
from engram_service.store.keys import GENERATION, META_PREFIX
from engram_service.store.types import LOST, UNACKNOWLEDGED, DamagedError, StoreError, TlsFiles

_CLUSTER = "+cluster"
_DAMAGED = "DAMAGED"  # as the scripts say it
_DAMAGES = (_DAMAGED, "WRONGTYPE")
_OTHER_TYPE = "something of another type is under its key in Redis"
_SLOTS = 16384
_CRC16 = np.array([binascii.crc_hqx(bytes([byte]), 0) for byte in range(256)], np.uint16)

Add = Callable[[Any, int], object]
Greet = Callable[[Any, str], object]  # a new connection, and the node that it reaches
Wait = tuple[str | int, ...] | None
Split = list[tuple["Node", NDArray[np.intp]]]  # nodes, and the rows that are theirs


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    client: redis.Redis


class Nodes:
    """One Redis, which has everything."""

    in_slots = False

    def __init__(self, url: str, timeout_s: float, tls: TlsFiles, greet: Greet | None) -> None:
        # The retry is for a connection that was closed while it lay idle; redis-py's own retries back off for seconds.
        retry = Retry(NoBackoff(), 1, (redis.exceptions.ConnectionError,))
        options = _options(url, timeout_s, tls)
        if greet is not None:
            options["redis_connect_func"] = lambda connection: (connection.on_connect(), greet(connection, ""))
        self._node = Node("", redis.Redis.from_url(url, retry=retry, **options))

    def all(self) -> list[Node]:
        return [self._node]

    def of_tags(self, tags: NDArray[np.uint8]) -> Split:
        """Rows of sessions by the node that has them. Raises RedisError."""
        return [(self._node, np.arange(len(tags)))]

    def of_keys(self, keys: Sequence[bytes]) -> Split:
        """The same for keys."""
        return [(self._node, np.arange(len(keys)))]

    def generation_key(self, node: Node) -> bytes:
        """A name for counters that live on this node. Raises RedisError."""
        return GENERATION

    def named(self, address: str) -> Node:
        """The node that an ASK names."""
        raise redis.exceptions.ConnectionError("this Redis is one of a cluster; give a redis+cluster:// URL")

    def refresh(self) -> None:
        """Asks the cluster anew who has what. Raises RedisError."""

    def close(self) -> None:
        self._node.client.close()


@dataclass(frozen=True, slots=True)
class _Map:
    nodes: list[Node]
    owner: NDArray[np.int16]  # by slot: place in nodes; -1: nobody
    places: dict[str, int]  # by node's name, those with slots


class ClusterNodes(Nodes):
    """The primaries of a Redis Cluster. It is reached at the first question, and may be away then."""

    in_slots = True

    def __init__(self, url: str, timeout_s: float, tls: TlsFiles, greet: Greet | None) -> None:
        parts = urlsplit(url)
        credentials, at, hosts = parts.netloc.rpartition("@")
        first, *others = hosts.split(",")
        scheme = parts.scheme.removesuffix(_CLUSTER)
        self._url = urlunsplit(parts._replace(scheme=scheme, netloc=credentials + at + first))
        self._others = [urlsplit(f"//{host}") for host in others]
        redis.Redis.from_url(self._url)  # raises ValueError
        self._options = _options(url, timeout_s, tls)
        if greet is not None:
            self._options["redis_connect_func"] = lambda connection: greet(
                connection, f"{connection.host}:{connection.port}"
            )
        self._cluster: RedisCluster | None = None
        self._map: _Map | None = None
        self._asked: dict[str, Node] = {}  # nodes that have no slots yet
        self._generation_keys: dict[str, tuple[int, bytes]] = {}  # by node's name: a slot of its, and the key
        self._lock = threading.RLock()

    def all(self) -> list[Node]:
        return self._known().nodes

    def of_tags(self, tags: NDArray[np.uint8]) -> Split:
        return self._split(tag_slots(tags))

    def of_keys(self, keys: Sequence[bytes]) -> Split:
        return self._split(np.fromiter((slot(key) for key in keys), np.intp, len(keys)))

    def generation_key(self, node: Node) -> bytes:
        known = self._known()
        place = known.places.get(node.name)
        if place is None:
            raise redis.exceptions.ClusterDownError(f"CLUSTERDOWN {node.name} has no slots")
        at, key = self._generation_keys.get(node.name, (-1, b""))
        if at < 0 or known.owner[at] != place:
            own = np.flatnonzero(known.owner == place)
            at = int(own[len(own) // 2])  # slots mostly leave from the ends
            key = _generation_key(at)
            self._generation_keys[node.name] = at, key
        return key

    def named(self, address: str) -> Node:
        found = next((node for node in self._known().nodes if node.name == address), self._asked.get(address))
        if found is None:
            host, _, port = address.rpartition(":")
            assert self._cluster is not None
            manager: Any = self._cluster.nodes_manager
            found = Node(address, manager.create_redis_node(host, int(port), **manager.connection_kwargs))
            self._asked[address] = found
        return found

    def refresh(self) -> None:
        with self._lock:
            try:
                if self._cluster is None:
                    node: Any = ClusterNode
                    startup = [node(at.hostname, at.port or 6379) for at in self._others]
                    self._cluster = RedisCluster(
                        url=self._url, startup_nodes=startup, require_full_coverage=False, retry=Retry(NoBackoff(), 0),
                        dynamic_startup_nodes=False, **self._options,
                    )  # fmt: skip
                else:
                    self._cluster.nodes_manager.initialize()
            except redis.exceptions.RedisClusterException as error:  # which is no RedisError
                if isinstance(error.__cause__, redis.exceptions.AuthenticationError):
                    raise error.__cause__ from None
                raise redis.exceptions.ConnectionError(str(error)) from error
            self._map = _mapped(self._cluster)

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
        for node in self._asked.values():
            node.client.close()

    def _known(self) -> _Map:
        if self._map is None:
            self.refresh()
        assert self._map is not None
        return self._map

    def _split(self, slots: NDArray[np.intp]) -> Split:
        known = self._known()
        owners = known.owner[slots]
        if (owners < 0).any():
            self._map = None
            raise redis.exceptions.ClusterDownError(f"CLUSTERDOWN nobody has slot {slots[owners < 0][0]}")
        return [(known.nodes[place], np.flatnonzero(owners == place)) for place in np.unique(owners).tolist()]


def open_nodes(url: str, timeout_s: float, tls: TlsFiles, greet: Greet | None = None) -> Nodes:
    """`greet` is called with each new connection. Raises StoreError."""
    try:
        if urlsplit(url).scheme.endswith(_CLUSTER):
            return ClusterNodes(url, timeout_s, tls, greet)
        return Nodes(url, timeout_s, tls, greet)
    except ValueError as error:
        # What redis-py says may quote a part of the URL, and a password that is not escaped ends up in any part.
        why = "write special characters of user and password as %XX" if "@" in url else str(error)
        raise StoreError(f"redis_url cannot be used: {why}") from None


def pipelined(
    nodes: Nodes, keys: Sequence[bytes], add: Add, wait: Wait = None, waited: Callable[[Any], bool] = bool,
    generations: Generations | None = None, each: bool = False,
) -> list[Any]:  # fmt: skip
    """What `add(pipe, at)` asks for each key, of the node that has it. Raises RedisError; then some of it may have been done.

    With `generations` it is a change, and counted. Where what is under a key is not what should be there, its answer is a Damaged
    if `each`, else the Damaged is raised.
    """
    results: list[Any] = [None] * len(keys)
    for node, rows in nodes.of_keys(keys) if keys else []:
        left = rows.tolist()
        for _ in range(2):
            replies = _asked(nodes, node, left, add, wait, waited, generations, each)
            for at, reply in zip(left, replies, strict=True):
                results[at] = reply
            if not (left := [at for at in left if isinstance(results[at], redis.exceptions.NoScriptError)]):
                break
            load_scripts(node)  # those alone are asked again that were not asked
        if left:
            raise results[left[0]]
    return results


def _asked(
    nodes: Nodes, node: Node, rows: Sequence[int], add: Add, wait: Wait, waited: Callable[[Any], bool],
    generations: Generations | None, each: bool,
) -> list[Any]:  # fmt: skip
    """What `add(pipe, at)` asks for these rows, all of one node: the answers, or NoScriptErrors instead. Raises RedisError."""
    pipe: Any = node.client.pipeline(transaction=False)
    for at in rows:
        add(pipe, at)
    mark = None if generations is None else generations.mark(generations.key(nodes.generation_key(node)))
    if mark is not None:
        pipe.incr(mark.key)
    if wait is not None:
        pipe.execute_command(*wait)
    replies = pipe.execute(raise_on_error=False)
    results = []
    for at, reply in zip(rows, replies, strict=False):
        answer = _asked_there(nodes, reply, at, add) if isinstance(reply, redis.exceptions.AskError) else reply
        results.append(damage(answer) or answer)
    count = replies[len(rows)] if mark is not None else None
    if generations is not None and mark is not None and isinstance(count, int) and generations.counted(mark, count):
        raise redis.exceptions.ConnectionError(LOST)
    failed = [
        reply
        for reply in results
        if isinstance(reply, Exception)
        and not isinstance(reply, redis.exceptions.NoScriptError)
        and not (each and isinstance(reply, DamagedError))
    ]
    failed += [reply for reply in replies[len(rows) + (mark is not None) :] if isinstance(reply, Exception)]
    if failed:
        raise failed[0]
    if wait is not None and not waited(replies[-1]):
        raise redis.exceptions.ConnectionError(UNACKNOWLEDGED)
    return results


def load_scripts(node: Node) -> None:
    """Has this node know all scripts: it was started, or told to forget them. Raises RedisError."""
    pipe: Any = node.client.pipeline(transaction=False)
    for text in scripts.ALL:
        pipe.script_load(text)
    pipe.execute()


def damage(reply: Any) -> DamagedError | None:
    """What an error says of the key that was asked for, if it is about that key alone and not about Redis."""
    if isinstance(reply, redis.exceptions.ResponseError) and any(word in str(reply) for word in _DAMAGES):
        text = str(reply)
        return DamagedError(text[text.index(_DAMAGED) + len(_DAMAGED) :].strip() if _DAMAGED in text else _OTHER_TYPE)
    return None


def _asked_there(nodes: Nodes, error: redis.exceptions.AskError, at: int, add: Add) -> Any:
    """The answer to one question about a slot that is just moving, from where its key is by now."""
    if isinstance(error, redis.exceptions.MovedError):
        return error
    node = nodes.named(f"{error.host}:{error.port}")
    for _ in range(2):
        pipe: Any = node.client.pipeline(transaction=False)
        pipe.execute_command("ASKING")
        add(pipe, at)
        if not isinstance(answer := pipe.execute(raise_on_error=False)[-1], redis.exceptions.NoScriptError):
            break
        load_scripts(node)
    return answer


def redirected(why: str) -> bool:
    """Whether this error says that the map of the cluster is old."""
    return why.startswith(("MOVED", "CLUSTERDOWN", "READONLY"))


def slot(key: bytes) -> int:
    """The cluster's slot of a key with a hash tag."""
    return binascii.crc_hqx(key[key.index(b"{") + 1 : key.index(b"}")], 0) % _SLOTS


def tag_slots(tags: NDArray[np.uint8]) -> NDArray[np.intp]:
    """The slots of sessions, from tags uint8 [n, 22]."""
    crc = np.zeros(len(tags), np.uint16)
    for column in tags.T:
        crc = (crc << np.uint16(8)) ^ _CRC16[(crc >> np.uint16(8)) ^ column]
    return (crc % _SLOTS).astype(np.intp)


def _mapped(cluster: RedisCluster) -> _Map:
    manager: Any = cluster.nodes_manager
    slots = dict(manager.slots_cache)
    primaries = {at: nodes[0] for at, nodes in slots.items()}
    found = {node.name: node for node in primaries.values()}
    places = {name: place for place, name in enumerate(sorted(found))}
    owner = np.full(_SLOTS, -1, np.int16)
    for at, node in primaries.items():
        owner[at] = places[node.name]
    return _Map([Node(name, cluster.get_redis_connection(found[name])) for name in places], owner, places)


def _generation_key(wanted: int) -> bytes:
    """engram:generation:{N} in this slot."""
    number = next(n for n in range(1 << 30) if binascii.crc_hqx(b"%d" % n, 0) % _SLOTS == wanted)
    return GENERATION + b":{%d}" % number


def _options(url: str, timeout_s: float, tls: TlsFiles) -> dict[str, Any]:
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": 2}
    if urlsplit(url).scheme.startswith("rediss"):
        files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
        options.update({name: path for name, path in files.items() if path})
    return options


assert META_PREFIX.endswith(b"{")  # a tag alone decides about the slot
