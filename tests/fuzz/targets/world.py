"""A server without Redis, models' steps and network: models, sessions and streams as they are when bytes come in.

The wire is the fallback's, to which nobody connects: frames are handed to it, and what it would write is looked at.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram.v1 import model_pb2
from engram_models import LSTM, Hopfield, load_bundle, write_bundle
from engram_service.auth.access import Access
from engram_service.auth.audit import Audit
from engram_service.auth.tokens import Caller, Tokens
from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.offers import Offer, Offers
from engram_service.patterns.memories import Memories
from engram_service.pauses import Pauses
from engram_service.protocols.engram.stream import StreamHandler
from engram_service.queries import Queries
from engram_service.runtimes.arena import Arena
from engram_service.runtimes.onnx_graphs import OnnxGraphs
from engram_service.runtimes.watchdog import Watchdog
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions import counts
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.ending import Endings
from engram_service.sessions.holds import Holds
from engram_service.sessions.opening import Sessions
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream, Streams
from engram_service.sessions.table import SessionTable
from engram_service.settings import Settings
from engram_service.steps.admission import Admission
from engram_service.steps.advance import Advances
from engram_service.steps.answers import Answers
from engram_service.steps.backlog import Backlog
from engram_service.steps.commits import Commits
from engram_service.steps.flushes import Flushes
from engram_service.steps.repeats import Repeats
from engram_service.steps.unary_rows import UnaryRows
from engram_service.steps.withdrawal import Withdrawal
from engram_service.store import RecordLayout, Store, StoreSettings
from engram_service.supervision import Supervisor
from engram_service.wire.base import Begin
from engram_service.wire.grpcio import GrpcioWire

SLOTS, WINDOW = 16, 8


@dataclass(frozen=True, slots=True)
class World:
    """The parts that targets call."""

    loop: asyncio.AbstractEventLoop
    settings: Settings
    table: SessionTable
    catalog: Catalog
    wire: GrpcioWire
    streams: Streams
    scheduler: Scheduler
    admission: Admission
    repeats: Repeats
    ownership: Ownership
    supervisor: Supervisor
    frames: StreamHandler
    memories: Memories
    stream: Stream
    other: Stream  # whose sessions nobody else may touch
    lstm: Served
    hopfield: Served
    offers: Offers

    def sent(self, stream: Stream) -> list[tuple[Any, int]]:
        """What the wire would write to a stream: each frame, and how many rows it answers."""
        return [(response, rows) for response, rows, _ in self.wire._calls[stream.id]._outbox]

    def under_way(self, stream: Stream) -> int:
        """Rows of a stream that the wire counts, but for those whose answers are about to be written."""
        return self.wire._calls[stream.id].under_way - sum(rows for _, rows in self.sent(stream))

    def forget_sent(self, stream: Stream) -> None:
        call = self.wire._calls[stream.id]
        call._outbox.clear()
        call.under_way = 0


@functools.cache
def world() -> World:
    """Made once for a process; `frames.py` puts the sessions back after every input."""
    return asyncio.new_event_loop().run_until_complete(_made())


async def _made() -> World:
    metrics, table = Metrics(), SessionTable()
    settings = Settings(shipped_models=False)
    catalog = Catalog(settings, None, metrics)  # type: ignore[arg-type]
    offers = Offers()
    torch.manual_seed(5)
    patterns = np.random.default_rng(3).choice([-1, 1], (3, 20))
    with tempfile.TemporaryDirectory() as scratch:
        for cell in (LSTM(4, 6, output_size=4), Hopfield.of(patterns, ["a", "b", "c"])):
            _serve(catalog, offers, write_bundle(Path(scratch), cell.kind, "1", cell))
    store = Store(StoreSettings("unix:///nowhere", "memory", 0, 100, 1))
    tokens, supervisor = Tokens(), Supervisor(metrics, Health())
    shares = Shares(tokens.limits, tokens.number_of, counts.alone(), settings.streams_max, settings.sessions_max)
    table.counted = shares.count_sessions
    access, condition, pauses = Access(tokens, Audit(metrics)), Condition(metrics), Pauses(metrics, Health())
    scheduler, pins, wire = Scheduler(8), Pins(table, condition.late), GrpcioWire(settings, access)
    streams = Streams(wire, shares, settings.streams_max)
    rows = UnaryRows(wire, streams, table, shares)
    answers = Answers(wire, streams, table, metrics, rows)
    flushes = Flushes(table, Commits(store, table, metrics, lambda session: None))
    residency = Residency(
        settings, table, catalog, store, pins, condition, supervisor, metrics, flushes.add, answers.durable
    )
    repeats = Repeats(table, catalog, answers, residency, pins, condition, supervisor)
    withdrawal = Withdrawal(scheduler, table, answers, repeats, condition)
    ownership = Ownership(table, wire, streams, pins, residency, repeats, withdrawal, metrics)
    residency.losses = ownership
    admission = Admission(
        settings, table, catalog, wire, streams, shares, scheduler, residency, repeats, answers, condition, pauses,
        metrics, Backlog(), Advances(), rows,
    )  # fmt: skip
    calls, holds = StoreCalls(residency.written_back), Holds(table, pins, residency, ownership, condition)
    sessions = Sessions(
        settings, table, catalog, store, calls, holds, residency, ownership, shares, condition, supervisor, metrics
    )
    endings = Endings(
        settings, table, store, calls, holds, pins, residency, ownership, condition, supervisor, metrics
    )  # fmt: skip
    frames = StreamHandler(
        settings, wire, streams, catalog, admission, sessions, endings, ownership, shares, access, condition, supervisor
    )
    memories = Memories(offers.resolve, store, 1 << 20)
    stream, other = (begun(wire, streams, frames) for _ in range(2))
    return World(
        asyncio.get_running_loop(), settings, table, catalog, wire, streams, scheduler, admission, repeats, ownership,
        supervisor, frames, memories, stream, other, *catalog.models, offers,
    )  # fmt: skip


def begun(wire: GrpcioWire, streams: Streams, frames: StreamHandler) -> Stream:
    """A client's stream, as one that comes over the network is made."""
    call = wire._begun()
    frames.event(Begin(call.id, Caller("", "", frozenset()), ""))
    stream = streams.get(call.id)
    assert stream is not None
    return stream


def _serve(catalog: Catalog, offers: Offers, path: Path) -> None:
    """As the catalog does, but for the probe and the graph: no step is run here."""
    bundle = load_bundle(path)
    runtime = OnnxGraphs(Arena(bundle, SLOTS, WINDOW), None, Watchdog())  # type: ignore[arg-type]
    layout = RecordLayout(bundle.fingerprint, bundle.state_nbytes, bundle.schema.output_nbytes, runtime.code)
    served = Served(len(catalog.models), bundle, runtime, layout, 512)
    catalog.models.append(served)
    catalog._by_key[bundle.name, bundle.version] = served
    catalog._versions[bundle.name] = [bundle.version]
    told = model_pb2.Model(name=bundle.name, version=bundle.version, fingerprint=bundle.fingerprint, latest=True)
    offers._of[bundle.name, bundle.version] = Offer(bundle, layout, Queries(bundle), told)
    offers._told.append(told)
