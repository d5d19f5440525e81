"""`make bench-stored`: a million stored sessions in one Redis, and what listing them costs; docs/benchmarks/stored.md and .json.

Sessions of a small LSTM are claimed and committed through the store, thousands at a time, while a server runs on the same
Redis. Then pages are timed, all of them and some with nothing but a filter, and steps are counted with and without somebody
who lists all the time. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import redis
import torch
from torch import nn

import engram
from engram._json import json_text
from engram.v1 import service_pb2_grpc, session_pb2
from engram_models import bundle_from_torch, load_bundle, write_bundle
from engram_service.bench.report import machine
from engram_service.local import LocalServer
from engram_service.store import (
    ClaimRequest,
    CommitJob,
    MetaFields,
    RecordBlock,
    RecordLayout,
    Store,
    StoreSettings,
    Verdict,
    session_tag,
)

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
MODEL, RARE, INPUT, HIDDEN, OUTPUT = "stored", "rare", 16, 32, 8
AT_ONCE, PAGE, STEPPED, WINDOW_S = 4096, 500, 64, 6.0
RARES = 100  # sessions of another model among the many
TTL_MS = 7 * 86_400_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of stored.md and stored.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        models = Path(scratch) / "models"
        torch.manual_seed(0)
        for name in (MODEL, RARE):
            write_bundle(models, name, "1", bundle_from_torch(nn.LSTM(INPUT, HIDDEN).eval(), nn.Linear(HIDDEN, OUTPUT)))
        flags = ("--shipped-models", "false", "--log-level", "warning")
        with LocalServer(Path(scratch) / "server", models, flags) as server:
            url = f"unix://{server.directory / 'data' / 'redis.sock'}"
            found = measured(server, models, redis.Redis.from_url(url), url, args.sessions)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stored.json").write_text(json_text(found, indent=2) + "\n")
    (args.out / "stored.md").write_text(page(found))
    print(page(found))
    return 0 if found["listed_once"] == args.sessions else 1


def measured(server: LocalServer, models: Path, client: redis.Redis, url: str, count: int) -> dict[str, Any]:
    before = used(client)
    begun = time.perf_counter()
    writer = Writer(url, {name: load_bundle(models / name / "1") for name in (MODEL, RARE)})
    for start in range(0, count, AT_ONCE):
        writer.write(range(start, min(count, start + AT_ONCE)))
        if start // AT_ONCE % 25 == 0:
            say(f"{start:,} of {count:,} written")
    writer.close()
    write_s = time.perf_counter() - begun
    grown = used(client) - before
    say("listing")
    rss = server.memory_mb()
    with engram.Client(server.address) as sdk:
        before_s = paged_steps(server, sdk, listing=False)
        everything = Listing(server.address)
        everything.run("")
        rare = Listing(server.address)
        rare.run(RARE)
        while_s = paged_steps(server, sdk, listing=True)
        after_s = paged_steps(server, sdk, listing=False)
    calm = statistics.mean([before_s["steps_per_s"], after_s["steps_per_s"]])
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "sessions": count, "write_s": write_s,
        "state_nbytes": 2 * HIDDEN * 4, "redis_bytes_a_session": grown / count, "listed_once": len(everything.ids),
        "listed": everything.listed, "all": everything.figures(), "rare": {**rare.figures(), "found": len(rare.ids)},
        "server_rss_mb": {"before": rss, "after": server.memory_mb()}, "steps_per_s": {"alone": calm, **while_s},
        "of_alone": while_s["steps_per_s"] / calm, "p99_ms_alone": before_s["p99_ms"],
    }  # fmt: skip


class Writer:
    """Claims sessions and commits two steps of each, as a server does, without one."""

    def __init__(self, url: str, bundles: dict[str, Any]) -> None:
        self._store = Store(StoreSettings(url))
        self._store.start()
        self._bundles = bundles

    def write(self, numbers: range) -> None:
        rare = [number for number in numbers if number % (1_000_000 // RARES) == 0]
        self._write(MODEL, [number for number in numbers if number % (1_000_000 // RARES)])
        if rare:
            self._write(RARE, rare)

    def _write(self, model: str, numbers: list[int]) -> None:
        bundle = self._bundles[model]
        layout = RecordLayout(bundle.fingerprint, bundle.schema.state_nbytes, bundle.schema.output_nbytes)
        names, now_ms = [f"sensor-{number:07d}" for number in numbers], int(time.time() * 1000)
        tokens = [secrets.token_hex(8) for _ in names]
        initial = layout.initial(1, now_ms)
        self._store.claim(
            [
                ClaimRequest(name, model, "", "1", bundle.fingerprint, 1, False, token, TTL_MS, initial)
                for name, token in zip(names, tokens, strict=True)
            ]
        )
        count, done = len(names), threading.Event()
        ones = np.ones(count, np.uint64)
        states = np.random.default_rng(numbers[0]).integers(0, 255, (count, bundle.schema.state_nbytes), np.uint8)
        outputs = np.zeros((count, 1, bundle.schema.output_nbytes), np.uint8)
        block = RecordBlock(layout, 2 * ones, ones, ones, [states], np.ones(count, np.uint32), outputs, now_ms)

        def settled(rows: Any, verdict: Verdict) -> None:
            if not verdict.ok:
                raise RuntimeError(f"a commit was answered {verdict}")
            done.set()

        def meta(row: int) -> MetaFields:
            return MetaFields(names[row], f"{model}/1", bundle.fingerprint, 1, 1, now_ms, 0)

        tags = np.array([np.frombuffer(session_tag(name), np.uint8) for name in names])
        token_rows = np.array([np.frombuffer(token.encode(), np.uint8) for token in tokens])
        self._store.submit(
            CommitJob(tags, token_rows, [(np.arange(count), block)], ones * np.uint64(TTL_MS), meta, settled)
        )
        if not done.wait(30):
            raise RuntimeError("a commit was not answered")

    def close(self) -> None:
        self._store.close()


class Listing:
    """Lists page by page, as the SDK does, and times each call."""

    def __init__(self, address: str) -> None:
        self._stub = service_pb2_grpc.EngramServiceStub(
            grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        )
        self.ids: set[str] = set()
        self.listed = 0
        self.took_ms: list[float] = []

    def pages(self, model: str) -> Iterator[None]:
        token = ""
        while True:
            begun = time.perf_counter()
            request = session_pb2.ListSessionsRequest(page_size=PAGE, page_token=token, model=model)
            response = self._stub.ListSessions(request, timeout=30)
            self.took_ms.append(1000 * (time.perf_counter() - begun))
            self.listed += len(response.sessions)
            self.ids.update(session.id for session in response.sessions)
            token = response.next_page_token
            yield
            if not token:
                return

    def run(self, model: str) -> None:
        for _ in self.pages(model):
            pass

    def figures(self) -> dict[str, float]:
        quantiles = np.quantile(self.took_ms, (0.5, 0.99, 1.0))
        return {
            "calls": len(self.took_ms), "seconds": sum(self.took_ms) / 1000,
            **{name: float(value) for name, value in zip(("p50_ms", "p99_ms", "most_ms"), quantiles, strict=True)},
        }  # fmt: skip


def paged_steps(server: LocalServer, client: engram.Client, listing: bool) -> dict[str, float]:
    """Steps/s of some sessions in a closed loop, for a window; with `listing`, while another client lists."""
    sessions = client.open_many(MODEL, [f"stepped-{number}" for number in range(STEPPED)])
    x = np.zeros((STEPPED, INPUT), np.float32)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            for _ in Listing(server.address).pages(""):
                if stop.is_set():
                    return

    other = threading.Thread(target=run)
    if listing:
        other.start()
    client.step_many(sessions, x)
    took, begun = [], time.perf_counter()
    while (now := time.perf_counter()) < begun + WINDOW_S:
        client.step_many(sessions, x)
        took.append(1000 * (time.perf_counter() - now))
    stop.set()
    if listing:
        other.join()
    client.close_many(sessions)
    return {"steps_per_s": len(took) * STEPPED / WINDOW_S, "p99_ms": float(np.quantile(took, 0.99))}


def used(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def page(found: dict[str, Any]) -> str:
    one, rare, rss = found["all"], found["rare"], found["server_rss_mb"]
    steps = found["steps_per_s"]
    rows = [
        ("written through the store, sessions/s", f"{found['sessions'] / found['write_s']:,.0f}"),
        (f"Redis, bytes a session ({found['state_nbytes']} of them state)", f"{found['redis_bytes_a_session']:,.0f}"),
        (f"a page of some {PAGE}: p50 ms", f"{one['p50_ms']:.1f}"),
        ("the same: p99 ms", f"{one['p99_ms']:.1f}"),
        ("the same: longest, ms", f"{one['most_ms']:.1f}"),
        ("the whole listing: seconds", f"{one['seconds']:.0f}"),
        ("the same: calls", f"{one['calls']:,}"),
        ("sessions found; listed twice", f"{found['listed_once']:,}; {found['listed'] - found['listed_once']}"),
        (f"the {rare['found']} sessions of one model among them: seconds", f"{rare['seconds']:.0f}"),
        ("the same: calls; longest, ms", f"{rare['calls']:,}; {rare['most_ms']:.0f}"),
        ("server MB before and after", f"{rss['before']:.0f}, {rss['after']:.0f}"),
        (f"steps/s of {STEPPED} sessions alone", f"{steps['alone']:,.0f}"),
        ("the same while somebody lists", f"{steps['steps_per_s']:,.0f} ({found['of_alone']:.2f})"),
        ("p99 ms of a step alone; while somebody lists", f"{found['p99_ms_alone']:.1f}; {steps['p99_ms']:.1f}"),
    ]
    lines = [
        f"# {found['sessions']:,} stored sessions", "",
        f"Written by `make bench-stored` on {found['date']}. Client, server and Redis share this machine:", "",
        *(f"- {key}: {value}" for key, value in found["machine"].items()), "",
        "| what | measured |", "|---|---:|", *(f"| {what} | {value} |" for what, value in rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
