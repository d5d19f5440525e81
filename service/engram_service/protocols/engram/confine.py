"""Keeps unary calls inside their tenant: the session ids in a request become keys before any handler sees them.

It is done here for all methods at once, by the names of fields, so that a method which is added cannot forget it. The stream's
ids are made keys in stream.py, where those that the client left empty are made too.
"""

from __future__ import annotations

from google.protobuf.message import Message

from engram_service.auth.tenants import key_of

ID_FIELDS = ("session_id", "new_session_id")


def ids_of(request: Message) -> list[str]:
    """The session ids in a request, those left out too, as empty ones."""
    return [getattr(request, name) for name in ID_FIELDS if name in request.DESCRIPTOR.fields_by_name]


def confine(request: Message, tenant: str) -> None:
    """Makes keys of the ids; one that was left out stays empty."""
    for name in ID_FIELDS:
        if name in request.DESCRIPTOR.fields_by_name and (session_id := getattr(request, name)):
            setattr(request, name, key_of(tenant, session_id))
