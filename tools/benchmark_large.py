"""`make bench-large`: sessions whose state is a hundred tensors and half a megabyte; docs/benchmarks/large.md and .json.

The model is a streaming transformer of tests/zoo.py, made as large as that, and imported by `engram models import`. Every step
writes the whole state to Redis before it is answered. Beside it, in the same run: the graph in plain ONNX Runtime, and values as
large as a record written to the same Redis by a plain client, eight in a pipeline.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import redis

import engram
from engram._json import json_text
from engram_models.bundle import load_bundle
from engram_models.graph_step import GraphStep
from engram_service.bench.report import machine
from engram_service.local import LocalServer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
DIRECTORY = ROOT / "docs" / "benchmarks"
MODEL = "transformer"
LAYERS, WIDTH, LEFT = 16, 32, 61  # 98 states, 0.52 MB
SESSIONS = (1, 16, 64)
PIPELINED, BATCH = 8, 16
SERVER = ("--shipped-models", "false", "--log-level", "warning")
TEXT = """\
# Large states

Written by `make bench-large` on {date}. {tensors} state tensors, {nbytes:,} bytes of state; imported in {import_s:.1f} s. Each
step writes all of it to Redis (durability `step`) before it is answered. Client, server and Redis share this machine:

{machine}
- load of the machine before: {busy:.1f}

| sessions | steps/s, which are records/s | MB/s of state | p50 ms | p99 ms |
|---:|---:|---:|---:|---:|
{rows}

Plain ONNX Runtime, one thread, batches of {batch}: {plain:,.0f} steps/s. A plain client of the same Redis, {pipelined} values
of that size in a pipeline: {redis:,.0f} values/s, {redis_mb:,.0f} MB/s.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each row (default: 6)")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of large.md and large.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        found = measured(Path(scratch), args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "large.json").write_text(json_text(found, indent=2) + "\n")
    (args.out / "large.md").write_text(page(found))
    print(page(found))
    return 0


def measured(directory: Path, seconds: float) -> dict[str, Any]:
    import zoo

    busy = os.getloadavg()[0]
    path = zoo.streaming_transformer(LAYERS, WIDTH, LEFT).write(directory)
    say("imports the model")
    begun = time.perf_counter()
    command = (sys.executable, "-m", "engram", "models", "import", str(path), "--models", str(directory / "models"))
    subprocess.run([*command, "--name", MODEL], check=True, stdout=subprocess.DEVNULL)
    import_s = time.perf_counter() - begun
    bundle = load_bundle(directory / "models" / MODEL / "1")
    say("plain ONNX Runtime")
    step = GraphStep(bundle.read_graph(), bundle.schema)
    states = [np.zeros((BATCH, *spec.shape), spec.np_dtype) for spec in bundle.schema.state]
    frames = [np.full((BATCH, *spec.shape), 0.1, spec.np_dtype) for spec in bundle.schema.inputs]
    plain = BATCH * rate(lambda: step(frames, states), seconds / 3)
    with LocalServer(directory / "server", directory / "models", SERVER) as server:
        rows = [asyncio.run(load(server.address, count, seconds)) for count in SESSIONS]
        alone = redis_alone(directory / "server" / "data" / "redis.sock", bundle.schema.state_nbytes, seconds / 3)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(),
        "load_before": busy, "state_tensors": len(bundle.schema.state),
        "state_nbytes": bundle.schema.state_nbytes, "import_s": import_s, "plain_steps_per_s": plain, "rows": rows,
        "redis_values_per_s": alone,
    }  # fmt: skip


async def load(address: str, count: int, seconds: float) -> dict[str, Any]:
    """Some sessions in a closed loop, in two groups where there are several: while one is computed, the other is written."""
    async with engram.AsyncClient(address, engram.ClientOptions(timeout_s=60.0)) as client:
        sessions = await client.open_many(MODEL, count, durability="step")
        groups = [sessions[::2], sessions[1::2]] if count > 1 else [sessions]
        (spec,) = sessions[0].model.inputs
        took: list[float] = []

        async def run(group: list[engram.Session], seconds: float) -> int:
            frames, steps, begun = np.full((len(group), *spec.shape), 0.1, np.float32), 0, time.perf_counter()
            end = begun + seconds
            while begun < end:
                await client.step_many(group, frames)
                now = time.perf_counter()
                took.append(1000 * (now - begun))
                steps, begun = steps + len(group), now
            return steps

        await asyncio.gather(*(run(group, 0.1) for group in groups))
        took.clear()
        first = time.perf_counter()
        steps = sum(await asyncio.gather(*(run(group, seconds) for group in groups)))
        seconds = time.perf_counter() - first
        nbytes = sum(state.size * np.dtype(state.dtype).itemsize for state in sessions[0].model.state)
        await client.close_many(sessions)
    p50, p99 = (float(np.quantile(took, part)) for part in (0.5, 0.99))
    told = {
        "sessions": count,
        "steps_per_s": steps / seconds,
        "mb_per_s": steps * nbytes / seconds / 1e6,
        "p50_ms": p50,
        "p99_ms": p99,
    }
    say(f"{count} sessions: {told['steps_per_s']:.0f} steps/s, {told['mb_per_s']:.0f} MB/s")
    return told


def redis_alone(socket: Path, nbytes: int, seconds: float) -> float:
    """Values/s."""
    client = redis.Redis(unix_socket_path=str(socket))
    value = bytes(nbytes)

    def write() -> None:
        pipeline = client.pipeline(transaction=False)
        for number in range(PIPELINED):
            pipeline.set(f"plain-{number}", value)
        pipeline.execute()

    return PIPELINED * rate(write, seconds)


def rate(call: Any, seconds: float) -> float:
    """Calls/s."""
    call()
    count, begun = 0, time.perf_counter()
    while (took := time.perf_counter() - begun) < seconds:
        call()
        count += 1
    return count / took


def page(found: dict[str, Any]) -> str:
    rows = [
        f"| {row['sessions']} | {row['steps_per_s']:,.0f} | {row['mb_per_s']:,.0f} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} |"
        for row in found["rows"]
    ]
    return TEXT.format(
        date=found["date"], busy=found["load_before"],
        tensors=found["state_tensors"], nbytes=found["state_nbytes"], import_s=found["import_s"],
        machine="\n".join(f"- {key}: {value}" for key, value in found["machine"].items()), rows="\n".join(rows),
        batch=BATCH, plain=found["plain_steps_per_s"], pipelined=PIPELINED, redis=found["redis_values_per_s"],
        redis_mb=found["redis_values_per_s"] * found["state_nbytes"] / 1e6,
    )  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
