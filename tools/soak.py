"""`make soak`: a server under churn for SECONDS (1800), and whether its memory, files and threads stay flat.

Clients open, step, fork, close, let go, reconnect, store and recall, and one of them is killed every now and then. The arena
is smaller than what they have open, and sessions that are left alone expire within a minute, so that everything that comes
also goes. Every few seconds the server and its Redis are measured; a line is fitted to the second half of each series, and
what it grows by in that half is compared with what is allowed. Writes docs/results/soak.json and soak.png.

`make churn` (--churn N): N sessions (100,000) are opened and let go of, many in a frame, most of them by callers that go away in
the middle or whose streams break (tests/chaos/churn.py). The same is measured, and when all is over nothing may be left: no
session, no row in flight, no part of the tenant's quota. Writes docs/results/churn.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import engram
from engram._json import json_text
from engram_service.protocols.http.get import get

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "results"
CLIENTS, ACTIONS_PER_S = 3, 12
KILL_EVERY_S, SAMPLE_EVERY_S = 20.0, 3.0
OPEN_MAX, OPENED_AT_ONCE, NAMES, PATTERNS_MAX, BITS = 60, 4, 300, 16, 64
STEPPED, MEMORY = "bench-w", "patterns"
FLAGS = (
    "--shipped-models", "false", "--arena-slots-max", "64", "--resident-idle-s", "4", "--session-ttl-s", "60",
    "--log-level", "warning",
)  # fmt: skip
Series = dict[str, tuple[str, str, float, float]]
# name: (what it is, unit, growth that is allowed in any case, and as a part of the mean)
SERIES: Series = {
    "server_rss_mb": ("resident memory of the server", "MB", 4.0, 0.03),
    "server_files": ("open files of the server", "", 3.0, 0.0),
    "server_threads": (
        "threads of the server",
        "",
        2.0,
        0.0,
    ),  # a pool may make one more: a step of 1 is a slope of 1.5
    "redis_used_mb": ("memory of Redis", "MB", 1.0, 0.05),
    "redis_connections": ("connections to Redis", "", 1.0, 0.0),
    "sessions_known": ("sessions that the server knows: the load itself", "", 40.0, 0.0),
    "call_ms": ("an empty call, which waits for the event loop", "ms", 2.0, 0.5),
}


# The same of the churn, which takes a minute or two: pools may still fill up, while something left behind by each stream would
# count in hundreds, and Redis has what was detached in the last seconds.
CHURNED: Series = {
    "server_rss_mb": SERIES["server_rss_mb"],
    "server_files": ("open files of the server", "", 12.0, 0.0),
    "server_threads": ("threads of the server", "", 12.0, 0.0),
    "redis_used_mb": ("memory of Redis", "MB", 1.0, 0.25),
    "redis_connections": ("connections to Redis", "", 12.0, 0.0),
}
CHURN_FLAGS = ("--session-ttl-s", "10", "--resident-idle-s", "2", "--log-level", "warning")
CHURN_EVERY_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--churn", type=int, metavar="N", help="instead: so many sessions are opened and let go of")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of soak.json and soak.png")
    parser.add_argument("--client", nargs=2, metavar=("ADDRESS", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        asyncio.run(churn(args.client[0], int(args.client[1])))
        return 0
    found = churned(args.churn) if args.churn else soak(args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ("churn.json" if args.churn else "soak.json")).write_text(json_text(found, indent=1) + "\n")
    if not args.churn:
        (args.out / "soak.png").write_bytes(picture(found))
    for name, fit in found["fits"].items():
        say(f"{name}: mean {fit['mean']:.2f}, {fit['growth']:+.3f} in the second half, allowed {fit['allowed']:.2f}")
    for problem in found.get("problems", ()):
        say(problem)
    say("flat" if found["flat"] else "NOT flat")
    return 0 if found["flat"] else 1


# The load


class Churn:
    """One client's life: a random action after another, and no memory of what it did but the sessions that it has open."""

    def __init__(self, address: str, seed: int) -> None:
        self._address, self._seed = address, seed
        self._rng = random.Random(seed)
        self._client = engram.AsyncClient(address)
        self._open: dict[str, engram.Session] = {}
        self._x = np.random.default_rng(seed).standard_normal((OPEN_MAX + 1, 64)).astype(np.float32)

    async def act(self) -> None:
        actions: list[tuple[int, Callable[[], Any]]] = [
            (43, self.step_many), (16, self.open), (8, self.run), (8, self.fork), (8, self.close), (6, self.detach),
            (10, self.remember), (1, self.reconnect),
        ]  # fmt: skip
        (action,) = self._rng.choices([act for _, act in actions], [weight for weight, _ in actions])
        try:
            await action()
        except engram.EngramError as error:
            say(f"{action.__name__}: {error!r}")
            await self.reconnect()

    async def step_many(self) -> None:
        some = self._rng.sample(list(self._open.values()), min(len(self._open), 24))
        if some:
            await self._client.step_many(some, self._x[: len(some)])

    async def open(self) -> None:
        names = [f"soak-{self._seed % CLIENTS}-{number}" for number in self._rng.sample(range(NAMES), OPENED_AT_ONCE)]
        self._open |= zip(names, await self._client.open_many(STEPPED, names), strict=True)
        while len(self._open) > OPEN_MAX:
            await self.detach()

    async def run(self) -> None:
        if session := self._one():
            await session.run(self._x[:8])

    async def fork(self) -> None:
        if session := self._one():
            twin = await session.fork()
            await twin.step(self._x[0])
            await (twin.close() if self._rng.random() < 0.5 else twin.detach())

    async def close(self) -> None:
        if session := self._one(take=True):
            await session.close()

    async def detach(self) -> None:
        if session := self._one(take=True):
            await session.detach()

    async def remember(self) -> None:
        session = await self._client.open(MEMORY, f"memory-{self._seed % CLIENTS}-{self._rng.randrange(20)}")
        pattern = np.array(self._rng.choices((-1, 1), k=BITS))
        if (await session.store(pattern)).count > PATTERNS_MAX:
            await session.forget(all=True)
        else:
            await session.recall(pattern)
        await session.detach()

    async def reconnect(self) -> None:
        with contextlib.suppress(engram.EngramError):
            await self._client.aclose()
        self._open.clear()
        self._client = engram.AsyncClient(self._address)

    def _one(self, take: bool = False) -> engram.Session | None:
        if not self._open:
            return None
        name = self._rng.choice(list(self._open))
        return self._open.pop(name) if take else self._open[name]


