"""One unary call, as its handler sees it. Made by server.py."""

from __future__ import annotations

from dataclasses import dataclass

from engram_service.auth.tokens import Caller


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and the seconds that are left. The ids in the request are keys already; see confine.py."""

    left_s: float
    caller: Caller

    @property
    def tenant(self) -> str:
        return self.caller.tenant
