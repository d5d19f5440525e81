"""`make bench-overload`: one greedy client beside a thousand small ones, and more load than the machine can take;
docs/benchmarks/overload.md and .json.

W. A thousand sessions of ten clients each step once a second. Beside them, in turns: nothing; a process that only burns the
processor; two kinds of greedy client with all the steps in flight that they are let have. Then it is measured what the server can
do, and half as much, as much and twice as much is offered, at a fixed rate, whatever is answered: what is answered in time, what
is refused, how much memory that costs, and how soon it is over. At last one session steps without a pause while other
models come, are examined and loaded. All share this machine; what competes with the server for it runs with niceness 10.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from alongside import alongside
from numpy.typing import NDArray

import engram
from engram._json import json_text
from engram.v1 import stream_pb2
from engram_service.bench.report import machine
from engram_service.bench.workload import W, weights_w, write_lstm, write_w
from engram_service.local import LocalServer
from engram_service.protocols.http.get import get

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
SMALL_CLIENTS, SMALL_SESSIONS, PERIOD_S = 10, 100, 1.0
GREEDY_SESSIONS, GREEDY_STEPS, GREEDY_CALLS = 2000, 256, 16
CROWD, CROWD_SESSIONS = 8, 1500  # clients of the overload, in one process, and sessions of each
CROWD_PERIOD_S, DEADLINE_S = 0.02, 0.3
_CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
LOADS = (0.5, 1.0, 2.0)  # of what was measured to be possible
ROUNDS, SETTLE_S, NICENESS = 5, 2.0, 10
LOADING_ROUNDS, LOADING_HIDDEN, LOOK_S = 3, (256, 1024, 2048), 0.25
BESIDE = {
    "nothing": "",
    "a burner": "burn",
    "a greedy client, wide": "wide",
    "a greedy client, long": "long",
}
INPUTS = np.random.default_rng(2).standard_normal((GREEDY_STEPS, 64)).astype(np.float32)
WIDE = np.broadcast_to(INPUTS[0], (GREEDY_SESSIONS, 64))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of each phase (default: 8); twice the load lasts 8 times as long"
    )
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of overload.md and overload.json")
    parser.add_argument(
        "--loading", action="store_true", help="measure the coming of models alone; keep the rest of the page"
    )
    parser.add_argument("--beside", choices=("burn", "wide", "long", "crowd"), help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.beside:
        os.nice(NICENESS)
        return burn() if args.beside == "burn" else asyncio.run(compete(args))
    gc.freeze()  # clients of the SDK have no torch to look through for garbage, as this process has
    if args.loading:
        found = json.loads((args.out / "overload.json").read_text())
        return written(args.out, found | {"loading": while_models_come()})
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        write_w(directory / "models")
        with LocalServer(
            directory / "server", directory / "models", ("--shipped-models", "false", "--log-level", "warning")
        ) as server:
            greedy = asyncio.run(beside_a_greedy_one(server, args.seconds))
            print(greedy, file=sys.stderr, flush=True)
            overload = asyncio.run(overloaded(server, args.seconds))
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "greedy": greedy, "overload": overload}
    return written(args.out, found | {"loading": while_models_come()})


def written(directory: Path, found: dict[str, Any]) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "overload.json").write_text(json_text(found, indent=2) + "\n")
    (directory / "overload.md").write_text(page(found))
    print(page(found))
    return 0


# What runs beside, each in a process of its own


def burn() -> int:
    while True:
        INPUTS.sum()


async def compete(args: argparse.Namespace) -> int:
    if args.beside == "crowd":
        all_open = asyncio.Barrier(CROWD)
        clients = [Crowd(f"crowd-{name}", args.rate / CROWD, all_open) for name in range(CROWD)]
        await asyncio.gather(*(client.run(args.address, args.seconds) for client in clients))
        waits = np.concatenate([part for client in clients for part in client.waits])
        words = [part for client in clients for part in client.words]
        told = {
            "offered_per_s": sum(client.offered for client in clients) / args.seconds,
            "answered_per_s": len(waits) / args.seconds,
            "p50_ms": 1000 * float(np.median(waits)),
            "p99_ms": 1000 * float(np.quantile(waits, 0.99)),
            "latest_answer_ms": 1000 * float(waits.max()),
            "latest_refusal_ms": 1000 * max((float(part.max(initial=0.0)) for part in words), default=0.0),
            "refused_per_s": {
                reason: count / args.seconds
                for reason, count in sum((client.reasons for client in clients), Counter()).items()
            },
        }
        print(json_text(told), flush=True)
        return 0
    async with engram.AsyncClient(args.address, engram.ClientOptions(timeout_s=None)) as client:
        sessions = await client.open_many(W, [f"{args.beside}-{number}" for number in range(GREEDY_SESSIONS)])
        print("ready", flush=True)

        async def run(session: engram.Session) -> None:
            while True:
                await session.run(INPUTS)

        async def step() -> None:
            while True:
                await client.step_many(sessions, WIDE)

        long = args.beside == "long"
        await asyncio.gather(*(map(run, sessions) if long else (step() for _ in range(GREEDY_CALLS))))
    return 0


class Crowd:
    """One client of the overload: frames by hand, for with so much refused the SDK's care would be what is measured.

    Each session has one step in flight at most; what was refused is offered again when its turn comes. Columns by handle.
    """

    def __init__(self, name: str, rate: float, all_open: asyncio.Barrier) -> None:
        self._name = name
        self._all_open = all_open
        self._rate = rate  # steps a second
        self._free = np.zeros(CROWD_SESSIONS, np.bool_)
        self._answered = np.zeros(CROWD_SESSIONS, np.uint64)
        self._sent_at = np.zeros(CROWD_SESSIONS)
        self.counted_from = math.inf
        self.offered = 0
        self.waits: list[NDArray[np.float64]] = []  # of answers
        self.words: list[NDArray[np.float64]] = []  # of refusals
        self.reasons: Counter[str] = Counter()

    async def run(self, address: str, seconds: float) -> None:
        async with grpc.aio.insecure_channel(address, options=_CHANNEL) as channel:
            stream = channel.stream_stream(
                "/engram.v1.EngramService/Stream",
                request_serializer=stream_pb2.StreamRequest.SerializeToString,
                response_deserializer=stream_pb2.StreamResponse.FromString,
            )()
            ids = [f"{self._name}-{number}" for number in range(CROWD_SESSIONS)]
            await stream.write(
                stream_pb2.StreamRequest(open=stream_pb2.OpenFrame(model=W, session_ids=ids, client_id=1))
            )
            opened = (await stream.read()).opened
            assert not opened.errors, opened.errors
            self._answered[np.frombuffer(opened.handles, np.uint32)] = np.frombuffer(opened.seqs, np.uint64)
            self._free[:] = True
            await self._all_open.wait()
            reader = asyncio.create_task(self._read(stream))
            await self._write(stream, seconds)
            reader.cancel()

    async def _write(self, stream: Any, seconds: float) -> None:
        next_at = time.monotonic()
        self.counted_from = next_at + 2 * SETTLE_S
        place = 0
        while time.monotonic() < self.counted_from + seconds:
            free = np.flatnonzero(self._free)
            some = np.roll(free, -int(np.searchsorted(free, place)))
            some = some[: int(self._rate * CROWD_PERIOD_S)]
            if len(some):
                place = int(some[-1]) + 1
                self._free[some] = False
                self._sent_at[some] = now = time.monotonic()
                self.offered += len(some) * (now >= self.counted_from)
                frame = stream_pb2.StepsFrame(
                    handles=some.astype(np.uint32).tobytes(), seqs=(self._answered[some] + 1).tobytes(),
                    acknowledged_seqs=self._answered[some].tobytes(), inputs=WIDE[: len(some)].tobytes(),
                    timeout_ms=int(1000 * DEADLINE_S),
                )  # fmt: skip
                await stream.write(stream_pb2.StreamRequest(steps=frame))
            next_at += CROWD_PERIOD_S
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    async def _read(self, stream: Any) -> None:
        while True:
            response = await stream.read()
            kind = response.WhichOneof("frame")
            rows = getattr(response, kind)
            handles = np.frombuffer(rows.handles, np.uint32)
            took = time.monotonic() - self._sent_at[handles]
            counted = self._sent_at[handles] >= self.counted_from
            if kind == "outputs":
                self._answered[handles] = np.frombuffer(rows.seqs, np.uint64)
                self.waits.append(took[counted])
            else:
                assert kind == "errors", response
                self.words.append(took[counted])
                for index, count in Counter(np.frombuffer(rows.error_indexes, np.uint32)[counted].tolist()).items():
                    self.reasons[rows.errors[index].reason] += count
            self._free[handles] = True


def beside(kind: str, address: str, *more: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return alongside("--beside", kind, "--address", address, *more, says=False)


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
    rates: dict[str, list[float]] = {kind: [] for kind in BESIDE}
    async with small_ones(server.address) as small:
        for _ in range(ROUNDS):
            for kind, what in BESIDE.items():
                with beside(what, server.address) if what else contextlib.nullcontext() as process:
                    if "greedy" in kind:
                        assert process is not None and process.stdout is not None
                        await asyncio.to_thread(process.stdout.readline)
                    await asyncio.sleep(SETTLE_S)
                    before, small.waits = await _steps(server), []
                    await asyncio.sleep(seconds)
                    taken, small.waits = small.waits, []  # not of what begins or ends after it
                    waits[kind].append(taken)
                    rates[kind].append((await _steps(server) - before) / seconds)
        errors = small.errors
    quantiles = {kind: np.array([np.quantile(one, (0.5, 0.99)) for one in rounds]) for kind, rounds in waits.items()}
    return {
        "others": {
            kind: {
                "p50_ms": 1000 * float(np.median(found[:, 0])),
                "p99_ms": 1000 * float(np.median(found[:, 1])),
                "p50_against_nothing": float(np.median(found[:, 0] / quantiles["nothing"][:, 0])),
                "p99_against_nothing": float(np.median(found[:, 1] / quantiles["nothing"][:, 1])),
                "steps_per_s": float(np.median(rates[kind])),
            }
            for kind, found in quantiles.items()
        },
        "others_errors": errors,
    }


async def overloaded(server: LocalServer, seconds: float) -> dict[str, Any]:
    """What the server can do, and small clients through less, as much and more than that."""
    async with small_ones(server.address) as small:
        small.waits = []
        await asyncio.sleep(seconds)
        usual = np.array(small.waits)
        capacity = await possible(server, small, seconds)
        loads = []
        for load in LOADS:
            long = 8 * seconds if load == LOADS[-1] else seconds
            loads.append({"load": load, **await offered(server, small, load * capacity, long)})
            print(loads[-1], file=sys.stderr, flush=True)
        over, small.waits = time.monotonic(), []
        while time.monotonic() - over < 30.0:
            await asyncio.sleep(0.25)
            last, small.waits = small.waits, []
            if last and np.median(last) <= 2 * np.median(usual):
                break
        recovered = time.monotonic() - over
    return {
        "clients": CROWD, "sessions": CROWD * CROWD_SESSIONS, "deadline_ms": 1000 * DEADLINE_S,
        "usual_p50_ms": 1000 * float(np.median(usual)), "usual_p99_ms": 1000 * float(np.quantile(usual, 0.99)),
        "capacity_per_s": capacity, "loads": loads, "recovered_s": recovered, "others_errors": small.errors,
    }  # fmt: skip


async def possible(server: LocalServer, small: Small, seconds: float) -> float:
    """The most steps a second that were answered, of loads that grow until a tenth is not answered."""
    rate, most = 4000.0, 0.0
    while True:
        found = await offered(server, small, rate, seconds / 2)
        print(found, file=sys.stderr, flush=True)
        most = max(most, found["answered_per_s"])
        if found["answered_per_s"] < 0.9 * rate:
            return most
        rate *= 1.4


async def offered(server: LocalServer, small: Small, rate: float, seconds: float) -> dict[str, Any]:
    """What becomes of so many steps a second."""
    flags = ("--rate", str(rate), "--seconds", str(seconds))
    with beside("crowd", server.address, *flags) as crowd:
        await asyncio.sleep(4 * SETTLE_S)
        small.waits = []
        memory, end = [], time.monotonic() + max(1.0, seconds - 2 * SETTLE_S)
        while time.monotonic() < end:
            await asyncio.sleep(1.0)
            memory.append(server.memory_mb())
        waits = np.array(small.waits)
        assert crowd.stdout is not None
        told = json.loads(await asyncio.to_thread(crowd.stdout.readline))
    thirds = np.array_split(np.array(memory), 3)
    return {
        **told,
        "others_p50_ms": 1000 * float(np.median(waits)),
        "others_p99_ms": 1000 * float(np.quantile(waits, 0.99)),
        "rss_mb_thirds": [round(float(np.median(third)), 1) for third in thirds if len(third)],
        "rss_samples": len(memory),
    }


def while_models_come() -> dict[str, Any]:
    """The steps of one session that never waits, while bundles of several sizes come, and each time as long after that."""
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        write_w(directory / "models")
        coming = {
            hidden: [
                write_lstm(directory / "staged", f"lstm-{hidden}-{number}", "1", weights_w(hidden, hidden + number))
                for number in range(LOADING_ROUNDS)
            ]
            for hidden in LOADING_HIDDEN
        }
        flags = ("--shipped-models", "false", "--log-level", "warning", "--models-poll-s", "0.2")
        cache = ("--cache-dir", str(directory / "cache"))
        with LocalServer(directory / "server", directory / "models", (*flags, *cache)) as server:
            return asyncio.run(_while_models_come(server, directory / "models", coming))


async def _while_models_come(server: LocalServer, models: Path, coming: dict[int, list[Path]]) -> dict[str, Any]:
    rows: dict[str, list[list[float]]] = {}
    stamps: list[float] = []

    async def steps(session: engram.Session) -> None:
        while True:
            await session.step(INPUTS[0])
            stamps.append(time.perf_counter())

    async with engram.AsyncClient(server.address) as client:
        (session,) = await client.open_many(W, ["steady"], durability="interval")
        stepping = asyncio.create_task(steps(session))
        await asyncio.sleep(SETTLE_S)
        for number in range(LOADING_ROUNDS):
            for paths in coming.values():
                path, before, marks = paths[number], await _loaded(server), [len(stamps)]
                nbytes = sum(file.stat().st_size for file in path.iterdir())
                (models / path.parent.name).mkdir()
                begun = time.perf_counter()
                path.rename(models / path.parent.name / path.name)
                while await _loaded(server) == before:
                    await asyncio.sleep(LOOK_S)
                took = time.perf_counter() - begun
                marks.append(len(stamps))
                while time.perf_counter() < begun + 2 * took:
                    await _loaded(server)
                    await asyncio.sleep(LOOK_S)
                marks.append(len(stamps))
                gaps = [1000 * np.diff(stamps[start:stop]) for start, stop in pairwise(marks)]
                found = [float(value) for part in gaps for value in (*np.quantile(part, (0.5, 0.99)), part.max())]
                rows.setdefault(f"{nbytes / 1e6:.0f} MB", []).append([took, *found])
        stepping.cancel()
    fields = ("seconds", "p50_ms", "p99_ms", "longest_ms", "then_p50_ms", "then_p99_ms", "then_longest_ms")
    medians = {name: np.median(found, 0).tolist() for name, found in rows.items()}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "rounds": LOADING_ROUNDS,
        "coming": {name: dict(zip(fields, values, strict=True)) for name, values in medians.items()},
    }  # fmt: skip


async def _loaded(server: LocalServer) -> float:
    return (await _scraped(server, 'outcome="loaded"')).get("engram_model_loads_total", 0.0)


async def _scraped(server: LocalServer, label: str = "") -> dict[str, float]:
    """What the server's metrics are, summed over their labels, or over those with this value."""
    found: dict[str, float] = {}
    for line in (await asyncio.to_thread(get, server.http, "/metrics")).splitlines():
        if not line.startswith("#") and label in line:
            name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