async def churn(address: str, seed: int) -> None:
    one = Churn(address, seed)
    while True:
        await one.act()
        await asyncio.sleep(random.uniform(0.5, 1.5) / ACTIONS_PER_S)


class Clients:
    """The client processes; the oldest is killed and another one takes its place."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._made = 0
        self._running: list[subprocess.Popen[bytes]] = []
        self.killed = 0

    def add(self) -> None:
        command = [sys.executable, __file__, "--client", self._address, str(self._made)]
        self._running.append(subprocess.Popen(command))
        self._made += 1

    def replace(self) -> None:
        oldest = self._running.pop(0)
        if oldest.poll() is not None:
            raise RuntimeError(f"a client ended by itself with {oldest.returncode}")
        oldest.kill()
        oldest.wait()
        self.killed += 1
        self.add()

    def stop(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


# What is measured


def soak(seconds: float) -> dict[str, Any]:
    import torch

    from engram_models import Hopfield, write_bundle
    from engram_service.bench.report import machine
    from engram_service.bench.workload import write_w
    from engram_service.local import LocalServer

    with tempfile.TemporaryDirectory(prefix="engram-soak-") as scratch:
        models = Path(scratch) / "models"
        write_w(models)
        torch.manual_seed(0)
        write_bundle(models, MEMORY, "1", Hopfield(BITS))
        with LocalServer(Path(scratch) / "server", models, FLAGS) as server:
            clients = Clients(server.address)
            try:
                for _ in range(CLIENTS):
                    clients.add()
                samples = watched(server, clients, seconds)
                counted = scraped(server.http)
            finally:
                clients.stop()
    fits = {name: fitted(name, samples) for name in SERIES}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "seconds": round(seconds), "flags": list(FLAGS),
        "clients": CLIENTS, "clients_killed": clients.killed, "counted": counted, "fits": fits,
        "flat": all(fit["flat"] for fit in fits.values()), "samples": samples,
    }  # fmt: skip


def watched(server: Any, clients: Clients, seconds: float) -> list[dict[str, float]]:
    """Samples until the time is over, while clients are killed and replaced."""
    samples: list[dict[str, float]] = []
    begun = kill_at = time.monotonic()
    with engram.Client(server.address) as probe:
        while (now := time.monotonic()) < begun + seconds:
            samples.append(sample(server, probe, now - begun))
            if now > kill_at + KILL_EVERY_S:
                clients.replace()
                kill_at = now
            if len(samples) % 40 == 0:
                say(json_text(samples[-1]))
            time.sleep(max(0.0, begun + len(samples) * SAMPLE_EVERY_S - time.monotonic()))
    return samples


def sample(server: Any, probe: engram.Client, at_s: float) -> dict[str, float]:
    """What server and Redis have at this moment."""
    import redis

    processes = server.processes()
    with redis.Redis(unix_socket_path=str(server.directory / "data" / "redis.sock")) as store:
        memory, stats = store.info("memory"), store.info("clients")
    known = scraped(server.http)
    found = {
        "s": at_s, "server_rss_mb": server.memory_mb(), "server_files": sum(one.num_fds() for one in processes),
        "server_threads": sum(one.num_threads() for one in processes), "redis_used_mb": memory["used_memory"] / 2**20,
        "redis_connections": stats["connected_clients"], "call_ms": statistics.median(calls(probe)),
        "server_cpu_s": sum(sum(one.cpu_times()[:2]) for one in processes),
        "sessions_known": sum(known.get(f"engram_sessions:{where}", 0) for where in ("device", "stored")),
    }  # fmt: skip
    return {name: round(float(value), 3) for name, value in found.items()}


def churned(opens: int) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from chaos.churn import Churn, Plan, tokens
    from chaos.proxy import Wires

    from engram_service.bench.report import machine
    from engram_service.local import LocalServer
    from engram_service.ports import free_port

    plan, token, wires, port = Plan(opens), "engram_churn", Wires(), free_port()
    with tempfile.TemporaryDirectory(prefix="engram-churn-") as scratch:
        file = Path(scratch) / "tokens.toml"
        file.write_text(tokens(hashlib.sha256(token.encode()).hexdigest(), plan.quota))
        with LocalServer(Path(scratch) / "server", flags=("--tokens-file", str(file), *CHURN_FLAGS)) as server:
            proxy = wires.proxy(port, int(server.address.rpartition(":")[2]))
            churn = Churn(plan, server.address, server.http, proxy, f"127.0.0.1:{port}", token, seed=plan.opens)
            over, samples = threading.Event(), list[dict[str, float]]()
            watcher = threading.Thread(target=_watch_churn, args=(server, token, over, samples))
            watcher.start()
            try:
                asyncio.run(churn.run(loaded=over.set))
            finally:
                over.set()
                watcher.join()
                proxy.close()
                wires.stop()
    fits = {name: fitted(name, samples, CHURNED) for name in CHURNED}
    done = churn.churned
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "flags": list(CHURN_FLAGS), "opened": done.opened,
        "ends": dict(sorted(done.ends.items())), "problems": done.problems, "fits": fits,
        "flat": not done.problems and all(fit["flat"] for fit in fits.values()), "samples": samples,
    }  # fmt: skip


def _watch_churn(server: Any, token: str, over: threading.Event, samples: list[dict[str, float]]) -> None:
    begun = time.monotonic()
    with engram.Client(server.address, engram.ClientOptions(token=token)) as probe:
        while not over.wait(CHURN_EVERY_S):
            samples.append(sample(server, probe, time.monotonic() - begun))


def calls(probe: engram.Client) -> list[float]:
    """Milliseconds of some empty calls."""
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        probe.server()
        took.append(1000 * (time.perf_counter() - begun))
    return took


def scraped(http: str) -> dict[str, float]:
    """The server's own metrics, summed up by their first label."""
    from prometheus_client.parser import text_string_to_metric_families

    text = get(http, "/metrics")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("engram_") or family.type not in ("counter", "gauge"):
            continue
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                label = next(iter(sample.labels.values()), "")
                name = f"{sample.name}:{label}" if label else sample.name
                found[name] = found.get(name, 0.0) + sample.value
    return found


