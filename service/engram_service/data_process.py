"""A data process: connections, sessions and their steps. The manager starts it (manager/spawning.py).

Its thread runs the step loop (steps/loop.py). What is no step is the manager's, which asks for what only this process knows
(control/verbs.py). It ends when the manager does.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from engram import __version__
from engram_service.auth import tls
from engram_service.auth.access import Access
from engram_service.auth.audit import Audit
from engram_service.auth.tokens import Tokens, heard
from engram_service.catalog import Catalog
from engram_service.control.channel import Channel, first, framed
from engram_service.control.health import tell_health
from engram_service.control.verbs import Verbs
from engram_service.data_path import DataPath
from engram_service.descriptors import Descriptors
from engram_service.draining import Drain
from engram_service.manager.spawning import handed_over
from engram_service.observability.health import Health
from engram_service.observability.logs import set_up
from engram_service.observability.metrics import Metrics
from engram_service.protocols.engram.fronts import Front, front_of
from engram_service.protocols.engram.step import StepHandler
from engram_service.runtimes.devices import Device, device_of
from engram_service.runtimes.loader import Loader
from engram_service.sessions.counts import Column, Page
from engram_service.sessions.shares import Shares
from engram_service.sessions.table import NO_SLOT, SessionTable
from engram_service.settings import SettingError, Settings
from engram_service.signals import Signals
from engram_service.store import Store, StoreError, StoreSettings
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002  # other threads share the interpreter: the event loop may not wait long for it
_STOP_GRACE_S = 1.0
_LOOK_S = 0.05
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Its arguments are the manager's process and the file of the control socket."""
    manager, control = map(int, arguments)
    _end_with(manager)
    end = socket.socket(fileno=control)
    last = end.dup()  # for what is to be said when the loop has closed its own
    try:
        page, listeners = handed_over(end)
        begin = first(end)
    except EOFError:
        return 1
    settings, column = Settings(**begin["settings"]), Page(page).column(begin["process"])
    os.close(page)
    set_up(settings.log_level, settings.log_format)
    try:
        with asyncio.Runner(loop_factory=_loop_factory(native=bool(listeners))) as runner:
            runner.run(_serve(settings, begin, end, column, listeners))
    except (SettingError, StoreError, OSError) as error:
        kind = {SettingError: "setting", StoreError: "store"}.get(type(error), "system")
        last.setblocking(True)
        last.sendall(framed({"verb": "failed", "with": {"kind": kind, "message": str(error)}}))
        return 1
    return 0


def _end_with(manager: int) -> None:
    """The kernel ends this process when the manager's ends, also where the loop cannot see that its socket is closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != manager:
        os._exit(1)


def _loop_factory(native: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's, where it is here: a turn of the step loop costs less on it. The fallback's gRPC does not go well with it
    (docs/sdk.md)."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if native:
        with suppress(ImportError):  # it has no wheel for this platform
            import uvloop

            factory = uvloop.new_event_loop
    return factory


async def _serve(
    settings: Settings, begin: dict[str, Any], end: socket.socket, column: Column, listeners: Sequence[socket.socket]
) -> None:
    """Serves until SIGTERM, then drains. Raises SettingError, StoreError or OSError if it cannot start."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        metrics, health = Metrics(), Health()
        supervisor = Supervisor(metrics, health)
        supervisor.watch_loop(asyncio.get_running_loop())
        files = Descriptors(metrics, health)
        streams_max, settings = settings.streams_max, files.fitted(settings)  # of the whole server, and of this process
        device = device_of(settings.device)
        loader = Loader(settings, device)
        signals = Signals(stop, settings.drain_timeout_s, loader.watchdog.running)
        stack.callback(_leave, loader, signals)
        tokens = Tokens(heard(begin["tokens"]))
        shares = Shares(tokens.limits, tokens.number_of, column, streams_max, settings.sessions_max)
        access = Access(tokens, Audit(metrics))
        store = Store(StoreSettings.of(settings), supervisor, health, watches=False)
        stack.callback(store.close)
        table = SessionTable()
        _register_cells(settings)
        catalog = Catalog(settings, loader, metrics)
        stack.callback(catalog.close)
        pems = None if begin["certificate"] is None else tls.heard(begin["certificate"])
        front = front_of(settings, access, pems, files.connections_max, begin["relay"], listeners)
        path = DataPath(settings, table, catalog, store, front.wire, access, shares, supervisor, metrics, health)
        stack.callback(path.sessions.close)
        step = StepHandler(settings, catalog, store, path.calls, path.unary)
        tokens.on_change = path.handler.tokens_changed
        front.connect(step.step, path.handler, supervisor)

        channel = _channel(path, table, store, metrics, catalog, tokens, front, supervisor)
        supervisor.once("control", _until_gone(channel, end))
        tell_health(health, channel.tell)
        catalog.ask = partial(channel.call, "examine")
        catalog.on_change = lambda: channel.tell("models", models=_models(catalog))
        _expose(metrics, table, catalog, path, store, device)

        supervisor.thread("graphs watch", loader.watchdog.look, loader.watchdog.stopped).start()
        await channel.there.wait()
        if not await _load_models(catalog, supervisor, health, stop):
            return
        _start_store(store, path, channel)
        path.loop.start()
        gc.collect()
        gc.freeze()  # what is there stays: to look through it for garbage would stop everybody, and torch's objects for 80 ms
        port = await front.start()
        metrics.build_info.labels(__version__, front.wire.name).set(1)
        metrics.wire.read, metrics.stage_seconds.written = front.wire.counters, front.wire.written
        await channel.call("models", models=_models(catalog))
        channel.tell("ready", port=port, device=device.name, wire=front.wire.name)

        path.run()
        supervisor.run("tokens expiry", lambda: tokens.expire(settings.tokens_poll_s))
        supervisor.run("descriptors", lambda: files.watch(port, path.handler.peers))
        await stop.wait()
        drain = Drain(front, path.handler, path.streams, path.scheduler, path.advances, path.residency, path.condition,
                      supervisor)  # fmt: skip
        await drain.run(settings.drain_timeout_s)


