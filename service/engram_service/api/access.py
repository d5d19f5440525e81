"""Who calls, and whether it may: reads the token off a call's metadata. Used by server.py and stream.py.

Health stays open: whoever asks for it has no token (a load balancer), and it says nothing but that the server serves. All
else needs a token where tokens are on, and a method without a right in `RIGHT_OF` cannot be called at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from engram.v1 import service_pb2
from engram_service.api.audit import Audit
from engram_service.api.status import abort
from engram_service.errors import PermissionDenied, Refusal
from engram_service.tokens import Caller, Tokens

ANY = ""  # any token will do
RIGHT_OF = {
    "Stream": "step", "Step": "step", "StorePatterns": "step", "ForgetPatterns": "step",
    "GetSession": "read", "GetSessionState": "read", "Recall": "read", "ListPatterns": "read", "AddressMemory": "read",
    "Recreate": "read", "ListSessions": "read",
    "ForkSession": "manage", "CloseSession": "manage", "MoveSession": "manage",
    "ExportSession": "manage", "ImportSession": "manage",
    "ListModels": ANY, "GetModel": ANY, "GetServer": ANY,
    "ReloadModels": "operate",
}  # fmt: skip
_OTHERS = "operate"  # the right for reflection, and for whatever service comes beside it
_SERVICE = f"/{service_pb2.DESCRIPTOR.services_by_name['EngramService'].full_name}/"
_HEALTH = "/grpc.health.v1.Health/"
_SCHEME = "bearer "

Details: TypeAlias = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for type checkers alone


class Access:
    """The door: lets a call in as a Caller, or refuses it and says so in the audit."""

    def __init__(self, tokens: Tokens, audit: Audit) -> None:
        self.tokens = tokens
        self.audit = audit

    def admit(self, method: str, metadata: Any, peer: str) -> Caller:
        """Who calls this method of the Engram service. Raises Refusal."""
        return self._admit(method, RIGHT_OF[method], metadata, peer)

    def renewed(self, caller: Caller, method: str) -> Caller:
        """The caller of a call that goes on, as the tokens are by now. Raises Refusal."""
        return _entitled(self.tokens.renewed(caller), method, RIGHT_OF[method])

    def admit_beside(self, method: str, metadata: Any, peer: str) -> None:
        """The same for a method of another service."""
        self._admit(method, _OTHERS, metadata, peer)

    def _admit(self, method: str, right: str, metadata: Any, peer: str) -> Caller:
        caller: Caller | None = None
        try:
            caller = self.tokens.caller(_bearer(metadata))
            return _entitled(caller, method, right)
        except Refusal as refusal:
            self.audit.denied(method, caller, peer, refusal)
            raise


class Gate(grpc.aio.ServerInterceptor):
    """Stands before the services beside Engram's own, which asks for itself because it wants to know who calls."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler | None]], details: Details
    ) -> Handler | None:
        method = str(details.method)
        if method.startswith((_SERVICE, _HEALTH)):
            return await continuation(details)
        try:
            self._access.admit_beside(method.rpartition("/")[2], details.invocation_metadata, "")
        except Refusal as refusal:
            return _closed(refusal)
        return await continuation(details)


def _closed(refusal: Refusal) -> Handler:
    async def handle(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, refusal)

    # On the wire this answers calls of every kind.
    return grpc.stream_stream_rpc_method_handler(handle)


def _entitled(caller: Caller, method: str, right: str) -> Caller:
    if right != ANY and right not in caller.rights:
        message = f"{method} needs the right {right!r}, which the token {caller.token!r} does not have"
        raise PermissionDenied("RIGHT_MISSING", message, right=right)
    return caller


def _bearer(metadata: Any) -> str:
    """The token in an authorization header; empty if there is none."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str) and value.lower().startswith(_SCHEME):
            return value[len(_SCHEME) :].strip()
    return ""
