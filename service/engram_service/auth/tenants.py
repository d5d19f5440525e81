"""How tenants are kept apart: every session has a key, its tenant and its id in one text, and below protocols/ there are only keys.

The session table, the store, the memories and Redis know sessions by key alone, so no path that begins with one tenant's key
can end at another's session. protocols/engram/confine.py makes keys of the ids in requests, and ids of the keys in responses. A
server without tokens has one tenant, the empty one, whose keys are the bare ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBERS = 1 << 18  # more than a tokens file has room for tenants
SERVER, UNKNOWN = 0, 1  # in place of a tenant's number: of the server as a whole, and of tenants that no token is of

_MARK = "\x1f"  # a control character: no valid id has one, and no tenant's name
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def key_of(tenant: str, session_id: str) -> str:
    """The key of a tenant's session. No two pairs have the same key, whatever is in the id."""
    return f"{tenant}{_MARK}{session_id}" if tenant or _MARK in session_id else session_id


def tenant_of(key: str) -> str:
    """Whose session it is."""
    return key.partition(_MARK)[0] if _MARK in key else ""


def id_of(key: str) -> str:
    """The session's id as its tenant knows it."""
    return key.partition(_MARK)[2] if _MARK in key else key


def beside(key: str, session_id: str) -> str:
    """The key of another session of the same tenant."""
    return key_of(tenant_of(key), session_id)


def usable_tenant(name: str) -> bool:
    """Whether a tenant may be called so; the empty one has the sessions from before there were tokens."""
    return not name or _TENANT.fullmatch(name) is not None


class TenantNumbers:
    """Numbers below NUMBERS for tenants, by which processes count what each has (sessions/counts.py). A tenant keeps its own; it
    goes to another when no other is left, and only if the tenant is gone: that of the one that has been gone the longest."""

    def __init__(self, end: int = NUMBERS) -> None:
        self._of: dict[str, int] = {}  # who is gone comes before who is there
        self._unused = UNKNOWN + 1
        self._end = end

    def of(self, tenants: Iterable[str]) -> dict[str, int]:
        """Those of the tenants that there are now."""
        there = dict.fromkeys(tenants)
        for tenant in there:
            if (number := self._of.pop(tenant, None)) is not None:
                self._of[tenant] = number
        for tenant in there:
            if tenant not in self._of and (number := self._free(there)) is not None:
                self._of[tenant] = number
        return {tenant: self._of[tenant] for tenant in there if tenant in self._of}

    def _free(self, there: dict[str, None]) -> int | None:
        if self._unused < self._end:
            self._unused += 1
            return self._unused - 1
        longest = next(iter(self._of), None)
        return None if longest is None or longest in there else self._of.pop(longest)
