"""The store: claims, loads and management calls on Redis. Blocking and thread-safe; commits go through Committers.

A watcher thread looks after Redis every half second: is it there, has it lost data (generations.py), how much memory does it use;
and every minute, is it one that keeps what it is given (safety.py).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import redis
from numpy.typing import NDArray
from redis.commands.core import Script

from engram_service.errors import DataLossError
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.store import safety, scripts
from engram_service.store.committer import Committers
from engram_service.store.generations import KEPT_MS, Generations
from engram_service.store.keys import META_PREFIX, memory_key, meta_key, record_key, session_tag
from engram_service.store.lines import Line, line_of
from engram_service.store.memories import MemoryLogs, revision_of
from engram_service.store.nodes import Add, Nodes, Wait, open_nodes, pipelined
from engram_service.store.reading import claimed, damaged, info_of, meta_of
from engram_service.store.record import read_headers
from engram_service.store.tally import Tally
from engram_service.store.types import (
    LOST,
    UNACKNOWLEDGED,
    ClaimRequest,
    ClaimResult,
    CommitJob,
    DamagedError,
    SessionInfo,
    StoreError,
    StoreSettings,
    StoreUnavailableError,
    Verdict,
)
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

T = TypeVar("T")
Wanted = Callable[[str, str], bool]  # by session id and model

_CALL_TIMEOUT_S = 5.0
_GRACE_S = 2.0  # of a server that was ready: a Redis that restarts is away for a second
_WATCH_S = 0.5
_WATCH_TIMEOUT_S = 1.0
_PAGE_S = 0.5
_DESCRIBED_AT_ONCE = 250
_CURSORS = 2**64
_NODES_MAX = 4096  # of a cluster; a page's cursor is a node's cursor and its place
_SAFETY_S = 60.0
_RUN = re.compile(rb"run_id:(\w{1,12})")  # enough to tell runs apart; it stands in each session's hash
_NO_CLUSTER = "Cluster mode is not enabled"  # as redis-py says it
_THERE_BUT_REFUSES = ("OOM", UNACKNOWLEDGED)  # trouble of commits that a Redis which answers may still have


class Store:
    """One Redis. `on_trouble(why)` is called from other threads when it stops and when it starts (empty) taking writes,
    `on_loss()` when it has lost data; while `writing_back()`, nobody claims."""

    def __init__(
        self, settings: StoreSettings, supervisor: Supervisor | None = None, health: Health | None = None, watches: bool = True
    ) -> None:  # fmt: skip
        """`watches`: looks after Redis itself too, its safety and its memory; else only after what it may have lost."""
        self.settings = settings
        self._watches = watches
        self.used_memory_bytes = 0
        self.expired_keys = 0
        self.unsafe: dict[str, str] = {}  # by reason, why this Redis may not keep what it is given
        self.on_trouble: Callable[[str], None] = lambda why: None
        self.on_loss: Callable[[], None] = lambda: None
        self.writing_back: Callable[[], bool] = lambda: False
        self._health = health or Health()
        supervisor = supervisor or Supervisor(Metrics(), self._health)
        self._generations = Generations(self._lost)
        self._trouble = {"commit": "", "watch": ""}
        self._unchecked = ""  # what could not be told of Redis's safety, and was said
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
            lambda text: Script(redis.Redis(), text),
            lambda keys, add: self._call(lambda: self._pipelined(keys, add, each=True)),
        )
        self._committers = Committers(
            self._nodes, settings, self._generations, self._diagnose_job, lambda why: self._note("commit", why), supervisor
        )  # fmt: skip
        self._closed = threading.Event()
        self._watcher = supervisor.thread("store-watch", self._watch, self._closed)

    @property
    def losses(self) -> int:
        """How often Redis was found to have lost data."""
        return self._generations.losses

    def unsafe_as_to(self, reason: str) -> bool:
        """Whether this Redis may lose what it is given, for this reason of safety.py."""
        return reason in self.unsafe

    def start(self) -> None:
        """Checks that Redis can do what is asked of it, if it is there; begins to watch it. Raises StoreError."""
        try:
            for node in self._watched.all():
                self._check_server(node.client.info("server"))
            if self._watches:
                self._check_safety()
            self._check_generation()
        except redis.exceptions.AuthenticationError as error:
            raise StoreError(f"Redis refuses the credentials in redis_url: {error}") from error
        except (redis.exceptions.RedisError, OSError) as error:
            if _NO_CLUSTER in str(error):
                raise StoreError(f"redis_url cannot be used: {_NO_CLUSTER}; give a redis:// URL") from error
            self._note("watch", _why(error))
        if self.unsafe and self.settings.require_safe:
            raise StoreError(
                f"this Redis does not keep what it is given: {'; '.join(self.unsafe.values())} (require_safe_redis is set)"
            )
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

    def look_for_loss(self) -> None:
        """Finds out now whether Redis has lost data; `on_loss` is told. Raises StoreUnavailableError."""
        self._call(self._check_generation)

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

    def line(self) -> Line:
        """A way to commit from the event loop."""
        return line_of(self._committers)

    def load(self, tags: NDArray[np.uint8], tokens: NDArray[np.uint8]) -> list[bytes | None]:
        """Records under these claims; None where there is none."""
        keys = [record_key(tag.tobytes(), token.tobytes()) for tag, token in zip(tags, tokens, strict=True)]
        found = self._call(lambda: self._pipelined(keys, lambda pipe, at: pipe.get(keys[at]), each=True))
        return [b"" if isinstance(value, DamagedError) else value for value in found]  # b"": no record

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
            if meta is None or isinstance(held[n], DamagedError):
                continue
            # Our own claim without a record was evicted or half deleted. No claim at all, or another one, may be what Redis came
            # back with, if it has lost data since we claimed.
            if held[n] == job.tokens[row].tobytes() or meta.losses < losses[n][1]:
                since = ",".join(self._generations.runs_since(*losses[n]))
                args = [job.tokens[row].tobytes(), record(row), int(job.ttl_ms[row]), meta.session_id, meta.reference,
                        meta.fingerprint, meta.client_id, meta.epoch, meta.created_ms, since]  # fmt: skip
                restored = self._scripted(self._restore, [keys[n]], [args], self.settings.wait, each=True)[0]
                verdicts[n] = Verdict.OK if restored == 1 else Verdict.FENCED
                back[meta.session_id] = int(job.ttl_ms[row])
        self.tally.keep(list(back), list(back.values()))
        return verdicts

    # Claims

    def holders(self, session_ids: Sequence[str]) -> list[str]:
        """The tokens of the claims that these sessions are under; "" where there is none."""
        keys = [meta_key(session_tag(session_id)) for session_id in session_ids]
        held = self._call(lambda: self._tokens(keys))
        return [token.decode(errors="replace") if isinstance(token, bytes) else "" for token in held]

    def claim(self, requests: Sequence[ClaimRequest]) -> list[ClaimResult]:
        """Takes sessions over, or creates them. Raises StoreUnavailableError; then some may have been claimed: claim again."""

        keys = [meta_key(session_tag(request.session_id)) for request in requests]

        def run() -> list[Any]:
            self._check_loss()
            now_ms = int(time.time() * 1000)

            def args(request: ClaimRequest) -> list[Any]:
                return [
                    request.token, request.model, request.version, request.create_version, request.fingerprint, request.client_id,
                    request.ttl_ms, now_ms, 1 if request.attach else 0 if request.may_create else 2, request.session_id,
                    request.initial, "*" if request.replaces is None else request.replaces,
                ]  # fmt: skip

            return self._in_run(self._claim, keys, [args(request) for request in requests], each=True)

        return [claimed(reply) for reply in self._call(run)]

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
                own = [key for key in keys if isinstance(key, bytes)]
                found.extend(self._describe(own, False, wanted, self._leave_out))
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
                found += self._call(lambda some=some: self._describe(some, False, wanted, self._leave_out))  # type: ignore[misc]
            if not cursor or len(found) * 2 >= count or time.monotonic() > enough:
                return cursor, found

    # Each may be called again, with the same token, after StoreUnavailableError: it then tells what the first call did.

    def exists(self, session_id: str) -> bool:
        """Whether there is such a session, be it damaged."""
        try:
            return self.describe(session_id) is not None
        except DataLossError:
            return True

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
        args: list[Any] = [
            token,
            record,
            ttl_ms,
            session_id,
            reference,
            fingerprint,
            int(time.time() * 1000),
            revision_of(memory),
        ]
        return self._change(self._create, session_id, args, memory)

    def rewrite(self, info: SessionInfo, reference: str, fingerprint: str, record: bytes, token: str) -> bool:
        """Puts another record in place, under a new token; False if the session was claimed since `info` was read."""
        args: list[Any] = [info.token, token, record, reference, fingerprint]
        return self._change(self._rewrite, info.session_id, args)

    def _change(self, script: Script, session_id: str, args: list[Any], more: Sequence[bytes] = ()) -> bool:
        keys = [meta_key(session_tag(session_id))]
        return bool(self._call(lambda: self._in_run(script, keys, [args], more))[0])

    def _describe(
        self, keys: Sequence[bytes], with_record: bool, wanted: Wanted = lambda session_id, model: True,
        damaged: Callable[[bytes, DamagedError], None] | None = None,
    ) -> list[SessionInfo]:  # fmt: skip
        """Sessions by their hashes. What is damaged is given to `damaged`, or raised."""

        def sound(found: list[tuple[bytes, Any]]) -> Iterator[tuple[bytes, Any]]:
            for key, value in found:
                if not isinstance(value, DamagedError):
                    yield key, value
                elif damaged is not None:
                    damaged(key, value)
                else:
                    raise value

        metas = self._pipelined(keys, lambda pipe, at: pipe.hmget(keys[at], "i", "m", "f", "t", "e", "c"), each=True)
        read = [(key, meta_of(key, meta)) for key, meta in zip(keys, metas, strict=True)]
        known = [(key, meta) for key, meta in sound(read) if meta is not None and wanted(meta.session_id, meta.model)]
        names = [key + b":" + meta.token.encode() for key, meta in known]
        records = self._pipelined(
            names,
            lambda pipe, at: pipe.get(names[at]) if with_record else pipe.getrange(names[at], 0, 63),
            each=True,
        )
        times = self._pipelined(names, lambda pipe, at: pipe.pttl(names[at]))
        headers = read_headers([record if isinstance(record, bytes) else b"" for record in records])
        found = [
            (key, info_of(meta, records[n], headers[n], int(times[n]), with_record))
            for n, (key, meta) in enumerate(known)
        ]
        return [info for _, info in sound(found) if info is not None]

    def _leave_out(self, key: bytes, why: DamagedError) -> None:
        log.warning(
            "a listing leaves out a session that is damaged (%s); close it to start over",
            why,
            extra={"key": key.decode(errors="replace")},
        )

    # Watching

    def _watch(self) -> None:
        look_at, known = time.monotonic() + _SAFETY_S, self._trouble["watch"]
        while not self._closed.wait(_WATCH_S):
            try:
                if self._watches and (time.monotonic() >= look_at or self._trouble["watch"] != known):
                    known = self._trouble["watch"]  # one that refuses writes, or is there again, may be another one
                    self._check_safety()
                    look_at = time.monotonic() + _SAFETY_S
                self._check_generation()
                if self._watches:
                    self._measure()
                self._keep_counters()
                self._note("watch", "")
            except (redis.exceptions.RedisError, OSError) as error:
                self._note("watch", _why(error))
                self._refresh(self._watched)

    def _measure(self) -> None:
        """Raises RedisError."""
        nodes = [node.client for node in self._watched.all()]
        self.used_memory_bytes = sum(int(node.info("memory")["used_memory"]) for node in nodes)
        self.expired_keys = sum(int(node.info("stats")["expired_keys"]) for node in nodes)

    def _check_safety(self) -> None:
        """Says what about this Redis may lose what it is given, when that changes. Raises RedisError."""
        found: dict[str, str] = {}
        for node in self._watched.all():
            unsafe, unchecked = safety.look(node.client)
            found |= {reason: f"{why} ({node.name})" if node.name else why for reason, why in unsafe.items()}
            if unchecked and unchecked != self._unchecked:
                log.warning("%s", unchecked)
                self._unchecked = unchecked
        for reason in found.keys() - self.unsafe.keys():
            log.warning("REDIS IS NOT SAFE (%s): %s", reason, found[reason])
        for reason in self.unsafe.keys() - found.keys():
            log.info("Redis is safe again as to %s", reason)
        self.unsafe = found
        told = "; ".join(found.values())
        self._health.warn("redis", told)
        if told and self.settings.require_safe:
            self._health.fail("redis safety", told)
        else:
            self._health.clear("redis safety")

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

    def _check_generation(self) -> bool:
        """Whether Redis, or a node of it, was found just now to have lost data."""
        nodes = self._watched
        with self._lock:
            here = [self._generations.key(nodes.generation_key(node)) for node in nodes.all()]
            marks = [self._generations.mark(key) for key in here]
            marks += [mark for mark in self._generations.marks() if mark.key not in here]
            counts = self._pipelined(
                [mark.key for mark in marks], lambda pipe, at: pipe.incr(marks[at].key), nodes=nodes
            )
            lost = [self._generations.counted(mark, int(count)) for mark, count in zip(marks, counts, strict=True)]
        return any(lost)

    def _keep_counters(self) -> None:
        keys = [mark.key for mark in self._generations.marks()]
        self._pipelined(keys, lambda pipe, at: pipe.pexpire(keys[at], KEPT_MS), nodes=self._watched)

    def _lost(self) -> None:
        log.warning("Redis has lost data, or is an older copy of it; living sessions are written back")
        self.on_loss()  # before any other thread can take Redis for one that has everything

    def _check_loss(self) -> None:
        """Whichever thread found the loss: nobody must find the store empty before it is written to. Raises RedisError."""
        if self._check_generation() or self.writing_back():
            raise redis.exceptions.ConnectionError(LOST)

    def _losses_of(self, keys: Sequence[bytes]) -> list[tuple[str, int]]:
        """For each key its node, and the last loss of that."""
        last: dict[str, int] = {}
        told = self._generations.lost_at()
        counters = list(told)
        for node, rows in self._nodes.of_keys(counters):
            last[node.name] = max((told[counters[at]] for at in rows.tolist()), default=0)
        found = [("", 0)] * len(keys)
        for node, rows in self._nodes.of_keys(keys):
            for at in rows.tolist():
                found[at] = (node.name, last.get(node.name, 0))
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
            self._health.tell("redis", after, 0 if self._health.failures() else _GRACE_S)
            self.on_trouble(after)

    def _tokens(self, keys: Sequence[bytes]) -> list[bytes | DamagedError | None]:
        """The tokens in sessions' hashes."""
        return self._pipelined(keys, lambda pipe, at: pipe.hget(keys[at], "t"), each=True)

    def _in_run(
        self, script: Script, keys: Sequence[bytes], args: Sequence[Sequence[Any]], more: Sequence[bytes] = (), each: bool = False
    ) -> list[Any]:  # fmt: skip
        """Runs a script that claims, and is told in which run of Redis it does. Raises ConnectionError where Redis was started
        meanwhile: to be asked again."""

        def runs() -> list[str]:
            names = [""] * len(keys)
            for node, rows in self._nodes.of_keys(keys) if keys else []:
                for at in rows.tolist():
                    names[at] = self._generations.run(node.name)
            return names

        for _ in range(2):  # before the first connection its run is not known
            now = runs()
            told = [[*some, run, *more] for some, run in zip(args, now, strict=True)]
            answers = self._scripted(script, keys, told, self.settings.wait, each)
            if runs() == now:
                return answers
        raise redis.exceptions.ConnectionError("Redis was started again meanwhile")

    def _scripted(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Sequence[Any]],
        wait: Wait = None,
        each: bool = False,
    ) -> list[Any]:
        """Runs a script for each of these hashes; see scripts.py for why a cluster is told the other keys too."""
        named = [[key] for key in keys]
        if self._nodes.in_slots:
            held = self._pipelined(keys, lambda pipe, at: pipe.hmget(keys[at], "t", "g"), each=True)
            pairs = [(None, None) if isinstance(pair, DamagedError) else pair for pair in held]
            named = [
                [key, key + b":" + (token or b""), *([key + b":m"] if revision else [])]
                for key, (token, revision) in zip(keys, pairs, strict=True)
            ]
        return self._pipelined(keys, lambda pipe, at: script(named[at], args[at], pipe), wait, counted=True, each=each)

    def _pipelined(
        self, keys: Sequence[bytes], add: Add, wait: Wait = None, nodes: Nodes | None = None, counted: bool = False,
        each: bool = False,
    ) -> list[Any]:  # fmt: skip
        """`add(pipe, at)` for each key, on the node that has it; with `wait`, as safe as a commit when this returns."""
        nodes = nodes or self._nodes
        generations = self._generations if counted else None
        try:
            return pipelined(nodes, keys, add, wait, self.settings.waited, generations, each)
        except (
            redis.exceptions.MovedError,
            redis.exceptions.ClusterDownError,
            redis.exceptions.ConnectionError,
        ) as error:
            if not nodes.in_slots or str(error) == LOST:
                raise
            nodes.refresh()
            return pipelined(nodes, keys, add, wait, self.settings.waited, generations, each)  # all may be asked twice

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except DamagedError as error:
            raise damaged(error) from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise StoreUnavailableError(_why(error)) from error


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.exceptions.ResponseError as error:
        return error
