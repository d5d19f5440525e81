"""Who calls, and whether it may: reads the token off a call's metadata. Used by gate.py, server.py and stream.py.

Health stays open: whoever asks for it has no token (a load balancer), and it says nothing but that the server serves. All
else needs a token where tokens are on, and a method without a right in `RIGHT_OF` cannot be called at all.
"""

from __future__ import annotations

from typing import Any

from engram.v1 import service_pb2
from engram_service.auth.audit import Audit
from engram_service.auth.holdback import Holdback
from engram_service.auth.tokens import Caller, Tokens, unknown
from engram_service.errors import PermissionDeniedError, ServiceError

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
SERVICE = f"/{service_pb2.DESCRIPTOR.services_by_name['EngramService'].full_name}/"
IDENTITY, PEER = (
    "engram-identity",
    "engram-peer",
)  # metadata of a relayed call: who calls, from where. No client can set them
_SCHEME = "bearer "


class Access:
    """The door: lets a call in as a Caller, or refuses it and says so in the audit."""

    def __init__(self, tokens: Tokens, audit: Audit, relayed: bool = False) -> None:
        """`relayed`: calls come from a wire, which has asked who calls and says so by number."""
        self.tokens = tokens
        self.audit = audit
        self.holdback = Holdback()
        self._relayed = relayed

    def known(self, metadata: Any) -> Caller:
        """Who calls. Raises UnauthenticatedError."""
        if not self._relayed:
            return self.tokens.caller(_bearer(metadata))
        if not self.tokens.asked_for:
            return Caller()
        number = _value(metadata, IDENTITY)
        caller = self.tokens.numbered(int(number)) if number else None
        if caller is None:
            raise unknown()
        return self.tokens.renewed(caller)

    def peer(self, context: Any) -> str:
        """The other end of the client's connection."""
        peer: str = context.peer()
        return _value(context.invocation_metadata(), PEER) or peer if self._relayed else peer

    def entitle(self, caller: Caller, path: str) -> None:
        """Whether it may call a method, of whatever service. Raises PermissionDeniedError."""
        name = path.rpartition("/")[2]
        # gRPC itself says of a method that the service does not have that it is not there.
        _entitled(caller, name, RIGHT_OF.get(name, ANY) if path.startswith(SERVICE) else _OTHERS)

    def admit(self, method: str, metadata: Any, peer: str) -> Caller:
        """Who calls this method of the Engram service. Raises ServiceError."""
        caller: Caller | None = None
        try:
            caller = self.known(metadata)
            return _entitled(caller, method, RIGHT_OF[method])
        except ServiceError as refusal:
            self.audit.denied(method, caller, peer, refusal)
            raise

    def admitted(self, method: str, caller: Caller, peer: str) -> Caller:
        """The same for a caller whom the wire knows. Raises ServiceError."""
        try:
            return self.renewed(caller, method)
        except ServiceError as refusal:
            self.audit.denied(method, caller, peer, refusal)
            raise

    def renewed(self, caller: Caller, method: str) -> Caller:
        """The caller of a call that goes on, as the tokens are by now. Raises ServiceError."""
        return _entitled(self.tokens.renewed(caller), method, RIGHT_OF[method])


def _entitled(caller: Caller, method: str, right: str) -> Caller:
    if right != ANY and right not in caller.rights:
        message = f"{method} needs the right {right!r}, which the token {caller.token!r} does not have"
        raise PermissionDeniedError("RIGHT_MISSING", message, right=right)
    return caller


def _value(metadata: Any, name: str) -> str:
    """A metadata entry; empty if there is none."""
    return next((str(value) for key, value in metadata or () if key == name), "")


def _bearer(metadata: Any) -> str:
    """The token in an authorization header; empty if there is none."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str) and value.lower().startswith(_SCHEME):
            return value[len(_SCHEME) :].strip()
    return ""
