"""`make simulate`: a load on N servers and M Redis shards, with failures and a rolling update, calibrated by `engram bench`;
docs/results/scaling.json and .png, and the tables of docs/scaling.md.

A server is one of the first edition, with engine threads; each takes the rows that wait, at most `batch_rows_max`, computes them
and sends their records to the shards, and waits for these only when it has computed the next batch. A shard writes one record
after another. Times of batches, records and frames are lines through what `engram bench` measured (`Costs.measured`); before
anything else is said, the bench's own runs are simulated and compared with what it measured. Sessions step at their own rate,
whatever is answered. Rows are drawn at random; one seed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engram._json import json_text

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "docs" / "benchmarks" / "cpu-4-cores.json"
RESULT = ROOT / "docs" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
BIN_S = 0.001  # arrivals are put together in bins of so long
ROWS_MAX = 1024
LATENCY_S = 0.1  # a load is carried while its p99 is within this, and within which the simulated queues must stay
FULL = 1024  # sessions of the bench from which on the server is what is full
GROUPS = 4  # of sessions that the bench steps side by side
RECORD_S = (
    10.5e-6  # Redis's processor time for one of W's records: 10.0 to 11.1 µs, by 1,024 and 8,192 sessions of the bench
)
DETECT_S = 0.2  # from a server's death to the first answer elsewhere: docs/results/chaos.json, takeover
OPEN_S = 0.0003  # of a server, for each session that comes to it: 8,000 opens in 2.4 s (docs/operations.md)
HEADROOM = 0.6  # of what saturates: for a server that is missing, and for bursts
SERVER_SESSIONS = 1_000_000  # sessions_max
SESSION_NBYTES = 2_560  # of Redis, for a session of W: 20.6 MB for 8,192 in the bench
SHARD_GB = 12.0  # of a shard of 24 GB: the other half is for its copy while it saves
STEP_NBYTES = (
    276,
    76,
)  # a row of W to the server (handle, seq, acknowledged seq, 64 float32) and back (handle, seq, 16 float32)
RECORD_NBYTES = 2_300  # a record of W with its command
RESTART_S = 10.0  # of a server in a rolling update


@dataclass(frozen=True)
class Costs:
    """Seconds. Of a batch: a fixed part and one for each row, computed; what a row takes the thread besides, to be packed and
    sent. Of a shard: a record, and the way there and back. Of a step at the client and on the wire: a fixed part and one for
    each row of its call.
    """

    batch: tuple[float, float]
    send: float
    record: float
    way: float
    around: tuple[float, float]
    threads: int

    @classmethod
    def measured(cls, bench: dict[str, Any]) -> Costs:
        """Lines through the bench's batches of durability step, and that `send` with which those runs come out best that fill the
        server. Its clients, server and Redis shared a machine, so that these are more than what machines of their own would
        take."""
        runs = runs_of(bench)
        # Results of the first edition have the other name.
        rows = np.array([run["rows_per_batch"] if "rows_per_batch" in run else run["rows_per_tick"] for run in runs])
        calls = np.array([max(1, run["sessions"] // GROUPS) for run in runs])
        stage = {
            name: np.array([run["stage_ms"][name] for run in runs]) / 1000 for name in ("compute", "commit", "total")
        }
        outside = np.array([run["p50_ms"] for run in runs]) / 1000 - stage["total"]
        threads = max(1, int(bench["machine"]["cores"]) // 2)
        known = (
            _line(rows, stage["compute"]),
            RECORD_S,
            _line(rows, stage["commit"])[0],
            _line(calls, outside),
            threads,
        )

        def off(send: float) -> float:
            rates = [
                closed_loop(cls(known[0], send, *known[1:]), run["sessions"])[0] / run["steps_per_s"]
                for run in runs
                if run["sessions"] >= FULL
            ]
            return float(np.square(np.log(rates)).sum())

        return cls(known[0], min(np.arange(0, 21, 2) * 1e-6, key=off), *known[1:])


def runs_of(bench: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in bench["results"] if run["durability"] == "step" and run["connections"] <= 2]


def _line(x: Any, y: Any) -> tuple[float, float]:
    """Through the points, each counted by how much it is off in parts of itself."""
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    return max(1e-5, float(fixed)), float(slope)


@dataclass
class Server:
    sessions: float = 0.0
    up: bool = True
    waiting: deque[tuple[float, int]] = field(default_factory=deque)  # arrived, rows
    rows: int = 0  # waiting
    idle: list[int] = field(default_factory=list)  # threads
    written: list[float] = field(default_factory=list)  # by thread: when the records of its last batch are


class Cluster:
    """Servers and shards under a load; `step` goes on by a bin. Times are seconds from the beginning."""

    def __init__(
        self, costs: Costs, servers: int, shards: int, sessions: float, rate: float, seed: int = 1, bin_s: float = BIN_S
    ) -> None:  # fmt: skip
        self._costs = costs
        self._bin_s = bin_s
        self._draw = np.random.default_rng(seed)
        self.rate = rate
        self.servers = [
            Server(sessions / servers, idle=list(range(costs.threads)), written=[0.0] * costs.threads)
            for _ in range(servers)
        ]
        self._free_at = np.zeros(shards)  # of each shard
        self._events: list[
            tuple[float, int, int, int]
        ] = []  # when a thread has computed its batch: time, number, server, thread
        self._number = 0
        self.now = 0.0
        self.answers: list[tuple[float, float, int]] = []  # answered, took, rows
        self._coming: list[tuple[float, int, float]] = []  # when sessions open at a server: time, server, sessions
        self._held: list[
            tuple[float, int, float, int]
        ] = []  # rows of sessions without a server: when they go, where, arrived, rows

    def step(self) -> None:
        self.now += self._bin_s
        while self._coming and self._coming[0][0] <= self.now:
            _, place, sessions = heapq.heappop(self._coming)
            self.servers[place].sessions += sessions
        while self._held and self._held[0][0] <= self.now:
            _, place, arrived, rows = heapq.heappop(self._held)
            self.arrive(place, arrived, rows)
        for place, server in enumerate(self.servers):
            if server.up and server.sessions:
                self.arrive(place, self.now, int(self._draw.poisson(server.sessions * self.rate * self._bin_s)))
        while self._events and self._events[0][0] <= self.now:
            at, _, place, thread = heapq.heappop(self._events)
            if self.servers[place].up:
                self._take(place, thread, at)

    def leave(self, place: int, detect: float) -> None:
        """A server goes away: its sessions and what waits there go to the others, which open them one after another."""
        gone = self.servers[place]
        gone.up = False
        others = [number for number, server in enumerate(self.servers) if server.up]
        waiting, sessions = list(gone.waiting), gone.sessions
        gone.waiting.clear()
        gone.rows, gone.sessions = 0, 0.0
        pieces = 20
        for other in others:
            each = sessions / len(others)
            for piece in range(pieces):
                at = self.now + detect + each * OPEN_S * (piece + 1) / pieces
                heapq.heappush(self._coming, (at, other, each / pieces))
                # Each of these sessions steps on meanwhile: its steps wait at the client, evenly over the time.
                steps = each / pieces * self.rate * (at - self.now)
                for moment in np.linspace(self.now, at, 5)[:-1]:
                    heapq.heappush(self._held, (at, other, float(moment), int(self._draw.poisson(steps / 4))))
        for arrived, rows in waiting:
            for other in others:
                heapq.heappush(self._held, (self.now + detect, other, arrived, rows // len(others)))

    def join(self, place: int) -> None:
        """A server is back, with nothing to do until sessions are opened there."""
        server = self.servers[place]
        server.up, server.idle = True, list(range(self._costs.threads))
        server.written = [self.now] * self._costs.threads

    def stop_shard(self, shard: int, seconds: float) -> None:
        self._free_at[shard] = max(self._free_at[shard], self.now) + seconds

    def arrive(self, place: int, arrived: float, rows: int) -> None:
        server = self.servers[place]
        if not rows:
            return
        server.waiting.append((arrived, rows))
        server.rows += rows
        if server.up and server.idle:
            self._take(place, server.idle.pop(), self.now)

    def _take(self, place: int, thread: int, at: float) -> None:
        """A thread takes what waits, computes it, and its records go when those of its batch before are written."""
        server, costs = self.servers[place], self._costs
        if not server.rows:
            server.idle.append(thread)
            return
        room = min(ROWS_MAX, max(256, -(-server.rows // costs.threads)))
        taken: list[tuple[float, int]] = []
        while room and server.waiting:
            arrived, rows = server.waiting.popleft()
            part = min(rows, room)
            taken.append((arrived, part))
            room -= part
            if part < rows:
                server.waiting.appendleft((arrived, rows - part))
        count = sum(rows for _, rows in taken)
        server.rows -= count
        computed = at + costs.batch[0] + costs.batch[1] * count
        begun = max(computed, server.written[thread]) + costs.send * count
        done = begun
        for shard, rows in enumerate(
            self._draw.multinomial(count, np.full(len(self._free_at), 1 / len(self._free_at)))
        ):
            if rows:
                self._free_at[shard] = max(self._free_at[shard], begun) + costs.record * rows
                done = max(done, self._free_at[shard] + costs.way)
        server.written[thread] = done
        done += costs.around[0]
        self.answers += [(done, done - arrived, rows) for arrived, rows in taken]
        self._number += 1
        heapq.heappush(self._events, (begun, self._number, place, thread))


@dataclass(frozen=True)
class Second:
    rate: float
    p50: float
    p99: float


def seconds_of(answers: Sequence[tuple[float, float, int]], last: int) -> list[Second]:
    """What was answered in each second: steps, and the quantiles of how long they took."""
    at, took, rows = (np.array(column) for column in zip(*answers, strict=True))
    found = []
    for second in range(last):
        here = (at >= second) & (at < second + 1)
        order = np.argsort(took[here])
        share = np.cumsum(rows[here][order])
        if not len(share):
            found.append(Second(0.0, float("nan"), float("nan")))
            continue
        p50, p99 = (float(took[here][order][np.searchsorted(share, part * share[-1])]) for part in (0.5, 0.99))
        found.append(Second(float(share[-1]), p50, p99))
    return found


def run(cluster: Cluster, seconds: int, at: dict[float, Callable[[], None]] | None = None) -> list[Second]:
    due = sorted((at or {}).items())
    while cluster.now < seconds:
        while due and due[0][0] <= cluster.now:
            due.pop(0)[1]()
        cluster.step()
    return seconds_of(cluster.answers, seconds)


def carried(costs: Costs, servers: int, shards: int) -> float:
    """The most steps a second whose p99 stays within LATENCY_S."""
    low, high = 0.0, servers * costs.threads * ROWS_MAX / (costs.batch[0] + costs.batch[1] * ROWS_MAX)
    for _ in range(7):
        load = (low + high) / 2
        found = run(Cluster(costs, servers, shards, load, 1.0), 3)[1:]
        good = all(second.p99 <= LATENCY_S for second in found) and sum(
            second.rate for second in found
        ) >= 0.97 * load * len(found)
        low, high = (load, high) if good else (low, load)
    return low


def closed_loop(costs: Costs, sessions: int) -> tuple[float, float]:
    """What the bench does: groups of sessions, each stepped again when all of it was answered. Steps a second, and the p50."""
    cluster = Cluster(costs, 1, 1, 0.0, 0.0, bin_s=0.0002)
    size = max(1, sessions // GROUPS)
    away = costs.around[1] * size  # of each call, at its client
    left = dict.fromkeys(range(min(GROUPS, sessions)), 0)  # rows of a group that were not answered
    sent = dict.fromkeys(left, 0.0)
    took: list[float] = []
    while cluster.now < 1.5:
        for group in left:
            if not left[group] and cluster.now >= sent[group]:
                # A little apart, so that answers tell the groups apart.
                sent[group], left[group] = cluster.now + 1e-6 * group, size
                cluster.arrive(0, sent[group], size)
        cluster.step()
        done = [one for one in cluster.answers if one[0] <= cluster.now]
        cluster.answers = [one for one in cluster.answers if one[0] > cluster.now]
        for at, after, rows in done:
            group = next(group for group in left if left[group] and abs(sent[group] - (at - after)) < 1e-9)
            left[group] -= rows
            if not left[group]:
                took.append(after + away)
                sent[group] = at + away  # when it comes again
    return size * len(took) / cluster.now, float(np.median(took))


# What is said of it


def against_the_bench(costs: Costs, bench: dict[str, Any]) -> list[dict[str, float]]:
    rows = []
    for one in runs_of(bench):
        rate, p50 = closed_loop(costs, one["sessions"])
        rows.append({
            "sessions": one["sessions"], "measured_per_s": one["steps_per_s"], "simulated_per_s": rate,
            "measured_p50_ms": one["p50_ms"], "simulated_p50_ms": 1000 * p50,
        })  # fmt: skip
    return rows


def story(costs: Costs, load: float) -> list[Second]:
    """Four servers, four shards, half a minute: a server dies, a shard stops for a second, and all servers are updated in turn."""
    cluster = Cluster(costs, 4, 4, load, 1.0)
    at: dict[float, Callable[[], None]] = {
        5.0: lambda: cluster.leave(1, DETECT_S), 10.0: lambda: cluster.join(1), 15.0: lambda: cluster.stop_shard(2, 1.0),
    }  # fmt: skip
    for number, place in enumerate((1, 0, 2, 3)):
        at[20.0 + 12.0 * number] = lambda place=place: cluster.leave(place, 0.0)  # type: ignore[misc]
        at[20.0 + 12.0 * number + RESTART_S] = lambda place=place: cluster.join(place)  # type: ignore[misc]
    return run(cluster, 70, at)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=BENCH, help="a result of `make bench`")
    args = parser.parse_args()
    bench = json.loads(args.bench.read_text())
    costs = Costs.measured(bench)
    checked = against_the_bench(costs, bench)
    say(f"against the bench: {checked}")
    grid = []
    for servers, shards in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8)):
        grid.append({"servers": servers, "shards": shards, "steps_per_s": carried(costs, servers, shards)})
        say(f"{grid[-1]}")
    four = next(one["steps_per_s"] for one in grid if one["servers"] == one["shards"] == 4)
    stories = {str(part): [vars(second) for second in story(costs, part * four)] for part in (0.5, 0.7, 0.9)}
    found = {
        "bench": args.bench.name, "machine": bench["machine"], "costs": vars(costs), "against_the_bench": checked, "carried": grid,
        "stories": stories,
    }  # fmt: skip
    RESULT.write_text(json_text(found, indent=1) + "\n")
    RESULT.with_suffix(".png").write_bytes(picture(stories, four))
    text = PAGE.read_text()
    for name, lines in tables(found).items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda hit, lines=lines: hit[1] + lines + hit[2], text, flags=re.S
        )
    PAGE.write_text(text)
    return 0


def tables(found: dict[str, Any]) -> dict[str, str]:
    costs = found["costs"]
    return {
        "costs": _table(
            ("", "fixed", "a row"),
            [("an engine thread: a batch computed", f"{1e3 * costs['batch'][0]:.2f} ms", f"{1e6 * costs['batch'][1]:.1f} µs"),
             ("an engine thread: its records packed and sent", "", f"{1e6 * costs['send']:.1f} µs"),
             ("a shard", f"{1e3 * costs['way']:.2f} ms", f"{1e6 * costs['record']:.1f} µs"),
             ("client and wire", f"{1e3 * costs['around'][0]:.2f} ms", f"{1e6 * costs['around'][1]:.1f} µs")],
        ),
        "checked": _table(
            ("sessions", "steps/s measured", "simulated", "p50 measured", "simulated"),
            [(f"{one['sessions']:,}", f"{one['measured_per_s']:,.0f}", f"{one['simulated_per_s']:,.0f}",
              f"{one['measured_p50_ms']:.1f} ms", f"{one['simulated_p50_ms']:.1f} ms") for one in found["against_the_bench"]],
        ),
        "sizing": _table(
            ("sessions", "steps/s each", "steps/s", "servers", "shards", "Redis GB", "Mbit/s from / to clients", "Mbit/s to Redis"),
            sizing(found),
        ),
        "carried": _table(
            ("servers", "shards", "steps/s"),
            [(str(one["servers"]), str(one["shards"]), f"{one['steps_per_s']:,.0f}") for one in found["carried"]],
        ),
    }  # fmt: skip


def sizing(found: dict[str, Any]) -> list[Sequence[str]]:
    """Servers like the bench's machine and shards for sessions of W: the larger of what rates and what memory ask for."""
    server = max(run["measured_per_s"] for run in found["against_the_bench"]) * HEADROOM
    shard, rows = HEADROOM / RECORD_S, []
    for sessions in (10**4, 10**5, 10**6, 10**7, 10**8):
        for rate in (0.01, 1.0, 30.0):
            steps, gigabytes = sessions * rate, sessions * SESSION_NBYTES / 1e9
            servers = max(2, math.ceil(steps / server), math.ceil(sessions / SERVER_SESSIONS))
            shards = max(1, math.ceil(steps / shard), math.ceil(gigabytes / SHARD_GB))
            mbit = 8e-6 * steps
            rows.append((
                f"{sessions:,}", f"{rate:g}", f"{steps:,.0f}", f"{servers:,}", f"{shards:,}", f"{gigabytes:,.2f}",
                f"{mbit * STEP_NBYTES[0]:,.1f} / {mbit * STEP_NBYTES[1]:,.1f}", f"{mbit * RECORD_NBYTES:,.1f}",
            ))  # fmt: skip
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def picture(stories: dict[str, list[dict[str, float]]], full: float) -> bytes:
    from engram_models.training.pictures import figure, png

    drawn = figure(9, 5)
    above, below = drawn.subplots(2, sharex=True)
    for part, seconds in stories.items():
        at = np.arange(len(seconds)) + 0.5
        label = f"{float(part):.0%} of {full:,.0f} steps/s"
        above.plot(at, [1000 * second["p99"] for second in seconds], linewidth=1, label=label)
        below.plot(at, [second["rate"] for second in seconds], linewidth=1)
    above.set_yscale("log")
    above.set_ylabel("p99, ms")
    above.legend(fontsize=8)
    below.set_ylabel("answered/s")
    below.set_ylim(bottom=0)
    below.set_xlabel("seconds: a server dies at 5, a shard stands still at 15, servers are updated from 20 on")
    return png(drawn)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
