"""Engram's state in Redis: the records, the claims that fence them, and the commits of every tick."""

from engram_service.store.committer import Sent
from engram_service.store.keys import session_tag
from engram_service.store.record import RecordBlock, RecordLayout, Records
from engram_service.store.store import Store
from engram_service.store.types import (
    ClaimRequest,
    ClaimResult,
    ClaimStatus,
    CommitJob,
    MetaFields,
    SessionInfo,
    StoreError,
    StoreSettings,
    StoreUnavailable,
    Verdict,
)

__all__ = [
    "ClaimRequest",
    "ClaimResult",
    "ClaimStatus",
    "CommitJob",
    "MetaFields",
    "RecordBlock",
    "RecordLayout",
    "Records",
    "Sent",
    "SessionInfo",
    "Store",
    "StoreError",
    "StoreSettings",
    "StoreUnavailable",
    "Verdict",
    "session_tag",
]
