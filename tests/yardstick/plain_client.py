"""Closed-loop load for plain_server.py: each session sends its next input after its output. One process; run several.

Prints one JSON line: {"steps": …, "seconds": …, "latencies_ms": [p50, p99], "difference": …}. `difference` is the largest one
between the first steps of the first session and plain torch, or -1 where torch is not asked for (--check).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import grpc
import numpy as np

INPUT, OUTPUT = 64, 16
POOL = 64
RETRY_S = 0.01


Times = list[tuple[float, float]]


async def session(call: grpc.aio.UnaryUnaryMultiCallable, name: bytes, inputs: np.ndarray, until: float) -> Times:
    """Steps until the time `until`; returns (finished, took) of every step in seconds."""
    times = []
    row = 0
    while (begun := time.monotonic()) < until:
        try:
            await call(name + inputs[row % POOL].tobytes())
        except grpc.aio.AioRpcError:
            await asyncio.sleep(RETRY_S)  # and the same input again; the time it took counts
            continue
        row += 1
        times.append((time.monotonic(), time.monotonic() - begun))
    return times


async def check(call: grpc.aio.UnaryUnaryMultiCallable, inputs: np.ndarray, steps: int = 16) -> float:
    """The largest difference between a fresh session's outputs and torch running the same inputs as one sequence."""
    import torch
    from plain_server import Model

    model = Model()
    name = np.random.default_rng().bytes(16)
    got = [np.frombuffer(await call(name + inputs[row].tobytes()), np.float32) for row in range(steps)]
    with torch.inference_mode():
        expected = (
            model.head(model.lstm(torch.from_numpy(inputs[:steps]).view(steps, 1, INPUT))[0])
            .view(steps, OUTPUT)
            .numpy()
        )
    return float(np.abs(np.stack(got) - expected).max())


async def load(args: argparse.Namespace) -> dict[str, object]:
    inputs = np.random.default_rng(args.seed).standard_normal((POOL, INPUT)).astype(np.float32)
    async with grpc.aio.insecure_channel(args.address) as channel:
        call = channel.unary_unary("/plain.Plain/Step")
        difference = await check(call, inputs) if args.check else -1.0
        names = [b"%08x%08x" % (args.seed, number) for number in range(args.sessions)]
        start = time.monotonic() + args.warm_up
        until = start + args.seconds
        done = await asyncio.gather(*(session(call, name, inputs, until) for name in names))
    took = np.array([took for times in done for finished, took in times if start <= finished < until])
    p50, p99 = np.percentile(took, (50, 99)) * 1000 if len(took) else (0.0, 0.0)
    return {"steps": len(took), "seconds": args.seconds, "latencies_ms": [p50, p99], "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1, help="another one for each process: it names the sessions")
    parser.add_argument("--check", action="store_true")
    print(json.dumps(asyncio.run(load(parser.parse_args()))))


if __name__ == "__main__":
    main()
