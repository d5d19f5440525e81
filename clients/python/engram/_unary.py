"""The unary call of a client, as those know it who make some: _manage.py and _memories.py. AsyncClient has it."""

from __future__ import annotations

from typing import Protocol, TypeVar

from google.protobuf.message import Message

Response = TypeVar("Response", bound=Message)


class Unary(Protocol):
    """Calls a method of the service. `timeout`: as callers give it, UNSET included. Raises EngramError."""

    async def __call__(
        self, method: str, request: Message, response_type: type[Response], timeout: float | None
    ) -> Response: ...
