"""What the HTTP port allows. Everything has a limit, and none of them needs the caller to be known."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from engram_service.settings import Settings

_SHARE = 8  # of the descriptors that this process may open, at most one in so many is the HTTP port's
_LEAST = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one HTTP port. Seconds are of the loop's clock."""

    connections_max: int = 128
    request_s: float = 5.0  # from the connection, or the first byte, until the head of a request is there
    answer_s: float = 60.0  # from there until the answer is with the caller
    idle_s: float = 20.0  # between two requests; Prometheus asks every 15 s and keeps its connection
    linger_s: float = 1.0  # what a refused caller still sends is thrown away for so long, that it may read why
    head_bytes_max: int = 16 << 10
    body_bytes_max: int = 1 << 20

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connections = settings.http_connections_max
        if descriptors != resource.RLIM_INFINITY:
            connections = min(connections, max(_LEAST, descriptors // _SHARE))
        return cls(connections_max=connections, request_s=settings.http_request_timeout_s)
