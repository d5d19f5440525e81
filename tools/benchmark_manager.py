"""`make bench-manager`: steps beside a busy manager and beside opens; docs/benchmarks/manager.md and .json. Needs cargo and torch.

W, `step` durability, 256 connections of one session each, driven by native/load at half of what they make in closed loop. Beside
them, in turns: nothing; a manager that is kept busy (listings in parallel, a new version of a model each two seconds, which is
loaded and probed, a scrape of /metrics each 100 ms); 500 sessions a second that are opened and closed; a process that only burns
the processor. What competes with the server for the machine runs with niceness 10.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from alongside import alongside
from benchmark_connections import LOAD, write_reference
from connection_contestants import FLAGS

import engram
from engram._json import json_text
from engram_service.bench.report import machine
from engram_service.bench.workload import W, weights_w, write_lstm, write_w
from engram_service.local import LocalServer
from engram_service.protocols.http.get import get

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
CONNECTIONS, SHARE = 256, 0.5
QUIET, BUSY, OPENS, BURNER = "nothing", "a busy manager", "500 opens and closes a second", "a process that burns"
GOAL = 3.0
LISTINGS, SCRAPE_S, VERSION_S, LOADED_S = 4, 0.1, 2.0, 30.0
OPENED, OPEN_S = 50, 0.1
NICENESS = 10
OTHER = "other"  # the model that is loaded meanwhile


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each phase (default: 6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of manager.md and manager.json")
    parser.add_argument("--beside", nargs=4, metavar=("WHAT", "ADDRESS", "HTTP", "MODELS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.beside:
        what, address, http, models = args.beside
        asyncio.run(beside(what, address, http, Path(models)))
    phases: dict[str, list[dict[str, Any]]] = {name: [] for name in (QUIET, BUSY, OPENS, BURNER)}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        write_w(directory / "models")
        write_reference(directory / "reference")
        with LocalServer(directory / "server", directory / "models", (*FLAGS, "--models-poll-s", "0.2")) as server:
            full = driven(server, directory / "reference", args.seconds)["steps_per_s"]
            rate = SHARE * full / CONNECTIONS
            for number in range(args.rounds):
                for name, rounds in phases.items():
                    with running(name, server, directory / "models") as other:
                        found = driven(server, directory / "reference", args.seconds, rate)
                        rounds.append({**found, "lived": other is None or other.poll() is None})
                    print(f"round {number + 1}, {name}: {found['p99_ms']:.1f} ms", file=sys.stderr, flush=True)
    result = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "full": full, "phases": phases}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "manager.json").write_text(json_text(result, indent=2) + "\n")
    (args.out / "manager.md").write_text(page(result))
    print(page(result))
    return 0


def driven(server: LocalServer, reference: Path, seconds: float, rate: float = 0.0) -> dict[str, Any]:
    command = [LOAD, server.address, "--model", W, "--reference", reference, "--sessions", CONNECTIONS,
               "--connections", CONNECTIONS, "--seconds", seconds, "--warm-up", 1]  # fmt: skip
    command += ["--rate", rate] if rate else []
    said = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(said[said.index("{") :])
    return found


def running(what: str, server: LocalServer, models: Path) -> AbstractContextManager[subprocess.Popen[str] | None]:
    return nullcontext() if what == QUIET else alongside("--beside", what, server.address, server.http, str(models))


# What runs beside the steps, in a process of its own, until it is ended


async def beside(what: str, address: str, http: str, models: Path) -> None:
    os.nice(NICENESS)
    print(flush=True)
    if what == BURNER:
        while True:
            sum(range(10_000))
    async with engram.AsyncClient(address) as client, asyncio.TaskGroup() as tasks:
        if what == OPENS:
            tasks.create_task(open_and_close(client))
            return
        for _ in range(LISTINGS):
            tasks.create_task(list_sessions(client))
        tasks.create_task(scrape(http))
        tasks.create_task(bring_models(client, models))


async def list_sessions(client: engram.AsyncClient) -> None:
    while True:
        assert len([one async for one in client.sessions.list()]) >= CONNECTIONS


async def scrape(http: str) -> None:
    while True:
        await asyncio.to_thread(get, http, "/metrics")
        await asyncio.sleep(SCRAPE_S)


async def bring_models(client: engram.AsyncClient, models: Path) -> None:
    """One version of a model after the other, each with weights of its own, and each is served before the next; two are kept."""
    while True:
        version = await asyncio.to_thread(_bring, models)
        async with asyncio.timeout(LOADED_S):
            while version not in [one.version for one in await client.models.list() if one.name == OTHER]:
                await asyncio.sleep(SCRAPE_S)
        await asyncio.sleep(VERSION_S)


def _bring(models: Path) -> str:
    version = str(time.time_ns())
    write_lstm(models, OTHER, version, weights_w(seed=time.time_ns()))
    for old in sorted((models / OTHER).iterdir())[:-2]:
        shutil.rmtree(old)
    return version


async def open_and_close(client: engram.AsyncClient) -> None:
    began, count = time.monotonic(), 0
    while True:
        sessions = await client.open_many(W, OPENED)
        await client.close_many(sessions)
        count += 1
        await asyncio.sleep(max(0.0, began + OPEN_S * count - time.monotonic()))


def page(found: dict[str, Any]) -> str:
    on, phases = found["machine"], found["phases"]

    def median(name: str, key: str) -> float:
        return float(np.median([one[key] for one in phases[name]]))

    lines = [
        "# Steps beside a busy manager, and beside opens", "",
        f"`make bench-manager`, {found['date']}, {on['cores']} cores, {on['processor']}. {CONNECTIONS} connections, each a",
        f"session of W, durability *step*, at half of the {found['full']:,.0f} steps/s that they make in closed loop. Medians of",
        f"{len(phases[QUIET])} rounds, in turns; goal: p99 at most {GOAL:.0f} times that beside nothing, all steps answered.", "",
        "| beside | steps/s | p50 ms | p99 ms | p99 / quiet | not answered |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, rounds in phases.items():
        ratio = median(name, "p99_ms") / median(QUIET, "p99_ms")
        failures = sum(one["failures"] for one in rounds)
        figures = [
            f"{median(name, key):,.{digits}f}" for key, digits in (("steps_per_s", 0), ("p50_ms", 1), ("p99_ms", 1))
        ]
        ended = "" if all(one["lived"] for one in rounds) else " (ended early)"
        lines.append(f"| {name}{ended} | {' | '.join(figures)} | {ratio:.2f} | {failures} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
