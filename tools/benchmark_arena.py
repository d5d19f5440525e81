"""`make bench-arena`: what it costs to have more active sessions than the arena has slots; docs/benchmarks/arena.md and .json.

W with an arena of 256 slots, and 1, 1.5 and 4 times as many sessions, in three kinds of load: every session in a closed
loop of its own; so many steps at a time, each of a session that is drawn at random; and the same, but few sessions have most of
the steps (Zipf's law). After a warm-up, the median of some windows counts. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import engram
from engram._json import json_text
from engram_service.bench.report import machine
from engram_service.bench.workload import W, write_w
from engram_service.local import LocalServer
from engram_service.protocols.http.get import get

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
SLOTS, SHARES, AT_A_TIME, WINDOWS, ZIPF = 256, (1.0, 1.5, 4.0), 128, 3, 1.1
KINDS = {
    "loops": "every session in a loop of its own",
    "uniform": f"{AT_A_TIME} steps at a time, any session as likely as another",
    "skewed": f"{AT_A_TIME} steps at a time, sessions by Zipf's law (exponent {ZIPF})",
}
LOADS = "engram_records_loaded_total"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window (default: 4)")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of arena.md and arena.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        write_w(directory / "models")
        flags = ("--shipped-models", "false", "--log-level", "warning", "--arena-slots-max", str(SLOTS))
        with LocalServer(directory / "server", directory / "models", flags) as server:
            for kind, share in itertools.product(KINDS, SHARES):
                rows.append(asyncio.run(measured(server, kind, int(SLOTS * share), args.seconds)))
                print(rows[-1], file=sys.stderr, flush=True)
    for row in rows:
        fits = next(one for one in rows if one["load"] == row["load"] and one["sessions"] == SLOTS)
        row["of_what_fits"] = row["steps_per_s"] / fits["steps_per_s"]
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "slots": SLOTS, "results": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "arena.json").write_text(json_text(found, indent=2) + "\n")
    (args.out / "arena.md").write_text(page(found))
    print(page(found))
    return 0


async def measured(server: LocalServer, kind: str, count: int, seconds: float) -> dict[str, Any]:
    async with engram.AsyncClient(server.address) as client:
        sessions = await client.open_many(W, [f"{kind}-{number}" for number in range(count)])
        load = Load(sessions, kind)
        workers = [asyncio.create_task(load.work(number)) for number in range(count if kind == "loops" else AT_A_TIME)]
        await asyncio.sleep(1.0)
        loaded, windows, waits = scraped(server.http), [], list[float]()
        for _ in range(WINDOWS):
            load.waits.clear()
            await asyncio.sleep(seconds)
            windows.append(len(load.waits) / seconds)
            waits += load.waits
        loaded = scraped(server.http) - loaded
        for worker in workers:
            worker.cancel()
        steps = load.counts
        await asyncio.gather(*workers, return_exceptions=True)
        await client.close_many(sessions)
    return {
        "load": kind, "sessions": count, "steps_per_s": statistics.median(windows),
        "p50_ms": 1000 * float(np.quantile(waits, 0.5)), "p99_ms": 1000 * float(np.quantile(waits, 0.99)),
        "loads_a_step": loaded / len(waits), "least_and_most_steps": [int(steps.min()), int(steps.max())],
    }  # fmt: skip


class Load:
    """Who is stepped next."""

    def __init__(self, sessions: list[engram.Session], kind: str) -> None:
        self._sessions = sessions
        self._loops = kind == "loops"
        weights = np.arange(1, len(sessions) + 1) ** -(ZIPF if kind == "skewed" else 0.0)
        draws = np.random.default_rng(1).choice(len(sessions), 1 << 18, p=weights / weights.sum())
        self._draws = itertools.cycle(draws.tolist())
        self._busy: set[int] = set()
        self._x = np.random.default_rng(2).standard_normal((16, 64)).astype(np.float32)
        self.waits: list[float] = []
        self.counts = np.zeros(len(sessions), np.int64)

    async def work(self, number: int) -> None:
        for turn in itertools.count():
            at = number if self._loops else next(place for place in self._draws if place not in self._busy)
            self._busy.add(at)
            begun = time.perf_counter()
            await self._sessions[at].step(self._x[turn % len(self._x)])
            self.waits.append(time.perf_counter() - begun)
            self.counts[at] += 1
            self._busy.discard(at)


def scraped(http: str) -> float:
    """How many records the server has read into its arena."""
    lines = get(http, "/metrics").splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(LOADS)), 0.0)


def page(found: dict[str, Any]) -> str:
    lines = [
        "# More active sessions than slots", "",
        f"Written by `make bench-arena` on {found['date']}. Client, server and Redis share this machine:", "",
        *(f"- {key}: {value}" for key, value in found["machine"].items()), "",
        f"W, an arena of {found['slots']} slots, durability step, one client. *of what fits*: the rate, against that of as many",
        "sessions as slots. *loads a step*: records read back from Redis, for each step.", "",
        "| load | sessions | steps/s | of what fits | p50 ms | p99 ms | loads a step | least and most steps of a session |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {KINDS[row['load']]} | {row['sessions']:,} | {row['steps_per_s']:,.0f} | {row['of_what_fits']:.2f} |"
            f" {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['loads_a_step']:.2f} |"
            f" {row['least_and_most_steps'][0]:,}, {row['least_and_most_steps'][1]:,} |"
            for row in found["results"]
        ), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
