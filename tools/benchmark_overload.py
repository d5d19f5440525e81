"""`make bench-overload`: one greedy client beside a thousand small ones, and more load than the machine can take;
docs/benchmarks/overload.md and .json.

W. A thousand sessions of ten clients each step once a second. Beside them, in turns: nothing; a process that only burns the
processor as much as a greedy client would; a greedy client, two thousand sessions with all the steps in flight that it is let
have. Then many such clients against a server with a short queue: what is refused, how long what is admitted takes, how much
memory that costs, and how soon it is over. All share this machine; what competes with the server for it runs with niceness 10.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import engram
from engram_service.bench.report import machine
from engram_service.bench.workload import W, write_w
from engram_service.local import LocalServer

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
SMALL_CLIENTS, SMALL_SESSIONS, PERIOD_S = 10, 100, 1.0
GREEDY_SESSIONS, GREEDY_STEPS = 2000, 256
CROWD = 8  # greedy clients of the overload, in one process
HASTY_SESSIONS, HASTE_S = 1000, 0.5
QUEUE_ROWS = 4096  # of the server that is overloaded
ROUNDS, SETTLE_S, NICENESS = 3, 2.0, 10
BESIDE = ("nothing", "a burner", "a greedy client")
INPUTS = np.random.default_rng(2).standard_normal((GREEDY_STEPS, 64)).astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase (default: 8)")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of overload.md and overload.json")
    parser.add_argument("--beside", choices=("burn", "greedy", "crowd"), help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.beside:
        os.nice(NICENESS)
        return burn() if args.beside == "burn" else asyncio.run(crowd(args.address, args.beside))
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        write_w(directory / "models")
        flags = ("--shipped-models", "false", "--log-level", "warning")
        with LocalServer(directory / "server", directory / "models", flags) as server:
            greedy = asyncio.run(beside_a_greedy_one(server, args.seconds))
        print(greedy, file=sys.stderr, flush=True)
        flags = (*flags, "--queue-rows-max", str(QUEUE_ROWS))
        with LocalServer(directory / "short", directory / "models", flags) as server:
            overload = asyncio.run(overloaded(server, args.seconds))
        print(overload, file=sys.stderr, flush=True)
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "greedy": greedy, "overload": overload}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "overload.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "overload.md").write_text(page(found))
    print(page(found))
    return 0


# What runs beside, each in a process of its own


def burn() -> int:
    while True:
        INPUTS.sum()


async def crowd(address: str, kind: str) -> int:
    """Greedy clients: until they are ended, every session always has as many steps in flight as it may."""
    names = range(CROWD if kind == "crowd" else 1)
    await asyncio.gather(*(_greedy(address, f"{kind}-{name}") for name in names))
    return 0


async def _greedy(address: str, name: str) -> None:
    async with engram.AsyncClient(address, engram.ClientOptions(timeout_s=None)) as client:
        sessions = await client.open_many(W, [f"{name}-{number}" for number in range(GREEDY_SESSIONS)])

        async def forever(session: engram.Session) -> None:
            while True:
                await session.run(INPUTS)

        await asyncio.gather(*(forever(session) for session in sessions))


@contextlib.contextmanager
def beside(kind: str, address: str) -> Iterator[None]:
    command = [sys.executable, __file__, "--beside", kind, "--address", address]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


# What is measured


class Small:
    """Small clients, whose sessions step once in a while, whatever the others do."""

    def __init__(self, clients: list[engram.AsyncClient]) -> None:
        self._clients = clients
        self.waits: list[float] = []
        self.errors = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._client(number, client) for number, client in enumerate(self._clients)))

    async def _client(self, number: int, client: engram.AsyncClient) -> None:
        names = [f"small-{number}-{at}" for at in range(SMALL_SESSIONS)]
        sessions = await client.open_many(W, names)
        draw = np.random.default_rng(number)
        await asyncio.gather(*(self._session(session, draw.random() * PERIOD_S) for session in sessions))

    async def _session(self, session: engram.Session, offset_s: float) -> None:
        await asyncio.sleep(offset_s)
        while True:
            begun = time.perf_counter()
            try:
                await session.step(INPUTS[0])
            except engram.EngramError:
                self.errors += 1
            self.waits.append(time.perf_counter() - begun)
            await asyncio.sleep(max(0.0, PERIOD_S - self.waits[-1]))


class Hasty:
    """A client with many sessions, whose steps are worth nothing after a while."""

    def __init__(self, client: engram.AsyncClient) -> None:
        self._client = client
        self.answered: list[float] = []
        self.late: list[float] = []

    async def run(self) -> None:
        sessions = await self._client.open_many(W, [f"hasty-{at}" for at in range(HASTY_SESSIONS)])
        await asyncio.gather(*(self._session(session) for session in sessions))

    async def _session(self, session: engram.Session) -> None:
        while True:
            begun = time.perf_counter()
            try:
                await session.step(INPUTS[0], timeout=HASTE_S)
                self.answered.append(time.perf_counter() - begun)
            except engram.DeadlineExceeded:
                self.late.append(time.perf_counter() - begun)


@contextlib.asynccontextmanager
async def small_ones(address: str) -> Any:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(engram.AsyncClient(address)) for _ in range(SMALL_CLIENTS)]
        small = Small(clients)
        task = asyncio.create_task(small.run())
        await asyncio.sleep(SETTLE_S)
        yield small
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def beside_a_greedy_one(server: LocalServer, seconds: float) -> dict[str, Any]:
    waits: dict[str, list[list[float]]] = {kind: [] for kind in BESIDE}
    rates: list[float] = []
    async with small_ones(server.address) as small:
        for _ in range(ROUNDS):
            for kind, what in zip(BESIDE, (None, "burn", "greedy"), strict=True):
                with beside(what, server.address) if what else contextlib.nullcontext():
                    await asyncio.sleep(4 * SETTLE_S if what == "greedy" else SETTLE_S)
                    before, small.waits = await _steps(server), []
                    await asyncio.sleep(seconds)
                    waits[kind].append(small.waits)
                    if what == "greedy":
                        rates.append((await _steps(server) - before) / seconds)
        errors = small.errors
    p99 = {kind: [float(np.quantile(one, 0.99)) for one in rounds] for kind, rounds in waits.items()}
    return {
        "others": {
            kind: {
                "p50_ms": 1000 * float(np.median([np.median(one) for one in waits[kind]])),
                "p99_ms": 1000 * float(np.median(p99[kind])),
            }
            for kind in BESIDE
        },
        "others_errors": errors,
        "p99_against_nothing": float(np.median(np.array(p99[BESIDE[2]]) / np.array(p99[BESIDE[0]]))),
        "p99_against_burner": float(np.median(np.array(p99[BESIDE[2]]) / np.array(p99[BESIDE[1]]))),
        "steps_per_s": float(np.median(rates)),
    }


async def overloaded(server: LocalServer, seconds: float) -> dict[str, Any]:
    """Small clients through an overload and after it."""
    process = psutil.Process(server.pid)
    async with small_ones(server.address) as small:
        await asyncio.sleep(seconds)
        usual, small.waits = np.array(small.waits), []
        memory, rows = [], []
        async with beside_crowd(server.address) as hasty:
            await asyncio.sleep(6 * SETTLE_S)
            before, refused, small.waits = await _steps(server), await _refused(server), []
            expired, hasty.answered, hasty.late = await _refused(server, "DEADLINE_EXCEEDED"), [], []
            end = time.monotonic() + 2 * seconds
            while time.monotonic() < end:
                await asyncio.sleep(1.0)
                memory.append(process.memory_info().rss / 1e6)
                rows.append((await _scraped(server)).get("engram_rows_in_flight", 0.0))
            during, steps = np.array(small.waits), await _steps(server) - before
            refused = await _refused(server) - refused
            expired = await _refused(server, "DEADLINE_EXCEEDED") - expired
            told = np.array(hasty.answered), np.array(hasty.late)
        over, small.waits = time.monotonic(), []
        while time.monotonic() - over < 30.0:
            await asyncio.sleep(0.25)
            last, small.waits = small.waits, []
            if last and np.median(last) <= 2 * np.median(usual):
                break
        recovered = time.monotonic() - over
        errors = small.errors
    return {
        "queue_rows_max": QUEUE_ROWS, "clients": CROWD, "sessions": CROWD * GREEDY_SESSIONS,
        "steps_per_s": steps / (2 * seconds), "refused_per_s": refused / (2 * seconds), "rows_in_flight_max": max(rows),
        "usual_p50_ms": 1000 * float(np.median(usual)), "usual_p99_ms": 1000 * float(np.quantile(usual, 0.99)),
        "p50_ms": 1000 * float(np.median(during)), "p99_ms": 1000 * float(np.quantile(during, 0.99)),
        "rss_mb_first_and_last": [round(float(np.mean(part)), 1) for part in (memory[:3], memory[-3:])],
        "recovered_s": recovered, "others_errors": errors,
        "deadline_ms": 1000 * HASTE_S, "in_time": len(told[0]), "too_late": len(told[1]),
        "latest_answer_ms": 1000 * float(told[0].max(initial=0.0)), "latest_word_ms": 1000 * float(told[1].max(initial=0.0)),
        "expired_in_the_queue": expired,
    }  # fmt: skip


@contextlib.asynccontextmanager
async def beside_crowd(address: str) -> Any:
    """Greedy clients in a process of their own, and one here that is hasty."""
    with beside("crowd", address):
        async with engram.AsyncClient(address) as client:
            hasty = Hasty(client)
            task = asyncio.create_task(hasty.run())
            yield hasty
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _scraped(server: LocalServer, label: str = "") -> dict[str, float]:
    """What the server's metrics are, summed over their labels, or over those with this value."""

    def read() -> list[str]:
        with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=10) as answer:
            lines: list[str] = answer.read().decode().splitlines()
        return lines

    found: dict[str, float] = {}
    for line in await asyncio.to_thread(read):
        if not line.startswith("#") and label in line:
            name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


