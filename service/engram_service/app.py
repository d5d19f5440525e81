"""The composition root: makes every part, wires it by constructors, runs until told to stop, and takes it down in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engram import __version__
from engram_service.auth.access import Access
from engram_service.auth.audit import Audit
from engram_service.auth.tls import Certificate
from engram_service.auth.tokens import Tokens
from engram_service.catalog import Catalog
from engram_service.condition import Condition
from engram_service.data_path import DataPath
from engram_service.descriptors import Descriptors
from engram_service.draining import Drain
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.patterns.memories import Memories
from engram_service.protocols.engram.looks import Looks
from engram_service.protocols.engram.memory import MemoryHandlers
from engram_service.protocols.engram.server import Server
from engram_service.protocols.engram.stream import StreamHandler
from engram_service.protocols.engram.unary import UnaryHandlers
from engram_service.protocols.http.server import HttpServer
from engram_service.runtimes.devices import Device, device_of
from engram_service.runtimes.loader import Loader
from engram_service.sessions.residency import Residency
from engram_service.sessions.streams import Streams
from engram_service.sessions.table import NO_SLOT, SessionTable
from engram_service.settings import SettingError, Settings
from engram_service.signals import Signals
from engram_service.store import UNSAFE, Store, StoreSettings, TlsFiles
from engram_service.store.private import PrivateRedis, PrivateSettings
from engram_service.supervision import Supervisor
from engram_service.wire.grpcio import GrpcioWire

if TYPE_CHECKING:
    from engram_service.wire.native import NativeWire

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002  # other threads share the interpreter: the event loop may not wait long for it
_STOP_GRACE_S = 1.0
_LOOK_S = 0.05
_REDIS_GRACE_S = 2.0  # of a server that was ready: a Redis that restarts is away for a second


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises SettingError, StoreError or OSError if it cannot start."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        metrics, health = Metrics(), Health()
        supervisor = Supervisor(metrics, health)
        supervisor.watch_loop(asyncio.get_running_loop())
        files = Descriptors(metrics, health)
        settings = files.fitted(settings)
        health.fail("server", "it is starting")
        http = HttpServer(settings, metrics, health, supervisor)
        stack.callback(http.stop)
        device = device_of(settings.device)
        loader = Loader(settings, device)
        signals = Signals(stop, settings.drain_timeout_s, loader.watchdog.running)
        stack.callback(_leave, loader, signals)
        tokens = Tokens(Path(settings.tokens_file) if settings.tokens_file else None)
        access = Access(tokens, Audit(metrics))
        certificate = Certificate.of(settings)
        store = await _store(settings, stack, supervisor, health, signals)
        table = SessionTable()
        _register_cells(settings)
        catalog = Catalog(settings, loader, metrics)
        stack.callback(catalog.close)
        wire = _wire(settings, access, certificate, files.connections_max)
        path = DataPath(settings, table, catalog, store, wire, access, tokens.limits, supervisor, metrics, health)
        memories = Memories(catalog.resolve, store, settings.memory_cache_mb << 20)
        handlers = UnaryHandlers(
            settings, table, catalog, path.shares, supervisor, path.sessions, path.endings, path.calls,
            partial(Looks, settings, table, path.pins, path.residency, supervisor), store, path.unary, memories, device.name,
        )  # fmt: skip
        memory_handlers = MemoryHandlers(settings, catalog, metrics, path.calls, handlers, memories)
        for pools in (path.sessions, memory_handlers, handlers):
            stack.callback(pools.close)
        tokens.on_change = path.handler.tokens_changed
        server = Server(settings, access, certificate, health, wire, handlers, memory_handlers)
        if not isinstance(wire, GrpcioWire):
            _take_over(wire, access, server, path.handler, tokens, supervisor)
        _expose(metrics, table, catalog, path.streams, store, memories, device)

        supervisor.thread("graphs watch", loader.watchdog.look, loader.watchdog.stopped).start()
        if not await _load_models(catalog, supervisor, health, stop):
            return
        _start_store(store, path.residency, path.condition, health)
        path.loop.start()
        gc.collect()
        gc.freeze()  # what is there stays: to look through it for garbage would stop everybody, and torch's objects for 80 ms
        port = await server.start()
        _announce(settings, port, http.address, device, wire.name)
        metrics.build_info.labels(__version__, wire.name).set(1)
        metrics.wire.read, metrics.stage_seconds.written = wire.counters, wire.written

        signals.on_reload = lambda: supervisor.once("models reload", catalog.reload())
        path.run()
        supervisor.run("models watch", catalog.watch)
        if not isinstance(wire, GrpcioWire):
            supervisor.run("certificate watch", wire.watch_certificate)
        supervisor.run("tokens watch", lambda: tokens.watch(settings.tokens_poll_s))
        supervisor.run("descriptors", lambda: files.watch(port, path.handler.peers))
        await stop.wait()
        drain = Drain(wire, server, path.handler, path.streams, path.scheduler, path.advances, path.residency, path.condition,
                      supervisor)  # fmt: skip
        await drain.run(settings.drain_timeout_s)
    log.info("stopped")


def _wire(
    settings: Settings, access: Access, certificate: Certificate | None, connections_max: int
) -> GrpcioWire | NativeWire:  # fmt: skip
    """The wire that is asked for. Raises SettingError where it is not there."""
    if settings.wire != "python":
        try:
            from engram_service.wire.native import NativeWire

            return NativeWire(settings, access, certificate, connections_max)
        except ImportError as error:
            if settings.wire == "native":
                raise SettingError(f"wire = native: the extension engram_native is not here ({error})") from error
            log.warning(
                "the extension engram_native is not here (%s): connections are gRPC's own, which is slower", error
            )
    return GrpcioWire(settings, access)


def _take_over(
    wire: NativeWire, access: Access, server: Server, stream: StreamHandler, tokens: Tokens, supervisor: Supervisor
) -> None:
    """What the native wire does itself: it asks who calls, and brings unary steps."""
    from engram_service.protocols.engram.step_calls import StepCalls

    access.relayed = lambda: wire.callers
    stream.calls = StepCalls(wire, server.methods["Step"], supervisor)

    def changed() -> None:
        wire.tokens_changed()
        stream.tokens_changed()

    tokens.on_change = changed


async def _load_models(catalog: Catalog, supervisor: Supervisor, health: Health, stop: asyncio.Event) -> bool:
    """The first look at the models. What takes long goes on in the background, and the server is not ready until then.
    False: the server shall stop."""
    loading = supervisor.once("models load", catalog.reload())
    await catalog.begun(loading, stop)
    if stop.is_set():
        await supervisor.cancel()
        log.info("stopped while models were loaded")
        return False
    if loading.done():
        loading.result()
        return True
    health.fail("models", "some are still being loaded")
    loading.add_done_callback(lambda _: health.clear("models"))
    return True


def _register_cells(settings: Settings) -> None:
    """Turns on the plug-in cells that the operator named, and torch with them. Raises SettingError."""
    if not (names := settings.cell_names()):
        return
    try:
        from engram_models.plug_ins import PlugInError, register_cells
    except ImportError as error:
        raise SettingError(
            f"cells = {settings.cells!r}: plug-in cells need torch: pip install 'engram[torch]' ({error})"
        ) from error
    try:
        kinds = register_cells(names)
    except PlugInError as error:
        raise SettingError(f"cells: {error}") from error
    log.info("plug-in cells: %s (kinds %s)", ", ".join(names), ", ".join(kinds))


def _leave(loader: Loader, signals: Signals) -> None:
    """The last of all: what is in an operator of a model, and cannot be stopped, would keep the process from its end."""
    deadline = time.monotonic() + _STOP_GRACE_S  # what was told to stop may be about to
    while left := loader.watchdog.running():
        if time.monotonic() > deadline:
            signals.leave_behind(left)
        time.sleep(_LOOK_S)


def _announce(settings: Settings, port: int, http: str, device: Device, wire: str) -> None:
    where = (settings.listen, port, http, device.name, wire)
    log.info("engram %s serves on %s (port %d), metrics on %s, device %s, %s wire", __version__, *where)
    for exposure in settings.exposures():
        log.warning("%s", exposure)


async def _store(
    settings: Settings, stack: AsyncExitStack, supervisor: Supervisor, health: Health, signals: Signals
) -> Store:
    url, ack, appendfsync = settings.redis_url, settings.redis_ack, settings.redis_appendfsync
    if not url:
        if ack == "disk":  # the private Redis, be it as old as it may, then answers after it has synced
            ack, appendfsync = "memory", "always"
        private = PrivateRedis(
            PrivateSettings(settings.data_directory(), appendfsync, settings.redis_maxmemory_mb), supervisor
        )
        signals.at_once.append(private.leave)
        await asyncio.to_thread(private.start)
        stack.callback(private.stop)
        url = private.url
    tls = TlsFiles(settings.redis_tls_ca, settings.redis_tls_cert, settings.redis_tls_key)
    wanted = StoreSettings(
        url, ack, settings.redis_replicas, settings.redis_ack_timeout_ms, settings.redis_connections, tls,
        settings.require_safe_redis, settings.wire != "python",
    )  # fmt: skip
    store = Store(wanted, supervisor, health)
    stack.callback(store.close)
    return store


def _start_store(store: Store, residency: Residency, condition: Condition, health: Health) -> None:
    """Its threads tell the event loop."""
    loop = asyncio.get_running_loop()

    def on_trouble(why: str) -> None:
        health.tell("redis", why, 0 if health.failures() else _REDIS_GRACE_S)
        loop.call_soon_threadsafe(condition.set_trouble, why)

    def on_loss() -> None:
        residency.lost_data()
        loop.call_soon_threadsafe(residency.write_back)

    store.on_trouble, store.on_loss = on_trouble, on_loss
    store.writing_back = lambda: residency.writing_back
    store.start()


def _expose(
    metrics: Metrics, table: SessionTable, catalog: Catalog, streams: Streams, store: Store, memories: Memories,
    device: Device,
) -> None:  # fmt: skip
    """Gauges that are read when somebody scrapes."""
    metrics.read_with(metrics.memory_cache_bytes, lambda: memories.cache.nbytes)

    def resident() -> int:
        return int((table.slot[: table.high] != NO_SLOT).sum())

    metrics.read_with(metrics.sessions, resident, "device")
    metrics.read_with(metrics.sessions, lambda: len(table) - resident(), "stored")
    metrics.read_with(metrics.rows_in_flight, lambda: streams.in_flight)
    metrics.read_with(metrics.streams, lambda: len(streams))
    metrics.read_with(metrics.redis_memory_bytes, lambda: store.used_memory_bytes)
    metrics.read_with(metrics.redis_expired_keys, lambda: store.expired_keys)
    metrics.read_with(metrics.redis_losses, lambda: store.losses)
    for reason in UNSAFE:
        metrics.read_with(metrics.redis_unsafe, partial(store.unsafe_as_to, reason), reason)
    metrics.redis_up.set(1)

    def arenas() -> int:
        return sum(
            served.arena.resident * (served.arena.state_nbytes + served.arena.window * served.arena.output_nbytes)
            for served in catalog.models
        )

    if not device.is_cpu:
        metrics.read_with(metrics.device_memory_bytes, device.memory_allocated, device.name)
    else:
        metrics.read_with(metrics.device_memory_bytes, arenas, device.name)
