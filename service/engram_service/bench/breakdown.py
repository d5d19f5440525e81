"""`engram bench --breakdown`: where the time of one step goes, by the server's own clock, beside what the client measured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from engram_service.bench.drive import BenchError, Load, Options, drive, specs_of, target
from engram_service.bench.types import Progress
from engram_service.observability.stages import STAGES
from engram_service.top.figures import quantile

SESSIONS = (1, 64, 1024)
PARTS = tuple(stage for stage in STAGES if stage != "total")  # in their order; they follow one another without a gap
_METRIC = "engram_stage_seconds"
_HEAD = ("stage", "mean µs", "p50 µs", "p99 µs", "of the step")


@dataclass(frozen=True)
class Span:
    """A part of the time of a step. The mean is exact; p50 and p99 are interpolated in the buckets of the server's histogram."""

    mean_us: float
    p50_us: float | None
    p99_us: float | None
    share: float  # of the mean that the client measured


@dataclass(frozen=True)
class Breakdown:
    """Steps of so many sessions, each in a closed loop. What `stages` leave of `client` is `rest`: the client and the kernel."""

    sessions: int
    connections: int
    durability: str
    steps: int
    steps_per_s: float
    rows_per_batch: float
    stages: dict[str, Span]
    total: Span  # of the server until the wire has the answer: all stages but wire_out
    rest: Span
    client: Span

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def breakdowns(options: Options, counts: Sequence[int], progress: Progress) -> list[Breakdown]:
    """One for each number of sessions, each on its own connection unless the options say how many there are. Raises BenchError."""
    if options.address and not options.http:
        raise BenchError("--breakdown reads the metrics of the server: give --http with --address")
    each = []
    for count in counts:
        connections = min(options.connections, count) or count
        processes = min(options.processes, max(1, connections))
        each.append(replace(options, sessions=count, connections=connections, processes=processes))
    with target(each[0], progress) as server:
        found = []
        for one in each:
            specs = specs_of(one, server)
            load = asyncio.run(drive(one, specs, server.http, progress))
            found.append(of_load(one.sessions, sum(spec.connections for spec in specs), one.durability, load))
        return found


def of_load(sessions: int, connections: int, durability: str, load: Load) -> Breakdown:
    grown = {name: value - load.before.get(name, 0.0) for name, value in load.after.items()}
    steps = grown.get(f"{_METRIC}_count:total", 0.0)
    if not steps:
        raise BenchError("the server has answered no step in the window")
    client = Span(1000 * load.mean_ms, 1000 * load.p50_ms, 1000 * load.p99_ms, 1.0)

    def span(stage: str) -> Span:
        # Steps without a stage spend nothing in it. What the wire has written it counts by itself.
        count = grown.get(f"{_METRIC}_count:{stage}", 0.0)
        mean = 1e6 * grown.get(f"{_METRIC}_sum:{stage}", 0.0) / ((count if stage == "wire_out" else steps) or 1.0)
        prefix = f"{_METRIC}_bucket:{stage}:"
        edges = {float(name.removeprefix(prefix)): value for name, value in grown.items() if name.startswith(prefix)}
        p50, p99 = (1e6 * quantile(edges, part) if count and edges else None for part in (0.5, 0.99))
        return Span(mean, p50, p99, mean / client.mean_us)

    stages = {stage: span(stage) for stage in PARTS}
    rest = client.mean_us - sum(one.mean_us for one in stages.values())
    return Breakdown(
        sessions=sessions, connections=connections, durability=durability, steps=load.steps,
        steps_per_s=load.steps / load.seconds,
        rows_per_batch=grown["engram_batch_rows_sum"] / max(1.0, grown["engram_batch_rows_count"]), stages=stages,
        total=span("total"), rest=Span(rest, None, None, rest / client.mean_us), client=client,
    )  # fmt: skip


def text(found: Sequence[Breakdown]) -> str:
    """A table for each."""
    return "\n\n".join("\n".join(_lines(one)) for one in found)


def _lines(one: Breakdown) -> list[str]:
    sessions = "1 session" if one.sessions == 1 else f"{one.sessions:,} sessions"
    connections = "1 connection" if one.connections == 1 else f"{one.connections:,} connections"
    rows = [("client and kernel", one.rest), ("as the client measured", one.client)]
    cells = [_HEAD, *((name, *_cells(span)) for name, span in [*one.stages.items(), *rows])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    return [
        f"{sessions} over {connections}, durability {one.durability}: {one.steps_per_s:,.0f} steps/s, "
        f"{one.rows_per_batch:,.1f} rows a batch",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells),
    ]


def _cells(span: Span) -> tuple[str, str, str, str]:
    p50, p99 = ("" if value is None else f"{value:,.0f}" for value in (span.p50_us, span.p99_us))
    return f"{span.mean_us:,.1f}", p50, p99, f"{span.share:.1%}"