def _channel(
    path: DataPath, table: SessionTable, store: Store, metrics: Metrics, catalog: Catalog, tokens: Tokens, front: Front,
    supervisor: Supervisor,
) -> Channel:  # fmt: skip
    async def reload() -> dict[str, Any]:
        errors = await catalog.reload()
        await channel.call("models", models=_models(catalog))
        return {"errors": errors, "again": catalog.passing}

    async def on_tokens(**told: Any) -> None:
        if (book := heard(told["tokens"])) is not None:
            tokens.replace(book)

    async def on_certificate(certificate: list[str | None]) -> None:
        front.certify(tls.heard(certificate))

    async def on_health(**told: Any) -> None:
        front.hear(told)

    verbs = Verbs(table, store, path.holds, path.pins, path.residency, metrics, reload)
    names = ("ping", "holds", "flush", "release", "dismiss", "reload", "metrics", "written_back")
    told = {"tokens": on_tokens, "certificate": on_certificate, "health": on_health}
    channel = Channel(supervisor, {name: getattr(verbs, name) for name in names} | told)
    return channel


async def _until_gone(channel: Channel, end: socket.socket) -> None:
    """A process without a manager is nobody's: what was accepted may be sent again."""
    end.setblocking(False)
    await channel.run(end)
    log.warning("the manager is gone")
    os._exit(1)


def _models(catalog: Catalog) -> list[dict[str, str]]:
    """What the manager is told of the models."""
    return [
        {
            "path": str(served.bundle.path),
            "description": base64.b64encode(catalog.describe(served).SerializeToString()).decode(),
        }
        for served in catalog.models
    ]


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


def _start_store(store: Store, path: DataPath, channel: Channel) -> None:
    """Its threads tell the event loop."""
    loop = asyncio.get_running_loop()
    residency = path.residency

    def on_trouble(why: str) -> None:
        loop.call_soon_threadsafe(path.condition.set_trouble, why)

    def write_back() -> None:
        channel.tell("writing_back", now=True)
        residency.write_back()

    def on_loss() -> None:
        residency.lost_data()
        loop.call_soon_threadsafe(write_back)

    store.on_trouble, store.on_loss = on_trouble, on_loss
    store.writing_back = lambda: residency.writing_back
    store.start()


def _expose(
    metrics: Metrics, table: SessionTable, catalog: Catalog, path: DataPath, store: Store, device: Device
) -> None:  # fmt: skip
    """Gauges that are read when somebody scrapes."""

    def resident() -> int:
        return int((table.slot[: table.high] != NO_SLOT).sum())

    def arenas() -> int:
        return sum(
            served.arena.resident * (served.arena.state_nbytes + served.arena.window * served.arena.output_nbytes)
            for served in catalog.models
        )

    metrics.read_with(metrics.sessions, resident, "device")
    metrics.read_with(metrics.sessions, lambda: len(table) - resident(), "stored")
    metrics.read_with(metrics.rows_in_flight, lambda: path.streams.in_flight)
    metrics.read_with(metrics.streams, lambda: len(path.streams))
    metrics.redis_up.set(1)
    metrics.read_with(metrics.redis_losses, lambda: store.losses)
    metrics.read_with(metrics.device_memory_bytes, arenas if device.is_cpu else device.memory_allocated, device.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