def fitted(name: str, samples: list[dict[str, float]], series: Series = SERIES) -> dict[str, Any]:
    """A line through the second half: what it grows by there, and whether that is allowed."""
    half = samples[len(samples) // 2 :]
    at = np.array([sample["s"] for sample in half])
    values = np.array([sample[name] for sample in half])
    slope = float(np.polyfit(at, values, 1)[0])
    growth, mean = slope * float(at[-1] - at[0]), float(values.mean())
    _, unit, least, part = series[name]
    allowed = max(least, part * mean)
    return {
        "unit": unit, "mean": mean, "slope_per_hour": slope * 3600, "growth": growth, "allowed": allowed,
        "flat": growth <= allowed,
    }  # fmt: skip


def picture(found: dict[str, Any]) -> bytes:
    from engram_models.training.pictures import figure, png

    drawn = figure(9, 1.6 * len(SERIES))
    all_axes = drawn.subplots(len(SERIES), sharex=True)
    minutes = [sample["s"] / 60 for sample in found["samples"]]
    for axes, (name, (what, unit, _, _)) in zip(all_axes, SERIES.items(), strict=True):
        axes.plot(minutes, [sample[name] for sample in found["samples"]], linewidth=0.8)
        fit = found["fits"][name]
        axes.set_ylim(bottom=0)
        axes.set_title(
            f"{what}: {fit['growth']:+.2f} {unit} in the second half".replace("  ", " "), fontsize=9, loc="left"
        )
    all_axes[-1].set_xlabel("minutes")
    return png(drawn)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