async def _steps(server: LocalServer) -> float:
    return (await _scraped(server)).get("engram_commit_rows_total", 0.0)


async def _refused(server: LocalServer, reason: str = "") -> float:
    return (await _scraped(server, reason)).get("engram_rows_refused_total", 0.0)


def page(found: dict[str, Any]) -> str:
    greedy, over = found["greedy"], found["overload"]
    first, last = over["rss_mb_first_and_last"]
    small = SMALL_CLIENTS * SMALL_SESSIONS
    lines = [
        "# Overload and greedy clients", "",
        f"Written by `make bench-overload` on {found['date']}. Clients, server and Redis share this machine:", "",
        *(f"- {key}: {value}" for key, value in found["machine"].items()), "",
        f"{small:,} sessions of {SMALL_CLIENTS} clients step once a second (W, durability step); medians of {ROUNDS} rounds.",
        f"A greedy client has {GREEDY_SESSIONS:,} sessions and all the steps in flight that it is let have. What runs beside has",
        f"niceness {NICENESS}; a burner only uses the processor.", "",
        "| beside them | p50 ms | p99 ms |", "|---|---:|---:|",
        *(f"| {kind} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} |" for kind, row in greedy["others"].items()), "",
        f"- p99 beside the greedy client: {greedy['p99_against_nothing']:.2f} times that beside nothing,",
        f"  {greedy['p99_against_burner']:.2f} times that beside a burner (goal: 2)",
        f"- records that the server wrote meanwhile: {greedy['steps_per_s']:,.0f}/s; errors: {greedy['others_errors']}", "",
        f"Overload: {over['clients']} greedy clients, {over['sessions']:,} sessions, a queue of {over['queue_rows_max']:,}.", "",
        f"- records written {over['steps_per_s']:,.0f}/s, rows refused {over['refused_per_s']:,.0f}/s,",
        f"  at most {over['rows_in_flight_max']:,.0f} rows in flight",
        f"- the small ones: p50 {over['p50_ms']:.0f} ms, p99 {over['p99_ms']:.0f} ms",
        f"  (before: {over['usual_p50_ms']:.1f} and {over['usual_p99_ms']:.1f}); errors: {over['others_errors']}",
        f"- {HASTY_SESSIONS} more sessions step with a deadline of {over['deadline_ms']:.0f} ms: {over['in_time']:,} answers, the",
        f"  last of them after {over['latest_answer_ms']:.0f} ms; {over['too_late']:,} were too late, as their callers knew",
        f"  after {over['latest_word_ms']:.0f} ms at most; {over['expired_in_the_queue']:,.0f} rows were dropped in the queue",
        f"- the server's memory: {first:,.0f} MB at the beginning of the overload, {last:,.0f} MB at its end",
        f"- {over['recovered_s']:.2f} s after it, half of the small ones' steps took at most twice the usual time again", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
