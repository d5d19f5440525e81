"""Server reflection, by which a stock client asks what there is."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection


class _Symbols:
    """A pool of descriptors that finds methods too: the protocol wants them, ghz asks for them, and protobuf's pool has none."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def FindFileContainingSymbol(self, name: str) -> Any:  # noqa: N802
        try:
            return self._pool.FindFileContainingSymbol(name)
        except KeyError:
            return self._pool.FindMethodByName(name).containing_service.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def enable(services: tuple[str, ...], server: grpc.aio.Server) -> None:
    """Has a server tell of these services, and of reflection itself."""
    pool: Any = _Symbols()
    reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server, pool)
