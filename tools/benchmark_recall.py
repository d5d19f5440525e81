"""`make bench-recall`: recall and the NTM through a real server, written to docs/benchmarks/recall.md and .json.

Dense recall from a million patterns of 256 bits, against brute force; a classic Hebb recall; and steps of a Neural Turing
Machine, 256 sessions against one. Takes some two minutes; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import engram
from engram._json import json_text
from engram_models import NTM, Hopfield, write_bundle
from engram_service.bench.ceiling import Ceiling
from engram_service.bench.drive import Options
from engram_service.bench.measure import measure
from engram_service.bench.report import machine
from engram_service.bench.workload import workload_of
from engram_service.local import LocalServer

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
BITS, CUES, BATCH = 256, 1000, 128
FLIPS, UNKNOWN = 0.20, 0.50  # of a cue's bits, in every other cue each
HEBB_BITS, HEBB_PATTERNS, HEBB_RECALLS, HEBB_FLIPS = 1024, 100, 300, 0.10
SESSIONS = 256
QUICK = ("--log-level", "warning", "--shipped-models", "false", "--batch-rows-max", "64")  # steps are not measured here
GOALS = {"dense_p50_ms_a_cue": 20.0, "hebb_p50_ms": 5.0, "ntm_ratio": 8.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window of NTM steps (default: 8)")
    parser.add_argument("--name", default="recall", help="of the files (default: recall)")
    args = parser.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        _write_models(directory)
        with LocalServer(directory / "server", directory / "memories", QUICK) as server:
            with engram.Client(server.address) as client:
                figures = {"dense": dense(client, args.patterns), "hebb": hebb(client)}
            figures["dense"]["server_mb"] = round(server.memory_mb())
        figures["ntm"] = ntm(directory / "machines", args.seconds)
    described = {**machine(), "load average": f"{busy:.1f} before it began; niceness {os.nice(0)}"}
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    found = {"machine": described, "date": f"{datetime.now(UTC):%Y-%m-%d}", "goals": GOALS, **figures}
    (DIRECTORY / f"{args.name}.json").write_text(json_text(found, indent=2) + "\n")
    text = page(found)
    (DIRECTORY / f"{args.name}.md").write_text(text)
    print(text)
    return 0 if figures["dense"]["equal_to_brute_force"] == CUES else 1


def _write_models(directory: Path) -> None:
    torch.manual_seed(0)
    write_bundle(directory / "memories", "dense", "1", Hopfield(BITS))
    write_bundle(directory / "memories", "hebb", "1", Hopfield(HEBB_BITS, rule="hebb"))
    write_bundle(directory / "machines", "ntm", "1", NTM(9, 8, 100, slots=128, width=20, activation="sigmoid"))


def dense(client: engram.Client, count: int) -> dict[str, Any]:
    """Stores, recalls in batches of BATCH cues and all at once, and compares every answer with brute force."""
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 2, (count, BITS), dtype=np.int8)
    session = client.open("dense", "million")
    say(f"storing {count:,} patterns")
    store_s = _seconds(lambda: session.store(stored))
    cues = stored[rng.integers(0, count, CUES)]
    odd = (np.arange(CUES) % 2 == 1)[:, None]
    cues ^= ((rng.random(cues.shape) < FLIPS) & ~odd).astype(np.int8)
    unknown = (rng.random(cues.shape) < UNKNOWN) & odd
    session.recall(cues[:BATCH], unknown[:BATCH])
    say(f"recalling {CUES} cues")
    took, hits = [], []
    for start in range(0, CUES, BATCH):
        part, begun = slice(start, start + BATCH), time.perf_counter()
        hits += session.recall(cues[part], unknown[part])
        took.append(1000 * (time.perf_counter() - begun) / len(cues[part]))
    at_once_s = _seconds(lambda: session.recall(cues, unknown))
    single = [1000 * _seconds(lambda row=row: session.recall(cues[row], unknown[row])) for row in range(20)]
    say("brute force")
    return {
        "patterns": count, "bits": BITS, "store_s": store_s, "batch": BATCH, "p50_ms_a_cue": statistics.median(took),
        "all_at_once_ms_a_cue": 1000 * at_once_s / CUES, "single_p50_ms": statistics.median(single),
        "cues": CUES, "equal_to_brute_force": _equal(stored, cues, unknown, hits),
        "recalled_exactly": sum(hit.distance == 0 for hit in hits),
    }  # fmt: skip


def _equal(
    stored: NDArray[np.int8], cues: NDArray[np.int8], unknown: NDArray[np.bool_], hits: list[engram.Recall]
) -> int:
    """How many answers name a pattern that no other one is nearer than, by the bits of the cue that are known."""
    packed = np.packbits(stored, axis=1).view(np.uint64)
    equal = 0
    for cue, hidden, hit in zip(cues, unknown, hits, strict=True):
        known = np.packbits(~hidden).view(np.uint64)
        distances = np.bitwise_count((packed ^ np.packbits(cue).view(np.uint64)) & known).sum(1, dtype=np.int64)
        equal += int(distances[int(hit.label[1:])] == distances.min())
    return equal


def hebb(client: engram.Client) -> dict[str, Any]:
    """One recall after another, end to end: gRPC, a look at Redis, asynchronous sweeps."""
    say("Hebb")
    rng = np.random.default_rng(2)
    stored = rng.choice([-1, 1], (HEBB_PATTERNS, HEBB_BITS))
    session = client.open("hebb", "classic")
    session.store(stored)
    session.recall(stored[0])
    took, right = [], 0
    for turn in range(HEBB_RECALLS):
        row = turn % HEBB_PATTERNS
        cue = np.where(rng.random(HEBB_BITS) < HEBB_FLIPS, -stored[row], stored[row])
        begun = time.perf_counter()
        hit = session.recall(cue, seed=turn)
        took.append(1000 * (time.perf_counter() - begun))
        right += hit.label == f"p{row}"
    return {
        "patterns": HEBB_PATTERNS, "bits": HEBB_BITS, "recalls": HEBB_RECALLS, "nearest_is_the_one": right,
        "p50_ms": statistics.median(took), "p99_ms": float(np.quantile(took, 0.99)),
    }  # fmt: skip


def ntm(models: Path, seconds: float) -> dict[str, Any]:
    """Steps/s of 256 sessions and of one, through the service and in plain torch."""
    plain = next(one for one in workload_of("ntm", models).plains if one.name == "torch")
    alone = Ceiling(plain, workload_of("ntm", models).input_shape, 1, 1.0)
    alone.measure(3)
    rates = {}
    for sessions in (SESSIONS, 1):
        options = Options(
            model="ntm", models=models, sessions=sessions, processes=1, groups=2, seconds=seconds, plain=False
        )
        rates[sessions] = measure(options, say)
    many, one = rates[SESSIONS], rates[1]
    return {
        "sessions": SESSIONS, "steps_per_s": many.steps_per_s, "p50_ms": many.p50_ms,
        "plain_torch_batch_256_steps_per_s": many.ceilings["torch"], "one_session_steps_per_s": one.steps_per_s,
        "plain_torch_batch_1_steps_per_s": alone.steps_per_s, "ratio_to_one_session": many.steps_per_s / one.steps_per_s,
        "ratio_to_plain_torch_batch_1": many.steps_per_s / alone.steps_per_s,
        "outputs_equal": many.outputs_equal and one.outputs_equal,
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    a, b, c, goals = found["dense"], found["hebb"], found["ntm"], found["goals"]
    rows = [
        (f"dense, {a['patterns']:,} x {a['bits']} bits: p50 ms a cue, batches of {a['batch']}", a["p50_ms_a_cue"],
         f"< {goals['dense_p50_ms_a_cue']:g}"),
        (f"the same, {a['cues']} cues in one call: ms a cue", a["all_at_once_ms_a_cue"], ""),
        ("the same, one cue a call: p50 ms", a["single_p50_ms"], ""),
        (f"nearest pattern as brute force finds it, of {a['cues']} cues", a["equal_to_brute_force"], f"{a['cues']}"),
        (f"storing the {a['patterns']:,}: seconds", a["store_s"], ""),
        (f"Hebb, {b['bits']} bits, {b['patterns']} patterns: p50 ms end to end", b["p50_ms"], f"< {goals['hebb_p50_ms']:g}"),
        ("the same: p99 ms", b["p99_ms"], ""),
        (f"NTM 128x20, LSTM 100, {c['sessions']} sessions, durable: steps/s", c["steps_per_s"], ""),
        ("the same, times one session through the service", c["ratio_to_one_session"], f">= {goals['ntm_ratio']:g}"),
        ("the same, times plain torch at batch 1", c["ratio_to_plain_torch_batch_1"], f">= {goals['ntm_ratio']:g}"),
        ("plain torch at batch 256: steps/s", c["plain_torch_batch_256_steps_per_s"], ""),
    ]  # fmt: skip
    lines = [
        "# Recall and the Neural Turing Machine", "",
        f"Written by `make bench-recall` on {found['date']}. Client, server and Redis share this machine:", "",
        *(f"- {key}: {value}" for key, value in found["machine"].items()), "",
        f"Cues: every other one has {FLIPS:.0%} of its bits flipped, the others {UNKNOWN:.0%} unknown; Hebb's have"
        f" {HEBB_FLIPS:.0%} flipped.", "",
        "| what | measured | goal |", "|---|---:|---:|",
        *(f"| {what} | {value:,.2f} | {goal} |" for what, value, goal in rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
