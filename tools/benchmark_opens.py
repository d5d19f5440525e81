"""`make bench-opens`: thousands of sessions are opened at once beside others that step; docs/benchmarks/opens.md and .json.

Two servers stand on this machine. A hundred sessions of one of them step. Beside them, in turns: nothing;
a client that opens and closes thousands of sessions at the other server, which takes as much of the machine as if it did so here;
the same client at their own server. What counts is the last against the one before.

Then nothing steps, and many connections open sessions at the one server, each one session after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from alongside import alongside

import engram
from engram._json import json_text
from engram.v1 import service_pb2_grpc, stream_pb2
from engram_service.bench.report import machine
from engram_service.bench.workload import W, write_w
from engram_service.local import LocalServer

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
STEPPING, OPENED = 100, 4000  # sessions that step; that are opened at once
BESIDE = ("nothing", "opens at the other server", "opens at this server")
ROUNDS, SETTLE_S = 5, 1.0
PACE_S = 0.02  # of one session's steps: the machine is not full of them
CONNECTIONS, EACH = 64, 40  # that open sessions one by one, and how many


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase (default: 5)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of opens.md and opens.json")
    parser.add_argument("--open", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        return asyncio.run(open_and_close(args.open))
    flags = ("--shipped-models", "false", "--log-level", "warning")
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        write_w(directory / "models")
        with (
            LocalServer(directory / "own", directory / "models", flags) as own,
            LocalServer(directory / "other", directory / "models", flags) as other,
        ):
            found = asyncio.run(measure(own.address, other.address, args))
        with LocalServer(directory / "alone", directory / "models", flags) as own:
            found["one by one"] = asyncio.run(one_by_one(own, args.rounds))
    result = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), **found}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "opens.json").write_text(json_text(result, indent=2) + "\n")
    (args.out / "opens.md").write_text(page(result))
    print(page(result))
    return 0


async def open_and_close(address: str) -> int:
    """In a process of its own: opens sessions and lets go of them until it is ended, and says how many."""
    while True:
        async with engram.AsyncClient(address, engram.ClientOptions(ttl_s=60)) as client:
            sessions = await client.open_many(W, OPENED)
            print(len(sessions), flush=True)


def opening(address: str) -> AbstractContextManager[subprocess.Popen[str] | None]:
    return alongside("--open", address) if address else nullcontext()


async def measure(own: str, other: str, args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in BESIDE}
    async with engram.AsyncClient(own) as client:
        sessions = await client.open_many(W, STEPPING)
        for number in range(args.rounds):
            for name, address in zip(BESIDE, ("", other, own), strict=True):
                with opening(address) as process:
                    waits = await stepped(sessions, args.seconds)
                    opened = 0 if process is None else OPENED * len(await asyncio.to_thread(_lines, process))
                rows[name].append(
                    {"p50_ms": _at(waits, 0.5), "p99_ms": _at(waits, 0.99), "steps": len(waits), "opened": opened}
                )
                print(f"round {number + 1}, {name}: {rows[name][-1]}", file=sys.stderr, flush=True)
                await asyncio.sleep(SETTLE_S)
    pairs = zip(rows[BESIDE[2]], rows[BESIDE[1]], strict=True)
    ratios = sorted(here["p99_ms"] / there["p99_ms"] for here, there in pairs)
    return {"rounds": rows, "ratios": ratios, "ratio": float(np.median(ratios))}


class Device:
    """A connection that opens sessions by hand: what the SDK does beside would be most of what is measured."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.aio.insecure_channel(address, options)
        self._call = service_pb2_grpc.EngramServiceStub(self._channel).Stream()

    async def _asked(self, request: stream_pb2.StreamRequest) -> stream_pb2.StreamResponse:
        await self._call.write(request)
        response = await self._call.read()
        if not isinstance(response, stream_pb2.StreamResponse) or response.opened.errors or response.closed.errors:
            raise RuntimeError(f"a session could not be opened or closed: {response}")
        return response

    async def open(self, count: int) -> bytes:
        """Handles of new sessions, each of which is asked for when the one before is there."""
        frame = stream_pb2.OpenFrame(model=W, session_ids=[""], ttl_ms=60_000)
        opened = [await self._asked(stream_pb2.StreamRequest(open=frame)) for _ in range(count)]
        return b"".join(one.opened.handles for one in opened)

    async def close(self, handles: bytes) -> None:
        await self._asked(stream_pb2.StreamRequest(close=stream_pb2.CloseFrame(handles=handles)))

    async def end(self) -> None:
        self._call.cancel()
        await self._channel.close()


async def one_by_one(server: LocalServer, rounds: int) -> dict[str, Any]:
    """Opens a second, and what an open takes of the server's processors, its Redis left out."""
    devices = [Device(server.address) for _ in range(CONNECTIONS)]
    first = await asyncio.gather(*(device.open(1) for device in devices))
    await asyncio.gather(*(device.close(one) for device, one in zip(devices, first, strict=True)))
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        busy, began = _cpu_s(server), time.monotonic()
        handles = await asyncio.gather(*(device.open(EACH) for device in devices))
        count, took = CONNECTIONS * EACH, time.monotonic() - began
        rows.append({"opens_per_s": count / took, "cpu_ms": 1000 * (_cpu_s(server) - busy) / count})
        await asyncio.gather(*(device.close(some) for device, some in zip(devices, handles, strict=True)))
    await asyncio.gather(*(device.end() for device in devices))
    return {"connections": CONNECTIONS, "rounds": rows} | {
        name: float(np.median([row[name] for row in rows])) for name in ("opens_per_s", "cpu_ms")
    }


def _cpu_s(server: LocalServer) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in server.processes()))


def _lines(process: subprocess.Popen[str]) -> list[str]:
    process.terminate()
    assert process.stdout is not None
    return process.stdout.readlines()


async def stepped(sessions: list[engram.Session], seconds: float) -> list[float]:
    """Seconds from each step to its answer."""
    waits: list[float] = []
    end, input_row = time.monotonic() + seconds, np.zeros(64, np.float32)

    async def pump(session: engram.Session) -> None:
        while (began := time.monotonic()) < end:
            await session.step(input_row)
            waits.append(time.monotonic() - began)
            await asyncio.sleep(PACE_S)

    await asyncio.gather(*map(pump, sessions))
    return waits


def _at(waits: list[float], share: float) -> float:
    return 1000 * float(np.quantile(waits, share))


def page(found: dict[str, Any]) -> str:
    on = found["machine"]
    lines = [
        "# Opens beside steps", "",
        f"`make bench-opens`, {found['date']}, {on['cores']} cores, {on['processor']}. {STEPPING} sessions of W step; beside",
        f"them {OPENED:,} sessions at a time are opened. Medians over the rounds.", "",
        "| beside | p50 ms | p99 ms | opened a round |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, rounds in found["rounds"].items():
        p50, p99, opened = (float(np.median([one[key] for one in rounds])) for key in ("p50_ms", "p99_ms", "opened"))
        lines.append(f"| {name} | {p50:.1f} | {p99:.1f} | {opened:,.0f} |")
    ratios = ", ".join(f"{ratio:.2f}" for ratio in found["ratios"])
    lines += ["", f"p99 beside opens at this server, over that beside opens at the other one: {found['ratio']:.2f}"]
    lines += [f"(by round: {ratios}; the goal is below 3).", ""]
    alone = found["one by one"]
    lines += [
        f"{alone['connections']} connections that open sessions one by one, nothing else: {alone['opens_per_s']:,.0f} opens a"
    ]
    lines += [f"second, each {alone['cpu_ms']:.2f} ms of the server's processors.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
