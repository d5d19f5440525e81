"""A GET at an HTTP port, for the commands and tools that read servers' metrics. Never through a proxy: these ports are inside."""

from __future__ import annotations

import http.client
import urllib.request

_BYTES_MAX = 4 << 20


def get(address: str, path: str, timeout_s: float = 10.0) -> str:
    """The body of an answer of 200, at most 4 MiB of it. Raises OSError, or ValueError where it is no text."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", timeout=timeout_s) as answer:
            body: bytes = answer.read(_BYTES_MAX)
    except http.client.HTTPException as error:
        raise OSError(f"{address} does not speak HTTP: {type(error).__name__}") from error
    return body.decode()