async def _steps(server: LocalServer) -> float:
    return (await _scraped(server, 'outcome="ok"')).get("engram_steps_total", 0.0)


def page(found: dict[str, Any]) -> str:
    greedy, over = found["greedy"], found["overload"]
    small = SMALL_CLIENTS * SMALL_SESSIONS
    last = over["loads"][-1]
    lines = [
        "# Overload and greedy clients", "",
        f"Written by `make bench-overload` on {found['date']}. Clients, server and Redis share this machine:", "",
        *(f"- {key}: {value}" for key, value in found["machine"].items()), "",
        f"{small:,} sessions of {SMALL_CLIENTS} clients step once a second (W, durability step); medians of {ROUNDS} rounds,",
        f"the ratios round by round. A greedy client has {GREEDY_SESSIONS:,} sessions and all the steps in flight that it is",
        f"let have: a wide one steps all at once, {GREEDY_CALLS} times side by side; a long one gives each {GREEDY_STEPS} steps",
        f"at a time. A burner only uses the processor. What runs beside has niceness {NICENESS}.", "",
        "| beside them | p50 ms | times nothing | p99 ms | times nothing (goal: 2) | steps/s in all |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {kind} | {row['p50_ms']:.1f} | {row['p50_against_nothing']:.2f} | {row['p99_ms']:.1f} "
            f"| {row['p99_against_nothing']:.2f} | {row['steps_per_s']:,.0f} |"
            for kind, row in greedy["others"].items()
        ), "",
        f"Errors of the small ones: {greedy['others_errors']}.", "",
        f"Overload: {over['clients']} clients with {over['sessions']:,} sessions offer steps at a fixed rate, whatever becomes",
        f"of them, each with a deadline of {over['deadline_ms']:.0f} ms. Times are from before a step is written to after its",
        "answer was read. The load is a part of the most that was answered of loads that grew until a tenth was not:",
        f"{over['capacity_per_s']:,.0f} steps/s.", "",
        "| load | offered/s | answered/s | p50 ms | p99 ms | latest | QUEUE_FULL/s | too late/s | the small ones: p50 | p99 ms |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['load']:g} | {row['offered_per_s']:,.0f} | {row['answered_per_s']:,.0f} | {row['p50_ms']:.0f} "
            f"| {row['p99_ms']:.0f} | {row['latest_answer_ms']:.0f} | {row['refused_per_s'].get('QUEUE_FULL', 0):,.0f} "
            f"| {row['refused_per_s'].get('DEADLINE_EXCEEDED', 0):,.0f} | {row['others_p50_ms']:.0f} "
            f"| {row['others_p99_ms']:.0f} |"
            for row in over["loads"]
        ), "",
        f"- the small ones before: p50 {over['usual_p50_ms']:.1f} ms, p99 {over['usual_p99_ms']:.1f} ms",
        f"- errors of the small ones: {over['others_errors']}",
        f"- the latest refusal at {last['load']:g} times the load came after {last['latest_refusal_ms']:.0f} ms",
        f"- the server's memory there, medians of the thirds of {last['rss_samples']} seconds: "
        f"{', '.join(f'{value:,.0f}' for value in last['rss_mb_thirds'])} MB",
        f"- {over['recovered_s']:.2f} s after it, half of the small ones' steps took at most twice the usual time again", "",
    ]  # fmt: skip
    if loading := found.get("loading"):
        lines += [
            f"Models that come, measured on {loading['date']}: one session (W, interval durability, the Python SDK) steps without",
            "a pause while a bundle is put into the directory of models, read, examined and loaded, and as long after that, when "
            "nothing",
            f"comes; medians of {loading['rounds']} rounds, of the longest times too. The goal is that loading stops steps for no "
            "more than 20 ms.", "",
            "| what comes | takes s | step to step: p50 ms | p99 ms | longest ms | then: p50 ms | p99 ms | longest ms |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *(
                f"| {name} | {row['seconds']:.1f} | {row['p50_ms']:.2f} | {row['p99_ms']:.1f} | {row['longest_ms']:.0f} "
                f"| {row['then_p50_ms']:.2f} | {row['then_p99_ms']:.1f} | {row['then_longest_ms']:.0f} |"
                for name, row in loading["coming"].items()
            ), "",
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
