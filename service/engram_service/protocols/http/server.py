"""The HTTP port's server: binds at once, then uvicorn in a thread of its own with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import threading
from typing import Any, cast

import uvicorn

from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.protocols.http.guard import Guard
from engram_service.protocols.http.limits import Limits
from engram_service.protocols.http.pace import PacedSelector
from engram_service.protocols.http.protocol import GuardedProtocol
from engram_service.protocols.http.routes import Exposition, routes
from engram_service.settings import Settings, split_address
from engram_service.supervision import Supervisor

_CORE_SHARE = 0.25  # of a core, for all of the HTTP port
_BACKLOG = 64  # connections that the kernel holds for us
_KERNEL_BYTES = 128 << 10
_GOODBYE_S = 1
_JOIN_S = 3.0
_LACKING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # such as ::1 where there is no IPv6


class HttpServer:
    """Serves from its making until `stop`. Raises OSError where the address cannot be had."""

    def __init__(
        self, settings: Settings, exposition: Exposition, metrics: Metrics, health: Health, supervisor: Supervisor
    ) -> None:  # fmt: skip
        self._limits = Limits.of(settings)
        self._exposition, self._metrics, self._health = exposition, metrics, health
        self._sockets = _bind(settings.http)
        self._server: uvicorn.Server | None = None
        self._stopped = threading.Event()
        self._thread = supervisor.thread("http", self._run, self._stopped)
        self._thread.start()

    @property
    def address(self) -> str:
        """HOST:PORT, with the port that it has got."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def stop(self) -> None:
        self._stopped.set()
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(_JOIN_S)
        for one in self._sockets:
            one.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PacedSelector(_CORE_SHARE))) as runner:
            runner.run(self._serve())
        if not self._stopped.is_set():
            raise RuntimeError("the HTTP server ended, and nobody had told it to")

    async def _serve(self) -> None:
        guard = Guard(self._limits, self._metrics.http_connections_dropped)
        # The loop of a run that failed may have closed its sockets; the addresses stay bound.
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(one.dup()) for one in self._sockets]
            self._server = _Server(self._config(guard))
            if self._stopped.is_set():
                return
            async with asyncio.TaskGroup() as group:
                sweep = group.create_task(guard.sweep())
                await self._server.serve(sockets=sockets)
                sweep.cancel()

    def _config(self, guard: Guard) -> uvicorn.Config:
        return uvicorn.Config(
            routes(self._exposition, self._health, self._limits),
            http=cast(Any, functools.partial(GuardedProtocol, guard)),
            ws="none",
            lifespan="off",
            backlog=1,
            h11_max_incomplete_event_size=self._limits.head_bytes_max,
            timeout_keep_alive=int(self._limits.idle_s),
            timeout_graceful_shutdown=_GOODBYE_S,
            proxy_headers=False,
            server_header=False,
            log_config=None,
            log_level="error",  # it warns of each request that is none
            access_log=False,
        )


class _Server(uvicorn.Server):
    """Takes one connection in a turn of the loop.

    asyncio takes as many as its backlog says, and where there is no file for the first it tries all the others, logs each, and
    sets a timer for each to try again: the timers multiply until the loop does nothing else. The kernel's backlog is set apart.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(_BACKLOG)


def _bind(address: str) -> list[socket.socket]:
    """A listening socket for each address of the host, all with one port; of the families that this machine has."""
    host, port = split_address(address, "http")
    bound: list[socket.socket] = []
    lacking: OSError | None = None
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, where in infos:
            try:
                bound.append(_listener(family, (where[0], port, *where[2:])))
            except OSError as error:
                if error.errno not in _LACKING:
                    raise
                lacking = error
            else:
                port = bound[-1].getsockname()[1]  # of the first, where any would do
        if lacking is not None and not bound:
            raise lacking
    except OSError as error:
        for one in bound:
            one.close()
        raise OSError(f"http = {address}: {error.strerror}") from error
    return bound


def _listener(family: int, where: tuple[Any, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of each connection; the kernel would keep megabytes for one that does not read.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BYTES)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BYTES)
        one.bind(where)
        one.listen(_BACKLOG)
        one.setblocking(False)
    except OSError:
        one.close()
        raise
    return one
