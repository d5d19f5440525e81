"""The store: claims, loads and management calls on Redis. Blocking and thread-safe; commits go through Committers.

A watcher thread looks after Redis every half second: is it there, has it lost its data, how much memory does it use.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import redis
from numpy.typing import NDArray
from redis.commands.core import Script

from engram_service.store import scripts
from engram_service.store.committer import Committers, Sent
from engram_service.store.keys import META_PREFIX, memory_key, meta_key, record_key, session_tag
from engram_service.store.memories import MemoryLogs, revision_of
from engram_service.store.nodes import Add, Nodes, Wait, open_nodes, pipelined
from engram_service.store.record import read_headers
from engram_service.store.tally import Tally
from engram_service.store.types import (
    UNACKNOWLEDGED,
    ClaimRequest,
    ClaimResult,
    ClaimStatus,
    CommitJob,
    SessionInfo,
    StoreError,
    StoreSettings,
    StoreUnavailable,
    Verdict,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
Wanted = Callable[[str, str], bool]  # by session id and model

_CALL_TIMEOUT_S = 5.0
_WATCH_S = 0.5
_WATCH_TIMEOUT_S = 1.0
_PAGE_S = 0.5
_DESCRIBED_AT_ONCE = 250
_CURSORS = 2**64
_NODES_MAX = 4096  # of a cluster; a page's cursor is a node's cursor and its place
_LOST = "Redis has lost its data; living sessions are being written back"
_NO_CLUSTER = "Cluster mode is not enabled"  # as redis-py says it
_THERE_BUT_REFUSES = ("OOM", UNACKNOWLEDGED)  # trouble of commits that a Redis which answers may still have


class Store:
    """One Redis. `on_trouble(why)` is called from other threads when it stops and when it starts (empty) taking writes,
    `on_loss()` when it has lost its data; while `writing_back()`, nobody claims."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self.losses = 0  # how often Redis was found to have lost its data
        self.used_memory_bytes = 0
        self.expired_keys = 0
        self.on_trouble: Callable[[str], None] = lambda why: None
        self.on_loss: Callable[[], None] = lambda: None
        self.writing_back: Callable[[], bool] = lambda: False
        self._generations: dict[bytes, bytes] = {}  # by key
        self._lost_at: dict[bytes, int] = {}  # by generation key: the last loss that it told, in `losses`
        self._trouble = {"commit": "", "watch": ""}
        self._lock = threading.Lock()
        self._nodes = open_nodes(settings.url, _CALL_TIMEOUT_S, settings.tls, self._greet)
        self._watched = open_nodes(settings.url, _WATCH_TIMEOUT_S, settings.tls)
        self._claim, self._restore, self._delete, self._create, self._rewrite = (
            Script(redis.Redis(), text)  # which always runs on a pipeline to the node that has the session
            for text in (scripts.CLAIM, scripts.RESTORE, scripts.DELETE, scripts.CREATE, scripts.REWRITE)
        )
        self.memories = MemoryLogs(
            lambda text: Script(redis.Redis(), text),
            lambda script, keys, args, durable: self._call(
                lambda: self._scripted(script, keys, args, settings.wait if durable else None)
            ),
            lambda keys, add: self._call(lambda: self._pipelined(keys, add)),
        )
        self.tally = Tally(
            lambda text: Script(redis.Redis(), text), lambda keys, add: self._call(lambda: self._pipelined(keys, add))
        )
        self._committers = Committers(self._nodes, settings, self._diagnose_job, lambda why: self._note("commit", why))
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="store-watch", daemon=True)

    def start(self) -> None:
        """Checks that Redis can do what is asked of it, if it is there; begins to watch it. Raises StoreError."""
        try:
            for node in self._watched.all():
                self._check_server(node.client.info("server"))
            self._check_generation()
        except redis.exceptions.AuthenticationError as error:
            raise StoreError(f"Redis refuses the credentials in redis_url: {error}") from error
        except (redis.exceptions.RedisError, OSError) as error:
            if _NO_CLUSTER in str(error):
                raise StoreError(f"redis_url cannot be used: {_NO_CLUSTER}; give a redis:// URL") from error
            self._note("watch", _why(error))
        self._watcher.start()

    def _check_server(self, info: dict[str, Any]) -> None:
        version = str(info.get("redis_version", "0"))
        if self.settings.ack == "disk" and tuple(int(part) for part in version.split(".")[:2]) < (7, 2):
            raise StoreError(
                f"redis_ack = disk needs WAITAOF (Redis 7.2 or newer, this is {version}); give this Redis appendfsync "
                "always, and set redis_ack = memory"
            )
        if "cluster" in (info.get("redis_mode"), info.get("server_mode")) and not self._nodes.in_slots:
            raise StoreError("redis_url names a node of a Redis Cluster; give a redis+cluster:// URL")

    def close(self) -> None:
        self._closed.set()
        self._committers.close()
        self._nodes.close()
        if self._watcher.is_alive():
            self._watcher.join(_WATCH_TIMEOUT_S)  # it may be reading from what is closed next
        self._watched.close()

    # The path of a step

    def submit(self, job: CommitJob) -> None:
        """Hands a commit to the committer threads; never blocks."""
        self._committers.submit(job)

    def begin(self, job: CommitJob) -> Sent:
        """Sends a commit from the calling thread, which says `finish` before its next one. Never fails."""
        return self._committers.begin(job)

    def finish(self, sent: Sent) -> None:
        """Waits for Redis's word on a commit; the committer threads go on with what it had none on."""
        self._committers.finish(sent)

    def load(self, tags: NDArray[np.uint8], tokens: NDArray[np.uint8]) -> list[bytes | None]:
        """Records under these claims; None where there is none."""
        keys = [record_key(tag.tobytes(), token.tobytes()) for tag, token in zip(tags, tokens, strict=True)]
        return self._call(lambda: self._pipelined(keys, lambda pipe, at: pipe.get(keys[at])))

    def diagnose(self, tags: NDArray[np.uint8], tokens: NDArray[np.uint8]) -> list[Verdict]:
        """What became of sessions whose record is not under our claim: FENCED or GONE."""
        keys = [meta_key(tag.tobytes()) for tag in tags]
        held = self._call(lambda: self._tokens(keys))
        return [
            Verdict.GONE if now is None or now == token.tobytes() else Verdict.FENCED
            for now, token in zip(held, tokens, strict=True)
        ]

    def _diagnose_job(self, job: CommitJob, rows: NDArray[np.intp], record: Callable[[int], bytes]) -> list[Verdict]:
        """The same for rows of a commit; a record that Redis has lost is written back."""
        self._check_generation()
        verdicts = self.diagnose(job.tags[rows], job.tokens[rows])
        keys = [meta_key(job.tags[row].tobytes()) for row in rows]
        held, losses = self._tokens(keys), self._losses_of(keys)
        back: dict[str, int] = {}
        for n, row in enumerate(rows.tolist()):
            meta = job.meta(row)
            if meta is None:
                continue
            # Our own claim without a record was evicted or half deleted; no claim at all may be a loss since we claimed.
            if held[n] == job.tokens[row].tobytes() or (held[n] is None and meta.losses < losses[n]):
                args = [job.tokens[row].tobytes(), record(row), int(job.ttl_ms[row]), meta.session_id, meta.reference,
                        meta.fingerprint, meta.client_id, meta.epoch, meta.created_ms]  # fmt: skip
                restored = self._scripted(self._restore, [keys[n]], [args], self.settings.wait)[0]
                verdicts[n] = Verdict.OK if restored else Verdict.FENCED
                back[meta.session_id] = int(job.ttl_ms[row])
        self.tally.keep(list(back), list(back.values()))
        return verdicts

    # Claims

    def holders(self, session_ids: Sequence[str]) -> list[str]:
        """The tokens of the claims that these sessions are under; "" where there is none."""
        keys = [meta_key(session_tag(session_id)) for session_id in session_ids]
        return [(token or b"").decode() for token in self._call(lambda: self._tokens(keys))]

    def claim(self, requests: Sequence[ClaimRequest]) -> list[ClaimResult]:
        """Takes sessions over, or creates them. Raises StoreUnavailable; then some may have been claimed: claim again."""

        def run() -> list[Any]:
            self._check_loss()
            now_ms = int(time.time() * 1000)
            keys = [meta_key(session_tag(request.session_id)) for request in requests]
            args = [
                [request.token, request.model, request.version, request.create_version, request.fingerprint, request.client_id,
                 request.ttl_ms, now_ms, 1 if request.attach else 0 if request.may_create else 2, request.session_id,
                 request.initial, "*" if request.replaces is None else request.replaces]
                for request in requests
            ]  # fmt: skip
            return self._scripted(self._claim, keys, args, self.settings.wait)

        return [_claimed(reply) for reply in self._call(run)]

    def touch(self, tags: NDArray[np.uint8], tokens: NDArray[np.uint8], ttl_ms: NDArray[np.uint64]) -> None:
        """Renews the time of sessions under these claims: of hash, memory and record."""
        pairs = [
            pair
            for tag, token, ttl in zip(map(bytes, tags), map(bytes, tokens), ttl_ms.tolist(), strict=True)
            for pair in ((record_key(tag, token), ttl), (meta_key(tag), ttl * 2), (memory_key(tag), ttl * 2))
        ]
        self._call(lambda: self._pipelined([key for key, _ in pairs], lambda pipe, at: pipe.pexpire(*pairs[at])))

    # Management

    def describe(self, session_id: str, with_record: bool = False) -> SessionInfo | None:
        """A session's hash and record header (or whole record); None if there is no such session."""

        def run() -> list[SessionInfo]:
            found = self._describe([meta_key(session_tag(session_id))], with_record)
            if not found:
                self._check_loss()
            return found

        found = self._call(run)
        return found[0] if found else None

    def page(
        self, cursor: int, count: int, wanted: Wanted = lambda session_id, model: True
    ) -> tuple[int, list[SessionInfo]]:
        """About `count` of the sessions that are wanted, and the cursor of the next page (0: no more).

        Redis looks at no more than `count` keys at a time. Where those that are wanted lie far apart, the page ends early, maybe
        with none. A session that is there from the first page to the last is found once, or twice where Redis grew or shrank its
        table of keys meanwhile.
        """
        enough = time.monotonic() + _PAGE_S

        def run() -> tuple[int, list[SessionInfo]]:
            found: list[SessionInfo] = []
            nodes = self._nodes.all()
            at, place = divmod(cursor, _NODES_MAX)  # one node after the other
            while place < len(nodes):
                at, keys = nodes[place].client.scan(at, match=META_PREFIX + b"*}", count=max(count, 10))
                found.extend(self._describe([key for key in keys if isinstance(key, bytes)], False, wanted))
                place += at == 0
                if len(found) * 2 >= count or time.monotonic() > enough:
                    break
            return (at * _NODES_MAX + place if place < len(nodes) else 0), found

        return self._call(run)

    def page_of(
        self, tenant: str, cursor: int, count: int, wanted: Wanted = lambda session_id, model: True
    ) -> tuple[int, list[SessionInfo]]:
        """The same of the sessions that have a place in this tenant's tally: it costs what the tenant has."""
        enough = time.monotonic() + _PAGE_S
        found: list[SessionInfo] = []
        while True:
            cursor, tags = self.tally.tags(tenant, cursor % _CURSORS, max(count, 10))
            for at in range(0, len(tags), _DESCRIBED_AT_ONCE):
                some = [meta_key(tag) for tag in tags[at : at + _DESCRIBED_AT_ONCE]]
                found += self._call(lambda some=some: self._describe(some, False, wanted))  # type: ignore[misc]
            if not cursor or len(found) * 2 >= count or time.monotonic() > enough:
                return cursor, found

    # Each may be called again, with the same token, after StoreUnavailable: it then tells what the first call did.

    def exists(self, session_id: str) -> bool:
        """Whether there is such a session."""
        return self.describe(session_id) is not None

    def delete(self, session_ids: Sequence[str], tokens: Sequence[bytes] | None = None) -> None:
        """Ends sessions whoever holds them, or only under these claims."""
        keys = [meta_key(session_tag(session_id)) for session_id in session_ids]
        ended = [b""] * len(keys) if tokens is None else tokens
        done = self._call(lambda: self._scripted(self._delete, keys, [[token] for token in ended], self.settings.wait))
        self.tally.give_back([session_id for session_id, gone in zip(session_ids, done, strict=True) if gone])

    def create(
        self, session_id: str, reference: str, fingerprint: str, record: bytes, ttl_ms: int, token: str,
        memory: Sequence[bytes] = (),
    ) -> bool:  # fmt: skip
        """A session that stands where `record` and the memory's log stand, under a new token; False if the id is in use."""
        args: list[Any] = [token, record, ttl_ms, session_id, reference, fingerprint, int(time.time() * 1000),
                           revision_of(memory), *memory]  # fmt: skip
        return self._change(self._create, session_id, args)

    def rewrite(self, info: SessionInfo, reference: str, fingerprint: str, record: bytes, token: str) -> bool:
        """Puts another record in place, under a new token; False if the session was claimed since `info` was read."""
        args: list[Any] = [info.token, token, record, reference, fingerprint]
        return self._change(self._rewrite, info.session_id, args)

    def _change(self, script: Script, session_id: str, args: list[Any]) -> bool:
        keys = [meta_key(session_tag(session_id))]
        return bool(self._call(lambda: self._scripted(script, keys, [args], self.settings.wait))[0])

    def _describe(
        self, keys: Sequence[bytes], with_record: bool, wanted: Wanted = lambda session_id, model: True
    ) -> list[SessionInfo]:
        metas = self._pipelined(keys, lambda pipe, at: pipe.hmget(keys[at], "i", "m", "f", "t", "e", "c"))
        known = [
            (key, meta)
            for key, meta in zip(keys, metas, strict=True)
            if meta[0] is not None and wanted(meta[0].decode(), _reference(meta[1])[0])
        ]
        names = [key + b":" + meta[3] for key, meta in known]
        records = self._pipelined(
            names, lambda pipe, at: pipe.get(names[at]) if with_record else pipe.getrange(names[at], 0, 63)
        )
        times = self._pipelined(names, lambda pipe, at: pipe.pttl(names[at]))
        headers = read_headers([record or b"" for record in records])
        return [
            _info(meta, headers[n], int(times[n]), records[n] if with_record else b"")
            for n, (_, meta) in enumerate(known)
            if records[n]
        ]

    # Watching

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S):
            try:
                self._check_generation()
                used = [int(node.client.info("memory")["used_memory"]) for node in self._watched.all()]
                self.used_memory_bytes = sum(used)
                expired = [int(node.client.info("stats")["expired_keys"]) for node in self._watched.all()]
                self.expired_keys = sum(expired)
                self._note("watch", "")
            except (redis.exceptions.RedisError, OSError) as error:
                self._note("watch", _why(error))
                self._refresh(self._watched)

    def _greet(self, connection: Any) -> None:
        """A connection reaches one life of a Redis: what is asked on it cannot meet one that has lost its data and that nobody
        knows of yet. A claim would begin sessions anew there, and a look at their hashes find them closed."""
        with self._lock:
            known = list(self._generations.items())
        for key, generation in known:
            connection.send_command("GET", key)
            try:
                found = connection.read_response()
            except redis.exceptions.ResponseError:
                continue  # another node of the cluster has it
            if found != generation:
                raise redis.exceptions.ConnectionError(_LOST)

    def _check_generation(self) -> bool:
        """Whether Redis, or a node of it, was found just now to have lost its data."""
        nodes = self._watched
        with self._lock:
            keys = [key for key, _ in nodes.generation_keys()]
            proposed = secrets.token_hex(8).encode()
            self._pipelined(keys, lambda pipe, at: pipe.set(keys[at], proposed, nx=True), nodes=nodes)
            found = self._pipelined(keys, lambda pipe, at: pipe.get(keys[at]), nodes=nodes)
            pairs = [(key, value) for key, value in zip(keys, found, strict=True) if isinstance(value, bytes)]
            lost = [key for key, value in pairs if self._generations.get(key, value) != value]
            self._generations.update(pairs)
            self.losses += bool(lost)
            self._lost_at.update(dict.fromkeys(lost, self.losses))
            if lost:
                log.warning("Redis has lost its data; living sessions are written back")
                self.on_loss()  # before any other thread learns of the new generation
        return bool(lost)

    def _check_loss(self) -> None:
        """Whichever thread found the loss: nobody must find the store empty before it is written to. Raises RedisError."""
        if self._check_generation() or self.writing_back():
            raise redis.exceptions.ConnectionError(_LOST)

    def _losses_of(self, keys: Sequence[bytes]) -> list[int]:
        """For each key the last loss of the node that has it."""
        last: dict[str, int] = {}
        for key, node in self._watched.generation_keys():
            last[node.name] = max(last.get(node.name, 0), self._lost_at.get(key, 0))
        found = [0] * len(keys)
        for node, rows in self._watched.of_keys(keys):
            for at in rows.tolist():
                found[at] = last.get(node.name, 0)
        return found

    def _refresh(self, nodes: Nodes) -> None:
        try:
            nodes.refresh()
        except (redis.exceptions.RedisError, OSError) as error:
            self._note("watch", _why(error))

    def _note(self, source: str, why: str) -> None:
        if self._trouble[source] == why:
            return
        before = self._trouble["commit"] or self._trouble["watch"]
        self._trouble[source] = why
        refuses = any(word in self._trouble["commit"] for word in _THERE_BUT_REFUSES)
        if not why and source == "watch" and not refuses:
            self._trouble["commit"] = ""  # Redis is there again; commits need not find that out by themselves
        after = self._trouble["commit"] or self._trouble["watch"]
        if after != before:
            self.on_trouble(after)

    def _tokens(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The tokens in sessions' hashes."""
        return self._pipelined(keys, lambda pipe, at: pipe.hget(keys[at], "t"))

    def _scripted(
        self, script: Script, keys: Sequence[bytes], args: Sequence[Sequence[Any]], wait: Wait = None
    ) -> list[Any]:
        """Runs a script for each of these hashes; see scripts.py for why a cluster is told the other keys too."""
        named = [[key] for key in keys]
        if self._nodes.in_slots:
            held = self._pipelined(keys, lambda pipe, at: pipe.hmget(keys[at], "t", "g"))
            named = [
                [key, key + b":" + (token or b""), *([key + b":m"] if revision else [])]
                for key, (token, revision) in zip(keys, held, strict=True)
            ]
        return self._pipelined(keys, lambda pipe, at: script(named[at], args[at], pipe), wait)

    def _pipelined(self, keys: Sequence[bytes], add: Add, wait: Wait = None, nodes: Nodes | None = None) -> list[Any]:
        """`add(pipe, at)` for each key, on the node that has it; with `wait`, as safe as a commit when this returns."""
        nodes = nodes or self._nodes
        try:
            return pipelined(nodes, keys, add, wait, self.settings.waited)
        except (redis.exceptions.MovedError, redis.exceptions.ClusterDownError, redis.exceptions.ConnectionError):
            if not nodes.in_slots:
                raise
            nodes.refresh()
            return pipelined(nodes, keys, add, wait, self.settings.waited)  # all that we ask for may be asked twice

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (redis.exceptions.RedisError, OSError) as error:
            raise StoreUnavailable(_why(error)) from error


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _reference(text: bytes) -> tuple[str, str]:
    model, _, version = text.decode().rpartition("/")
    return model, version


def _claimed(reply: Sequence[Any]) -> ClaimResult:
    status = ClaimStatus(reply[0].decode())
    if status in (ClaimStatus.NOT_FOUND, ClaimStatus.CHANGED, ClaimStatus.TAKEN_OVER):
        return ClaimResult(status)
    model, version = _reference(reply[1])
    if status is ClaimStatus.OTHER_MODEL:
        return ClaimResult(status, model, version, reply[2].decode())
    return ClaimResult(status, model, version, reply[2].decode(), int(reply[3]), int(reply[4]), reply[5])


def _info(meta: Sequence[bytes], header: Any, ttl_ms: int, record: bytes) -> SessionInfo:
    model, version = _reference(meta[1])
    return SessionInfo(
        session_id=meta[0].decode(), model=model, version=version, fingerprint=meta[2].decode(), token=meta[3].decode(),
        epoch=int(meta[4]), created_ms=int(meta[5]), seq=int(header["seq"]), acked=int(header["acked"]),
        commit_ms=int(header["commit_ms"]), ttl_ms=ttl_ms, record=record,
    )  # fmt: skip
