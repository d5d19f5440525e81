"""The store: claims, loads and management calls on Redis. Blocking and thread-safe; commits go through Committers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from engram_service.errors import DataLossError
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.store import scripts
from engram_service.store.commands import Commands
from engram_service.store.committer import Committers
from engram_service.store.generations import Generations
from engram_service.store.keys import memory_key, meta_key, record_key, session_tag
from engram_service.store.lines import Line, line_of
from engram_service.store.listing import Listing
from engram_service.store.memories import MemoryLogs, revision_of
from engram_service.store.reading import claimed
from engram_service.store.scripts import Script
from engram_service.store.tally import Tally
from engram_service.store.types import (
    LOST,
    ClaimRequest,
    ClaimResult,
    CommitJob,
    DamagedError,
    SessionInfo,
    StoreSettings,
    Verdict,
)
from engram_service.store.watch import Watch
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_LOOKED_AT = 128  # sessions in one round trip: Redis, and the thread of the steps, do other work between two


class Store:
    """One Redis. `on_trouble(why)` is called from other threads when it stops and when it starts (empty) taking writes,
    `on_loss()` when it has lost data; while `writing_back()`, nobody claims."""

    def __init__(
        self, settings: StoreSettings, supervisor: Supervisor | None = None, health: Health | None = None, watches: bool = True
    ) -> None:  # fmt: skip
        """`watches`: looks after Redis itself too, its safety and its memory; else only after what it may have lost."""
        self.settings = settings
        self.on_trouble: Callable[[str], None] = lambda why: None
        self.on_loss: Callable[[], None] = lambda: None
        self.writing_back: Callable[[], bool] = lambda: False
        health = health or Health()
        supervisor = supervisor or Supervisor(Metrics(), health)
        self._generations = Generations(self._lost)
        commands = self._commands = Commands(settings, self._generations)
        self._watch = Watch(commands, settings, self._generations, health, supervisor, self._troubled, watches)
        self._claim, self._restore, self._delete, self._create, self._rewrite = (
            Script(text) for text in (scripts.CLAIM, scripts.RESTORE, scripts.DELETE, scripts.CREATE, scripts.REWRITE)
        )
        self.memories = MemoryLogs(
            lambda script, keys, args, durable: commands.call(
                lambda: commands.scripted(script, keys, args, settings.wait if durable else None)
            ),
            lambda keys, add: commands.call(lambda: commands.pipelined(keys, add)),
        )
        self.tally = Tally(lambda keys, add: commands.call(lambda: commands.pipelined(keys, add, each=True)))
        listing = Listing(commands, self.tally, self._check_loss)
        self.describe, self.page, self.page_of = listing.describe, listing.page, listing.page_of
        self._committers = Committers(
            commands.nodes, settings, self._generations, self._diagnose_job, lambda why: self._watch.note("commit", why),
            supervisor,
        )  # fmt: skip

    @property
    def losses(self) -> int:
        """How often Redis was found to have lost data."""
        return self._generations.losses

    @property
    def unsafe(self) -> dict[str, str]:
        """By reason, why this Redis may not keep what it is given."""
        return self._watch.unsafe

    def unsafe_as_to(self, reason: str) -> bool:
        """Whether this Redis may lose what it is given, for this reason of safety.py."""
        return reason in self.unsafe

    @property
    def used_memory_bytes(self) -> int:
        return self._watch.used_memory_bytes

    @property
    def expired_keys(self) -> int:
        return self._watch.expired_keys

    def start(self) -> None:
        """Checks that Redis can do what is asked of it, if it is there; begins to watch it. Raises StoreError."""
        self._watch.start()

    def look_for_loss(self) -> None:
        """Finds out now whether Redis has lost data; `on_loss` is told. Raises StoreUnavailableError."""
        self._commands.call(self._watch.check_generation)

    def close(self) -> None:
        self._watch.ended.set()
        self._committers.close()
        self._commands.nodes.close()
        self._watch.close()

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
        found = self._commands.call(
            lambda: self._commands.pipelined(keys, lambda pipe, at: pipe.get(keys[at]), each=True)
        )
        return [b"" if isinstance(value, DamagedError) else value for value in found]  # b"": no record

    def diagnose(self, tags: NDArray[np.uint8], tokens: NDArray[np.uint8]) -> list[Verdict]:
        """What became of sessions whose record is not under our claim: FENCED or GONE."""
        keys = [meta_key(tag.tobytes()) for tag in tags]
        held = self._commands.call(lambda: self._commands.tokens(keys))
        return [
            Verdict.GONE if now is None or now == token.tobytes() else Verdict.FENCED
            for now, token in zip(held, tokens, strict=True)
        ]

    def _diagnose_job(self, job: CommitJob, rows: NDArray[np.intp], record: Callable[[int], bytes]) -> list[Verdict]:
        """The same for rows of a commit; a record that Redis has lost is written back."""
        self._watch.check_generation()
        verdicts = self.diagnose(job.tags[rows], job.tokens[rows])
        keys = [meta_key(job.tags[row].tobytes()) for row in rows]
        held, losses = self._commands.tokens(keys), self._commands.losses_of(keys)
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
                restored = self._commands.scripted(self._restore, [keys[n]], [args], self.settings.wait, each=True)[0]
                verdicts[n] = Verdict.OK if restored == 1 else Verdict.FENCED
                back[meta.session_id] = int(job.ttl_ms[row])
        self.tally.keep(list(back), list(back.values()))
        return verdicts

    # Claims

    def holders(self, session_ids: Sequence[str]) -> list[str]:
        """The tokens of the claims that these sessions are under; "" where there is none."""
        keys = [meta_key(session_tag(session_id)) for session_id in session_ids]
        held = [
            token
            for start in range(0, len(keys), _LOOKED_AT)
            for token in self._commands.call(partial(self._commands.tokens, keys[start : start + _LOOKED_AT]))
        ]
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

            return self._commands.in_run(self._claim, keys, [args(request) for request in requests], each=True)

        return [claimed(reply) for reply in self._commands.call(run)]

    def touch(self, tags: NDArray[np.uint8], tokens: NDArray[np.uint8], ttl_ms: NDArray[np.uint64]) -> None:
        """Renews the time of sessions under these claims: of hash, memory and record."""
        pairs = [
            pair
            for tag, token, ttl in zip(map(bytes, tags), map(bytes, tokens), ttl_ms.tolist(), strict=True)
            for pair in ((record_key(tag, token), ttl), (meta_key(tag), ttl * 2), (memory_key(tag), ttl * 2))
        ]
        self._commands.call(
            lambda: self._commands.pipelined([key for key, _ in pairs], lambda pipe, at: pipe.pexpire(*pairs[at]))
        )

    # Management

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
        done = self._commands.call(
            lambda: self._commands.scripted(self._delete, keys, [[token] for token in ended], self.settings.wait)
        )
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
        return bool(self._commands.call(lambda: self._commands.in_run(script, keys, [args], more))[0])

    # Trouble and losses

    def _troubled(self, why: str) -> None:
        self.on_trouble(why)

    def _lost(self) -> None:
        log.warning("Redis has lost data, or is an older copy of it; living sessions are written back")
        self.on_loss()  # before any other thread can take Redis for one that has everything

    def _check_loss(self) -> None:
        """Whichever thread found the loss: nobody must find the store empty before it is written to. Raises RedisError.

        To be called before claims. That these are counted themselves is not enough: the count behind them would tell of the loss
        when they have made sessions anew already, which are younger than those that would be written back and so stay.
        """
        if self._watch.check_generation() or self.writing_back():
            raise redis.exceptions.ConnectionError(LOST)
