"""Engram's Python SDK: recurrent models served as living sessions.

    async with engram.AsyncClient("127.0.0.1:50051") as client:
        session = await client.open("digits-reader", session_id="cam-7")
        y = await session.step(x)

`Client` is the same for programs without an event loop. Importing this package is cheap: what needs gRPC and numpy is
loaded when it is first used.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from engram._version import __version__

if TYPE_CHECKING:
    from engram._blocking import Client
    from engram._blocking_session import BlockingSession
    from engram._client import AsyncClient
    from engram._errors import (
        AbortedError,
        AccessDeniedError,
        AlreadyExistsError,
        ClientClosedError,
        CloseIncompleteError,
        DataLossError,
        DeadlineExceededError,
        EngramError,
        FailedPreconditionError,
        InternalError,
        InvalidInputError,
        NotFoundError,
        ResourceExhaustedError,
        SessionClosedError,
        TakenOverError,
        UnavailableError,
        UnsupportedError,
    )
    from engram._options import ClientOptions
    from engram._patterns import Patterns, Recall, Recreation, Stored
    from engram._session import Session
    from engram._types import ModelInfo, ServerInfo, SessionInfo, Settled, TensorSpec

# gRPC's handlers of forks do not know its asyncio part, and now and then hang in the child. What is to be done about forks,
# _poller.py does. Read when gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def _before_fork() -> None:
    """For forks before the first client, where others use gRPC: from its import on, _poller sees to them itself."""
    if "grpc" in sys.modules and "engram._poller" not in sys.modules:
        importlib.import_module("engram._poller").before_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)

__all__ = [
    "AbortedError",
    "AccessDeniedError",
    "AlreadyExistsError",
    "AsyncClient",
    "BlockingSession",
    "Client",
    "ClientClosedError",
    "ClientOptions",
    "CloseIncompleteError",
    "DataLossError",
    "DeadlineExceededError",
    "EngramError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidInputError",
    "ModelInfo",
    "NotFoundError",
    "Patterns",
    "Recall",
    "Recreation",
    "ResourceExhaustedError",
    "ServerInfo",
    "Session",
    "SessionClosedError",
    "SessionInfo",
    "Settled",
    "Stored",
    "TakenOverError",
    "TensorSpec",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]

_HOMES = {
    "_blocking": ("Client",),
    "_blocking_session": ("BlockingSession",),
    "_client": ("AsyncClient",),
    "_options": ("ClientOptions",),
    "_patterns": ("Patterns", "Recall", "Recreation", "Stored"),
    "_session": ("Session",),
    "_types": ("ModelInfo", "ServerInfo", "SessionInfo", "Settled", "TensorSpec"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engram' has no attribute {name!r}")
    return getattr(importlib.import_module(f"engram.{_MODULES.get(name, '_errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
