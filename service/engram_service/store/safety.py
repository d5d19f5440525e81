"""Whether a Redis keeps what it is given: asked by the store, at its start and every minute.

INFO tells nearly all, so that a user without the right to CONFIG does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

REASONS = ("persistence", "eviction", "replica", "disk")

_SECTIONS = ("memory", "persistence", "replication")


def look(client: redis.Redis) -> tuple[dict[str, str], str]:
    """What of this Redis may lose what it is given, by reason; and what could not be told, "" nothing. Raises RedisError."""
    info: dict[str, Any] = {}
    for section in _SECTIONS:
        info |= client.info(section)
    snapshots: bool | None = None
    if not info.get("aof_enabled", 0):
        try:
            snapshots = bool(client.config_get("save").get("save"))
        except redis.exceptions.ResponseError:
            snapshots = None  # it forbids CONFIG
    return unsafe(info, snapshots), unchecked(info)


def unsafe(info: Mapping[str, Any], snapshots: bool | None) -> dict[str, str]:
    """The same from what INFO says, and whether it takes snapshots (None: not known)."""
    found: dict[str, str] = {}
    if info.get("role") in ("slave", "replica"):
        found["replica"] = "it is a replica and takes no writes; give the primary's address"
    if not info.get("aof_enabled", 1):
        kept = {True: "all since its last snapshot", False: "everything", None: "all that no snapshot has"}[snapshots]
        found["persistence"] = f"appendonly is off: a restart loses {kept}; set appendonly yes"
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        found["eviction"] = f"maxmemory-policy is {policy}: sessions are evicted when it is full; set noeviction"
    failed = [name for name in _WRITES if info.get(name, "ok") not in ("ok", b"ok")]
    if failed:
        found["disk"] = f"it cannot write to its disk ({', '.join(failed)}); look at its log, and for room"
    return found


def unchecked(info: Mapping[str, Any]) -> str:
    """What a Redis keeps to itself."""
    hidden = [word for name, word in _NEEDED.items() if name not in info]
    return f"could not be checked of Redis: {', '.join(hidden)}; see that it is safe" if hidden else ""


_WRITES = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
_NEEDED = {"aof_enabled": "whether appendonly is on", "maxmemory_policy": "maxmemory-policy", "role": "its role"}
