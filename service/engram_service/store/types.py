"""What goes into the store and what comes out. Plain data; the rules are in the modules that use it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram_service.settings import Settings
from engram_service.store.record import RecordBlock

UNACKNOWLEDGED = "UNACKNOWLEDGED: fewer copies than redis_ack asks for"
LOST = "Redis has lost its data, or the last of it; living sessions are being written back"


class StoreUnavailableError(Exception):
    """Redis cannot be reached, or takes no writes just now. Nothing is known of what the call did; it may be repeated.

    everybodys: whatever else was asked would have been refused too. Else what was refused may be about some keys alone.
    """

    def __init__(self, why: str, everybodys: bool = False) -> None:
        super().__init__(why)
        self.everybodys = everybodys


class DamagedError(Exception):
    """What Redis has under one session's key is no session. The message says why."""


class StoreError(Exception):
    """The store cannot be used as it is configured. The message says what to change."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for a rediss:// URL, read at each new connection; empty: the system's CAs, no certificate of our own."""

    ca: str = ""
    cert: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How to reach Redis, and what a commit means."""

    url: str = field(repr=False)  # may hold a password
    ack: str = "memory"  # memory, replicated (WAIT) or disk (WAITAOF)
    replicas: int = 1
    ack_timeout_ms: int = 1000
    connections: int = 2
    tls: TlsFiles = TlsFiles()
    require_safe: bool = False  # take no Redis that may lose what it is given
    native: bool = True  # commit by the extension, where it is

    @classmethod
    def of(cls, settings: Settings) -> StoreSettings:
        """Of a server whose `redis_url` is set."""
        tls = TlsFiles(settings.redis_tls_ca, settings.redis_tls_cert, settings.redis_tls_key)
        return cls(
            settings.redis_url, settings.redis_ack, settings.redis_replicas, settings.redis_ack_timeout_ms,
            settings.redis_connections, tls, settings.require_safe_redis, settings.wire != "python",
        )  # fmt: skip

    @property
    def wait(self) -> tuple[str | int, ...] | None:
        """The command that waits until what its connection has written is as safe as was asked for; none: it is at once."""
        return {
            "memory": None,
            "replicated": ("WAIT", self.replicas, self.ack_timeout_ms),
            "disk": ("WAITAOF", 1, 0, self.ack_timeout_ms),
        }[self.ack]

    def waited(self, reply: Any) -> bool:
        """Whether `wait` was answered by enough copies."""
        return int(reply) >= self.replicas if self.ack == "replicated" else int(reply[0]) >= 1


class ClaimStatus(enum.Enum):
    CREATED = "CREATED"
    CARRIED = "CARRIED"
    NOT_FOUND = "NOT_FOUND"  # an attach, or an open that may not create, of a session that is not there
    OTHER_MODEL = "OTHER_MODEL"
    CHANGED = "CHANGED"  # another claim than the one that this was to replace
    TAKEN_OVER = "TAKEN_OVER"  # an attach to a session that another client has opened
    DAMAGED = "DAMAGED"  # what is under the session's key is no session; nothing was changed


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    session_id: str
    model: str
    version: str  # empty: any
    create_version: str
    fingerprint: str
    client_id: int
    attach: bool
    token: str  # 16 hex digits, new
    ttl_ms: int
    initial: bytes  # the record if the session is new
    may_create: bool = True
    replaces: str | None = None  # the token of the claim that it may replace, "" where there is none; None: any


@dataclass(frozen=True, slots=True)
class ClaimResult:
    status: ClaimStatus
    model: str = ""
    version: str = ""
    fingerprint: str = ""
    epoch: int = 0
    created_ms: int = 0
    record: bytes = b""
    why: str = ""  # it is DAMAGED


class Verdict(enum.Enum):
    """The store's word on one commit."""

    OK = "ok"
    FENCED = "fenced"  # somebody else has claimed the session, and nothing was written
    GONE = "gone"  # closed by somebody else, or expired, and nothing was written
    FENCED_LATE = "fenced late"  # the same after an earlier attempt, which may have been written before that
    GONE_LATE = "gone late"

    @property
    def ok(self) -> bool:
        return self is Verdict.OK

    @property
    def fenced(self) -> bool:
        return self in (Verdict.FENCED, Verdict.FENCED_LATE)

    @property
    def late(self) -> Verdict:
        """The same word on a commit that was tried before."""
        return {Verdict.FENCED: Verdict.FENCED_LATE, Verdict.GONE: Verdict.GONE_LATE}.get(self, self)


@dataclass(frozen=True, slots=True)
class MetaFields:
    """What a session's hash holds, for a record that must be written back; `losses` is Store.losses at the claim."""

    session_id: str
    reference: str
    fingerprint: str
    client_id: int
    epoch: int
    created_ms: int
    losses: int


# Rows of a job and their records; each row is in one block.
Blocks: TypeAlias = list[tuple[NDArray[np.intp], RecordBlock]]


@dataclass(frozen=True, slots=True)
class CommitJob:
    """Records of many sessions to write, each under its claim's token.

    `done` is called from a committer thread, maybe several times, with the rows concerned: each row once.
    """

    tags: NDArray[np.uint8]  # [n, 22]
    tokens: NDArray[np.uint8]  # [n, 16]
    blocks: Callable[[], Blocks]  # may be called from a committer thread, as long as `done` was not for all rows
    ttl_ms: NDArray[np.uint64]
    meta: Callable[[int], MetaFields | None]  # None: the session is not under this claim any more
    done: Callable[[NDArray[np.intp], Verdict], None]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its hash and its record's header have it."""

    session_id: str
    model: str
    version: str
    fingerprint: str
    token: str
    epoch: int
    created_ms: int
    seq: int
    acked: int
    commit_ms: int
    ttl_ms: int  # left; negative: none
    record: bytes = b""  # only where it was asked for


@dataclass(frozen=True, slots=True)
class MemoryHead:
    """What a session's memory is at, as Redis has it."""

    model: str
    version: str
    fingerprint: str
    revision: bytes  # equal revisions are equal memories; empty: the session has none of its own
    length: int  # chunks in its log
    created_ms: int  # of the session


class Written(enum.Enum):
    """What became of a write to a memory."""

    DONE = 1
    CHANGED = 0  # the memory is not what the writer knew; nothing was written
    NO_SESSION = -1
