"""The limit on a request's body, said or not said beforehand; an ASGI layer around all routes."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Refuses a body of more than `bytes_max` bytes with 413: before it is read where its length is said, else on the way."""

    def __init__(self, app: ASGIApp, bytes_max: int) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if int(Headers(scope=scope).get("content-length", "0")) > self._bytes_max:
            text = f"a body has at most {self._bytes_max} bytes\n"
            await PlainTextResponse(text, status_code=413)(scope, receive, send)
            return
        left = self._bytes_max

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"a body has at most {self._bytes_max} bytes")
            return message

        await self._app(scope, limited, send)
