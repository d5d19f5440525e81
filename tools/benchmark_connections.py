"""`make bench-connections`: one session a connection, and a gateway's eight; writes docs/benchmarks/connections.*.

W in a closed loop, driven by native/load, which costs little itself. Beside the server, in the same run: the native wire with
nothing behind it. Every output of a session's first steps is compared with plain ONNX Runtime. Needs cargo.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from engram._json import json_text
from engram_service.bench.load import input_pool
from engram_service.bench.report import machine
from engram_service.bench.workload import OUTPUT, W, reference, workload_w, write_w
from engram_service.local import LocalServer

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "docs" / "benchmarks"
LOAD = ROOT / "native" / "target" / "release" / "engram-load"
CASES = ((1, 1), (64, 64), (256, 256), (1024, 1024), (4096, 4096), (1024, 8))  # sessions, connections
VARIANTS, STEPS, SEED = 8, 50, 11
FLAGS = ("--log-level", "warning", "--log-format", "human", "--arena-slots-max", "16384")
FILES = 32768  # descriptors that a server and its load may need
PEERS = ("step", "interval", "wire")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3, help="of each case; medians count (default: 3)")
    parser.add_argument("--connections", type=int, nargs="+", help="only the cases of so many")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=DIRECTORY)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    command = ["cargo", "build", "--release", "--locked", "--quiet", "-p", "engram-load"]
    subprocess.run(command, cwd=ROOT / "native", check=True)
    cases = [case for case in CASES if not args.connections or case[1] in args.connections]
    results: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        bundle = write_w(directory / "models")
        write_reference(directory / "reference")
        with echo() as wire, LocalServer(directory / "server", bundle.parent.parent, FLAGS) as server:
            for _ in range(args.rounds):
                for sessions, connections in cases:
                    for peer in args.peers:
                        address = wire if peer == "wire" else server.address
                        found = load(address, directory / "reference", sessions, connections, peer, args)
                        results.setdefault((sessions, connections, peer), []).append(found)
                        print(peer, found, file=sys.stderr, flush=True)
    rows = [summary(*key, found) for key, found in results.items()]
    text = page(rows, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "connections.md").write_text(text)
    (args.out / "connections.json").write_text(json_text({"machine": machine(), "results": rows}, indent=2) + "\n")
    print(text)
    return 0 if all(row["sound"] for row in rows) else 1


def write_reference(path: Path) -> None:
    """Inputs and outputs of W, as native/load reads them."""
    work = workload_w()
    pool = input_pool(SEED, VARIANTS, work.input_shape)
    inputs = np.stack([pool[step % len(pool)] for step in range(STEPS)]).swapaxes(0, 1)
    outputs = reference(work.plains[0], work.input_shape, SEED, VARIANTS, STEPS).swapaxes(0, 1)
    head = struct.pack("<4I", VARIANTS, STEPS, inputs.shape[2], outputs.shape[2])
    path.write_bytes(head + inputs.astype("<f4").tobytes() + outputs.astype("<f4").tobytes())


@contextmanager
def echo() -> Iterator[str]:
    command = [sys.executable, str(ROOT / "tools" / "wire_echo.py"), "--outputs", str(OUTPUT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


def load(
    address: str, reference_file: Path, sessions: int, connections: int, peer: str, args: argparse.Namespace
) -> dict[str, Any]:
    command = [LOAD, address, "--model", W, "--reference", reference_file, "--sessions", sessions, "--connections", connections,
               "--seconds", args.seconds, "--warm-up", args.warm_up, *(["--interval"] if peer == "interval" else [])]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"steps_per_s": 0.0, "failures": 1, "why": done.stderr.strip()[-200:], "outputs_equal": False}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summary(sessions: int, connections: int, peer: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians. `sound`: no connection was lost, and the outputs were right, where there are any."""
    figures = {
        name: float(np.median([one.get(name, 0.0) for one in found]))
        for name in ("steps_per_s", "p50_ms", "p99_ms", "client_cores")
    }
    sound = all(not one["failures"] and (peer == "wire" or one["outputs_equal"]) for one in found)
    why = "; ".join(sorted({one["why"] for one in found if one["why"]}))
    each = [one["steps_per_s"] for one in found]
    return {
        "sessions": sessions,
        "connections": connections,
        "peer": peer,
        **figures,
        "each": each,
        "sound": sound,
        "why": why,
    }


def page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    on = machine()
    peers = [peer for peer in PEERS if peer in args.peers]
    lines = [
        "# Independent connections", "",
        f"`make bench-connections`, {datetime.now(UTC):%Y-%m-%d}, {on['cores']} cores, {on['processor']}. W, closed loop,",
        "one session a connection but in the last row; load client, server and Redis share the machine; windows of",
        f"{args.seconds:g} s, medians of {args.rounds} rounds; steps/s (p50 / p99 ms). *step*, *interval*: the durability.",
        "*wire*: the native wire with nothing behind it, neither model nor Redis; the server does not use it yet.", "",
        "| connections | sessions | " + " | ".join(peers) + " |", "|---:|---:|" + "---:|" * len(peers),
    ]  # fmt: skip
    for sessions, connections in dict.fromkeys((row["sessions"], row["connections"]) for row in rows):
        own = {row["peer"]: row for row in rows if (row["sessions"], row["connections"]) == (sessions, connections)}
        cells = [
            f"{own[peer]['steps_per_s']:,.0f} ({own[peer]['p50_ms']:.2f} / {own[peer]['p99_ms']:.2f})"
            + ("" if own[peer]["sound"] else f" NOT SOUND: {own[peer]['why'] or 'outputs differ'}")
            for peer in peers
        ]
        lines.append(f"| {connections:,} | {sessions:,} | {' | '.join(cells)} |")
    cores = statistics.median(row["client_cores"] for row in rows)
    return "\n".join([*lines, "", f"The load client took {cores:.2f} of a core (median of the rows).", ""])


if __name__ == "__main__":
    sys.exit(main())
