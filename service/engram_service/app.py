"""The composition root of the manager, which is `engram serve`: makes every part, wires it by constructors, runs until told to
stop, and takes it down in order. The data process has its own (data_process.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from engram import __version__
from engram_service.auth import tls
from engram_service.auth.access import Access
from engram_service.auth.audit import Audit
from engram_service.auth.tls import Certificate
from engram_service.auth.tokens import TokensFile, told
from engram_service.control.health import tell_health
from engram_service.examiner import Examiner
from engram_service.manager.data_process import DataProcess, Ready
from engram_service.manager.listeners import bound
from engram_service.manager.metrics import Gathered
from engram_service.manager.models import watch_models
from engram_service.manager.spawning import Spawned
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.offers import Offers
from engram_service.patterns.memories import Memories
from engram_service.protocols.engram.memory import MemoryHandlers
from engram_service.protocols.engram.server import Server
from engram_service.protocols.engram.unary import UnaryHandlers
from engram_service.protocols.http.server import HttpServer
from engram_service.runtimes import devices
from engram_service.sessions import counts
from engram_service.sessions.calls import StoreCalls
from engram_service.settings import SettingError, Settings
from engram_service.signals import Signals
from engram_service.store import UNSAFE, Store, StoreSettings
from engram_service.store.private import PrivateRedis, PrivateSettings
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_PROCESSES = 1  # that have connections
_STOP_GRACE_S = 1.0
_CERTIFICATE_S = 0.25  # between looks at the files


async def serve(settings: Settings, spawned: Spawned) -> None:
    """Serves until SIGTERM or SIGINT, then drains. `spawned`: the data process. Raises SettingError, StoreError or OSError if it
    cannot start."""
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.callback(spawned.stop)
        metrics, health = Metrics(), Health()
        supervisor = Supervisor(metrics, health)
        supervisor.watch_loop(asyncio.get_running_loop())
        health.fail("server", "it is starting")
        gathered = Gathered(metrics)
        http = HttpServer(settings, gathered, metrics, health, supervisor)
        stack.callback(http.stop)
        signals = Signals(stop, settings.drain_timeout_s, list)
        tokens = TokensFile(Path(settings.tokens_file) if settings.tokens_file else None)
        certificate = Certificate.of(settings)
        devices.check(settings.device)
        listeners = bound(settings) if _wire(settings) == "native" else []
        for listener in listeners:
            stack.callback(listener.close)
        page = counts.made(_PROCESSES)
        stack.callback(os.close, page)
        relay = _relay(stack)
        running = await _with_redis(settings, stack, supervisor, signals)
        store = Store(StoreSettings.of(running), supervisor, health)
        stack.callback(store.close)
        examiner = Examiner(settings)
        stack.callback(examiner.stop)
        offers = Offers(examiner.taken)
        begin = _begin(running, relay, tokens, certificate)
        data = DataProcess(
            spawned, begin, page, listeners, settings.cache_directory() / "crashes", offers, examiner, health, supervisor
        )  # fmt: skip
        stack.callback(data.kill)
        signals.at_once.append(data.kill)
        gathered.data = data
        access = Access(tokens.tokens, Audit(metrics), relayed=True)
        memories = Memories(offers.resolve, store, settings.memory_cache_mb << 20)
        calls = StoreCalls(data.written_back)
        handlers = UnaryHandlers(
            settings, offers, tokens.tokens, supervisor, data, calls, store, memories, metrics
        )  # fmt: skip
        memory_handlers = MemoryHandlers(settings, offers, metrics, calls, handlers, memories)
        for pools in (memory_handlers, handlers):
            stack.callback(pools.close)
        server = Server(settings, access, health, handlers, memory_handlers)
        await server.start(relay)
        _expose(metrics, store, memories)
        _start_store(store, data)

        for exposure in settings.exposures():  # said before anybody can come
            log.warning("%s", exposure)
        supervisor.run("data process", data.run)
        if (ready := await _ready(data, stop)) is None:
            await data.stop(0.0)
            return
        health.clear("server")
        _announce(settings, http.address, ready)
        _watch(settings, data, ready, tokens, certificate, signals, health, supervisor)
        await stop.wait()
        log.info("draining")
        health.fail("server", "it is going away")
        deadline = time.monotonic() + settings.drain_timeout_s
        await data.stop(settings.drain_timeout_s)
        await handlers.finish(deadline)
        await server.stop(_STOP_GRACE_S)
        await supervisor.cancel()
    log.info("stopped")


def _watch(
    settings: Settings, data: DataProcess, ready: Ready, tokens: TokensFile, certificate: Certificate | None, signals: Signals,
    health: Health, supervisor: Supervisor,
) -> None:  # fmt: skip
    """What goes on all the time: files are looked after, and what is new in them is told to the data process."""
    data.begin["settings"]["listen"] = f"{settings.listen.rpartition(':')[0]}:{ready.port}"  # of the next one too
    look = asyncio.Event()
    signals.on_reload = look.set
    supervisor.run("models watch", lambda: watch_models(settings, data, look))
    supervisor.run("tokens watch", lambda: tokens.watch(settings.tokens_poll_s))
    tokens.tokens.on_change = lambda: data.renew("tokens", told(tokens.tokens.book))
    if certificate is not None:
        supervisor.run("certificate watch", lambda: _watch_certificate(certificate, data))
    if ready.wire == "python":
        tell_health(health, data.tell)  # the fallback answers for gRPC's health itself


def _wire(settings: Settings) -> str:
    """The wire that is to be used. Raises SettingError where it is not there."""
    if settings.wire == "python":
        return "python"
    try:
        import engram_service.wire.native  # noqa: F401
    except ImportError as error:
        if settings.wire == "native":
            raise SettingError(f"wire = native: the extension engram_native is not here ({error})") from error
        log.warning("the extension engram_native is not here (%s): connections are gRPC's own, which is slower", error)
        return "python"
    return "native"


def _relay(stack: AsyncExitStack) -> str:
    """The path of the private socket that calls are relayed to."""
    folder = tempfile.mkdtemp(prefix="engram-")  # only its owner may enter
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return os.path.join(folder, "calls")


def _begin(settings: Settings, relay: str, tokens: TokensFile, certificate: Certificate | None) -> dict[str, Any]:
    """What a data process is told first."""
    return {
        "process": 0,
        "settings": asdict(settings),
        "relay": relay,
        "tokens": told(tokens.tokens.book),
        "certificate": None if certificate is None else tls.told(certificate.pems),
    }


async def _ready(data: DataProcess, stop: asyncio.Event) -> Ready | None:
    """None: the server shall stop. Raises what the data process cannot be started for."""
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    await asyncio.wait((stopping, data.ready), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return data.ready.result() if data.ready.done() else None


async def _watch_certificate(certificate: Certificate, data: DataProcess) -> None:
    """Reads certificate and key again when they have changed; runs until cancelled."""
    while True:
        await asyncio.sleep(_CERTIFICATE_S)
        if await asyncio.to_thread(certificate.fetch) is not None:
            data.renew("certificate", tls.told(certificate.pems))


def _announce(settings: Settings, http: str, ready: Ready) -> None:
    where = (settings.listen, ready.port, http, ready.device, ready.wire)
    log.info("engram %s serves on %s (port %d), metrics on %s, device %s, %s wire", __version__, *where)


async def _with_redis(
    settings: Settings, stack: AsyncExitStack, supervisor: Supervisor, signals: Signals
) -> Settings:  # fmt: skip
    """The settings with a Redis: a private one is started where none is given. Raises StoreError."""
    if settings.redis_url:
        return settings
    ack, appendfsync = settings.redis_ack, settings.redis_appendfsync
    if ack == "disk":  # the private Redis, be it as old as it may, then answers after it has synced
        ack, appendfsync = "memory", "always"
    private = PrivateRedis(
        PrivateSettings(settings.data_directory(), appendfsync, settings.redis_maxmemory_mb), supervisor
    )
    signals.at_once.append(private.leave)
    await asyncio.to_thread(private.start)
    stack.callback(private.stop)
    return replace(settings, redis_url=private.url, redis_ack=ack)


def _start_store(store: Store, data: DataProcess) -> None:
    """Its threads tell of themselves. Raises StoreError."""

    def on_loss() -> None:
        data.writing_back = True  # until the data process says that nothing is left

    store.on_loss = on_loss
    store.writing_back = lambda: data.writing_back
    store.start()


def _expose(metrics: Metrics, store: Store, memories: Memories) -> None:
    """Gauges that are read when somebody scrapes."""
    metrics.read_with(metrics.memory_cache_bytes, lambda: memories.cache.nbytes)
    metrics.read_with(metrics.redis_memory_bytes, lambda: store.used_memory_bytes)
    metrics.read_with(metrics.redis_expired_keys, lambda: store.expired_keys)
    for reason in UNSAFE:
        metrics.read_with(metrics.redis_unsafe, partial(store.unsafe_as_to, reason), reason)
