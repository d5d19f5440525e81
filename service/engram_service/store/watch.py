"""A thread that looks after Redis every half second: is it there, has it lost data (generations.py), how much memory does it use;
and every minute, is it one that keeps what it is given (safety.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from engram_service.observability.health import Health
from engram_service.store import safety
from engram_service.store.commands import Commands, why
from engram_service.store.generations import KEPT_MS, Generations
from engram_service.store.nodes import open_nodes
from engram_service.store.types import UNACKNOWLEDGED, StoreError, StoreSettings
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_GRACE_S = 2.0  # of a server that was ready: a Redis that restarts is away for a second
_WATCH_S = 0.5
_TIMEOUT_S = 1.0
_SAFETY_S = 60.0
_NO_CLUSTER = "Cluster mode is not enabled"  # as redis-py says it
_THERE_BUT_REFUSES = ("OOM", UNACKNOWLEDGED)  # trouble of commits that a Redis which answers may still have


class Watch:
    """`on_trouble(why)` is called from other threads when Redis stops and when it starts (empty) taking writes.
    `thoroughly`: looks after Redis itself too, its safety and its memory; else only after what it may have lost."""

    def __init__(
        self, commands: Commands, settings: StoreSettings, generations: Generations, health: Health, supervisor: Supervisor,
        on_trouble: Callable[[str], None], thoroughly: bool,
    ) -> None:  # fmt: skip
        self.used_memory_bytes = 0
        self.expired_keys = 0
        self.unsafe: dict[str, str] = {}  # by reason, why this Redis may not keep what it is given
        self._commands = commands
        self._settings = settings
        self._generations = generations
        self._health = health
        self._on_trouble = on_trouble
        self._thoroughly = thoroughly
        self._trouble = {"commit": "", "watch": ""}
        self._unchecked = ""  # what could not be told of Redis's safety, and was said
        self._lock = threading.Lock()
        self._nodes = open_nodes(settings.url, _TIMEOUT_S, settings.tls)  # connections of its own
        self.ended = threading.Event()
        self.thread = supervisor.thread("store-watch", self._run, self.ended)

    def start(self) -> None:
        """Checks that Redis can do what is asked of it, if it is there; begins to watch it. Raises StoreError."""
        try:
            for node in self._nodes.all():
                self._check_server(node.client.info("server"))
            if self._thoroughly:
                self.check_safety()
            self.check_generation()
        except redis.exceptions.AuthenticationError as error:
            raise StoreError(f"Redis refuses the credentials in redis_url: {error}") from error
        except (redis.exceptions.RedisError, OSError) as error:
            if _NO_CLUSTER in str(error):
                raise StoreError(f"redis_url cannot be used: {_NO_CLUSTER}; give a redis:// URL") from error
            self.note("watch", why(error))
        if self.unsafe and self._settings.require_safe:
            raise StoreError(
                f"this Redis does not keep what it is given: {'; '.join(self.unsafe.values())} (require_safe_redis is set)"
            )
        self.thread.start()

    def _check_server(self, info: dict[str, Any]) -> None:
        version = str(info.get("redis_version", "0"))
        if self._settings.ack == "disk" and tuple(int(part) for part in version.split(".")[:2]) < (7, 2):
            raise StoreError(
                f"redis_ack = disk needs WAITAOF (Redis 7.2 or newer, this is {version}); give this Redis appendfsync "
                "always, and set redis_ack = memory"
            )
        if "cluster" in (info.get("redis_mode"), info.get("server_mode")) and not self._nodes.in_slots:
            raise StoreError("redis_url names a node of a Redis Cluster; give a redis+cluster:// URL")

    def close(self) -> None:
        """The thread ends, if it has not yet."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(_TIMEOUT_S)  # it may be reading from what is closed next
        self._nodes.close()

    def _run(self) -> None:
        look_at, known = time.monotonic() + _SAFETY_S, self._trouble["watch"]
        while not self.ended.wait(_WATCH_S):
            try:
                if self._thoroughly and (time.monotonic() >= look_at or self._trouble["watch"] != known):
                    known = self._trouble["watch"]  # one that refuses writes, or is there again, may be another one
                    self.check_safety()
                    look_at = time.monotonic() + _SAFETY_S
                self.check_generation()
                if self._thoroughly:
                    self._measure()
                self._keep_counters()
                self.note("watch", "")
            except (redis.exceptions.RedisError, OSError) as error:
                self.note("watch", why(error))
                self._refresh()

    def _measure(self) -> None:
        """Raises RedisError."""
        nodes = [node.client for node in self._nodes.all()]
        self.used_memory_bytes = sum(int(node.info("memory")["used_memory"]) for node in nodes)
        self.expired_keys = sum(int(node.info("stats")["expired_keys"]) for node in nodes)

    def check_safety(self) -> None:
        """Says what about this Redis may lose what it is given, when that changes. Raises RedisError."""
        found: dict[str, str] = {}
        for node in self._nodes.all():
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
        if told and self._settings.require_safe:
            self._health.fail("redis safety", told)
        else:
            self._health.clear("redis safety")

    def check_generation(self) -> bool:
        """Whether Redis, or a node of it, was found just now to have lost data."""
        with self._lock:
            here = [self._generations.key(self._nodes.generation_key(node)) for node in self._nodes.all()]
            marks = [self._generations.mark(key) for key in here]
            marks += [mark for mark in self._generations.marks() if mark.key not in here]
            counts = self._commands.pipelined(
                [mark.key for mark in marks], lambda pipe, at: pipe.incr(marks[at].key), nodes=self._nodes
            )
            lost = [self._generations.counted(mark, int(count)) for mark, count in zip(marks, counts, strict=True)]
        return any(lost)

    def _keep_counters(self) -> None:
        keys = [mark.key for mark in self._generations.marks()]
        self._commands.pipelined(keys, lambda pipe, at: pipe.pexpire(keys[at], KEPT_MS), nodes=self._nodes)

    def _refresh(self) -> None:
        try:
            self._nodes.refresh()
        except (redis.exceptions.RedisError, OSError) as error:
            self.note("watch", why(error))

    def note(self, source: str, trouble: str) -> None:
        """What is wrong with Redis, as commits or the watch find it; empty: nothing."""
        if self._trouble[source] == trouble:
            return
        before = self._trouble["commit"] or self._trouble["watch"]
        self._trouble[source] = trouble
        refuses = any(word in self._trouble["commit"] for word in _THERE_BUT_REFUSES)
        if not trouble and source == "watch" and not refuses:
            self._trouble["commit"] = ""  # Redis is there again; commits need not find that out by themselves
        after = self._trouble["commit"] or self._trouble["watch"]
        if after != before:
            self._health.tell("redis", after, 0 if self._health.failures() else _GRACE_S)
            self._on_trouble(after)
