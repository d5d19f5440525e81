"""The parts between wire and store, made in the order in which they need each other, and wired by constructors. Made by
data_process.py.

All of them live on the event loop; steps/loop.py says how a step goes through them.
"""

from __future__ import annotations

from functools import partial

from engram_service.auth.access import Access
from engram_service.catalog import Catalog
from engram_service.condition import Condition
from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.protocols.engram.stream import StreamHandler
from engram_service.protocols.engram.unary_stream import UnaryStream
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.ending import Endings
from engram_service.sessions.holds import Holds
from engram_service.sessions.opening import Sessions
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Streams
from engram_service.sessions.table import Reference, SessionTable
from engram_service.settings import Settings
from engram_service.steps.admission import Admission
from engram_service.steps.advance import Advances
from engram_service.steps.answers import Answers
from engram_service.steps.backlog import Backlog
from engram_service.steps.commits import Commits
from engram_service.steps.deadlines import Deadlines
from engram_service.steps.flushes import Flushes
from engram_service.steps.loop import StepLoop
from engram_service.steps.repeats import Repeats
from engram_service.steps.rollback import Rollback
from engram_service.steps.unary_rows import UnaryRows
from engram_service.steps.withdrawal import Withdrawal
from engram_service.store import MetaFields, Store
from engram_service.supervision import Supervisor
from engram_service.wire.base import Wire


class DataPath:
    """Those that others ask for are attributes."""

    def __init__(
        self, settings: Settings, table: SessionTable, catalog: Catalog, store: Store, wire: Wire, access: Access,
        shares: Shares, supervisor: Supervisor, metrics: Metrics, health: Health,
    ) -> None:  # fmt: skip
        self._supervisor = supervisor
        self.condition = condition = Condition(metrics)
        table.counted = shares.count_sessions
        self.scheduler = scheduler = Scheduler(settings.batch_run_max)
        self.advances = advances = Advances()
        self.streams = streams = Streams(wire, shares, settings.streams_max)
        self.pins = pins = Pins(table, condition.late)
        pauses, backlog = Pauses(metrics, health), Backlog()
        unary = UnaryRows(wire, streams, table, shares)
        answers = Answers(wire, streams, table, metrics, unary)
        commits = Commits(store, table, metrics, partial(_meta, table, catalog))
        flushes = Flushes(table, commits)
        self.residency = residency = Residency(
            settings, table, catalog, store, pins, condition, supervisor, metrics, flushes.add, answers.durable
        )  # fmt: skip
        repeats = Repeats(table, catalog, answers, residency, pins, condition, supervisor)
        withdrawal = Withdrawal(scheduler, table, answers, repeats, condition)
        rollback = Rollback(table, pins, residency, repeats, withdrawal, answers, metrics)
        ownership = Ownership(table, wire, streams, pins, residency, repeats, withdrawal, metrics)
        residency.losses, flushes.on_flushed = ownership, residency.on_flushed
        admission = Admission(
            settings, table, catalog, wire, streams, shares, scheduler, residency, repeats, answers, condition, pauses,
            metrics, backlog, advances, unary,
        )  # fmt: skip
        self.calls = StoreCalls(residency.written_back)
        self.holds = holds = Holds(table, pins, residency, ownership, condition)
        self.sessions = Sessions(
            settings, table, catalog, store, self.calls, holds, residency, ownership, shares, condition, supervisor, metrics
        )  # fmt: skip
        self.endings = Endings(
            settings, table, store, self.calls, holds, pins, residency, ownership, condition, supervisor, metrics
        )  # fmt: skip
        self.handler = StreamHandler(
            settings, wire, streams, catalog, admission, self.sessions, self.endings, ownership, shares, access, condition,
            supervisor,
        )  # fmt: skip
        self.loop = StepLoop(
            wire, self.handler.event, admission, scheduler, catalog, table, commits, flushes, answers, advances, repeats,
            residency, pins, ownership, withdrawal, rollback, pauses, metrics,
        )  # fmt: skip
        self._deadlines = Deadlines(
            scheduler, advances, repeats, withdrawal, answers, table, condition, pauses, backlog
        )  # fmt: skip
        self.unary = UnaryStream(
            settings, table, catalog, streams, admission, self.sessions, residency, shares, condition
        )
        answers.local = self.unary

    def run(self) -> None:
        """What goes on all the time."""
        self._supervisor.run("deadlines", self._deadlines.sweep)
        self._supervisor.run("residency", self.residency.beat)
        self._supervisor.run("unary tidy", self.unary.tidy)


def _meta(table: SessionTable, catalog: Catalog, session: Reference) -> MetaFields | None:
    """What the hash of a session holds; for the store, from a committer thread: the session is pinned."""
    if (row := table.row_of(session)) is None:
        return None
    served = catalog.models[int(table.model[row])]
    return MetaFields(table.id_of(row), served.reference, served.bundle.fingerprint, int(table.client_id[row]),
                      int(table.epoch[row]), int(table.created_ms[row]), int(table.losses[row]))  # fmt: skip
