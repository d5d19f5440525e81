"""Engram's state in Redis: the records, the claims that fence them, and the commits of every batch."""

from engram_service.store.keys import session_tag
from engram_service.store.lines import Line, Source
from engram_service.store.memories import REVISION_NBYTES, MemoryLogs, revision_of
from engram_service.store.reading import damaged
from engram_service.store.record import OUTPUTS_MAX, TIME_MS_MAX, RecordBlock, RecordLayout, Records
from engram_service.store.safety import REASONS as UNSAFE
from engram_service.store.store import Store
from engram_service.store.tally import Place
from engram_service.store.types import (
    Blocks,
    ClaimRequest,
    ClaimResult,
    ClaimStatus,
    CommitJob,
    MemoryHead,
    MetaFields,
    SessionInfo,
    StoreError,
    StoreSettings,
    StoreUnavailableError,
    TlsFiles,
    Verdict,
    Written,
)

__all__ = [
    "OUTPUTS_MAX",
    "REVISION_NBYTES",
    "TIME_MS_MAX",
    "UNSAFE",
    "Blocks",
    "ClaimRequest",
    "ClaimResult",
    "ClaimStatus",
    "CommitJob",
    "Line",
    "MemoryHead",
    "MemoryLogs",
    "MetaFields",
    "Place",
    "RecordBlock",
    "RecordLayout",
    "Records",
    "SessionInfo",
    "Source",
    "Store",
    "StoreError",
    "StoreSettings",
    "StoreUnavailableError",
    "TlsFiles",
    "Verdict",
    "Written",
    "damaged",
    "revision_of",
    "session_tag",
]
