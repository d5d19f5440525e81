"""A server's core without Redis, engine and network: models, sessions and streams as they are when bytes come in."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engram_models import LSTM, Hopfield, load_bundle, write_bundle
from engram_service.api.access import Access
from engram_service.api.audit import Audit
from engram_service.api.stream import StreamHandler, _Guest
from engram_service.api.unary import UnaryHandlers
from engram_service.catalog import Catalog, Served
from engram_service.core import Core
from engram_service.health import Health
from engram_service.memory.memories import Memories
from engram_service.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.queries import Queries
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.onnx_graphs import OnnxGraphs
from engram_service.runtimes.watchdog import Watchdog
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.ending import Endings
from engram_service.sessions.holds import Holds
from engram_service.sessions.opening import Sessions
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import SessionTable
from engram_service.settings import Settings
from engram_service.store import RecordLayout, Store, StoreSettings
from engram_service.supervision import Supervisor
from engram_service.tokens import Caller, Limits, Tokens
from engram_service.work import WorkQueue

SLOTS, WINDOW = 16, 8


@dataclass(frozen=True, slots=True)
class World:
    """The parts that targets call."""

    loop: asyncio.AbstractEventLoop
    core: Core
    frames: StreamHandler
    unary: UnaryHandlers
    memories: Memories
    stream: Stream
    other: Stream  # whose sessions nobody else may touch
    lstm: Served
    hopfield: Served


@functools.cache
def world() -> World:
    """Made once for a process; `frames.py` puts the sessions back after every input."""
    return asyncio.new_event_loop().run_until_complete(_made())


async def _made() -> World:
    metrics, table = Metrics(), SessionTable()
    settings = Settings(shipped_models=False)
    catalog = Catalog(settings, None, metrics)  # type: ignore[arg-type]
    torch.manual_seed(5)
    patterns = np.random.default_rng(3).choice([-1, 1], (3, 20))
    with tempfile.TemporaryDirectory() as scratch:
        for cell in (LSTM(4, 6, output_size=4), Hopfield.of(patterns, ["a", "b", "c"])):
            _serve(catalog, write_bundle(Path(scratch), cell.kind, "1", cell))
    store = Store(StoreSettings("unix:///nowhere", "memory", 0, 100, 1))
    shares, supervisor = Shares(lambda tenant: Limits()), Supervisor(metrics, Health())
    pauses = Pauses(metrics, Health())
    queue = WorkQueue(table, lambda model: 512, 8, 1, pauses)
    core = Core(settings, table, queue, catalog, store, metrics, shares, supervisor, pauses)
    calls, holds = StoreCalls(core), Holds(core)
    sessions, endings = Sessions(core, store, calls, holds), Endings(core, store, calls, holds)
    memories = Memories(catalog.resolve, store, 1 << 20)
    unary = UnaryHandlers(core, sessions, endings, calls, store, None, memories, "cpu")  # type: ignore[arg-type]
    frames = StreamHandler(core, sessions, endings, Access(Tokens(None), Audit(metrics)))
    stream, other = core.connect(), core.connect()
    for one in (stream, other):
        frames._guests[one] = _Guest(Caller("", "", frozenset()), "")
    return World(asyncio.get_running_loop(), core, frames, unary, memories, stream, other, *catalog.models)


def _serve(catalog: Catalog, path: Path) -> None:
    """As the catalog does, but for the probe and the graph: no step is run here."""
    bundle = load_bundle(path)
    runtime = OnnxGraphs(Arena(bundle, SLOTS, WINDOW), None, Watchdog())  # type: ignore[arg-type]
    layout = RecordLayout(bundle.fingerprint, bundle.state_nbytes, bundle.schema.output_nbytes, runtime.code)
    served = Served(len(catalog.models), bundle, runtime, layout, Queries(bundle), 512)
    catalog.models.append(served)
    catalog._by_key[bundle.name, bundle.version] = served
    catalog._versions[bundle.name] = [bundle.version]
