"""`make bench-connections`: independent connections, a gateway, unary calls, TLS, idle ones; docs/benchmarks/connections.*.

W, driven by native/load, which costs little itself. In the same run, in turns: this server; an older checkout (`--against`); the
prototype of its wire (`--prototype`); mosec with the cell in its process (`--mosec`, a virtual environment that is made if it is
not there); a client on gRPC's C++ library (`--cpp-client`); the native wire with nothing behind it; plain libraries in a loop.
What is not given is left out. Outputs of a session's first steps are compared with plain ONNX Runtime's. Needs cargo; the
machine should have nothing else to do. Of the rows that `--rows` names, all if it names none, as docs/benchmarks has them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from connection_contestants import (
    ROOT,
    Target,
    echo,
    has_flag,
    mosec,
    mosec_python,
    older,
    prototype,
    server,
    write_weights,
)  # fmt: skip
from connection_goals import CLOSED, GATEWAY, IDLE, PACED, TLS, UNARY, Goal, goals

from engram._json import json_text
from engram_service.bench.ceiling import Ceiling
from engram_service.bench.load import input_pool
from engram_service.bench.report import machine
from engram_service.bench.workload import reference, workload_w

DIRECTORY = ROOT / "docs" / "benchmarks"
LOAD = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "native" / "target")) / "release" / "engram-load"
VARIANTS, STEPS, SEED = 8, 50, 11
FILES = 32768  # descriptors that a server and its load may need
LATE_S = 240.0
FIGURES = ("steps_per_s", "p50_ms", "p99_ms", "oldest_ms", "client_cores", "server_cores", "redis_cores", "kb_each")


@dataclass(frozen=True)
class Row:
    name: str
    sessions: int
    connections: int
    flags: tuple[str, ...] = ()  # of the load


ROWS = [
    *(Row(name, int(name.replace(",", "")), int(name.replace(",", ""))) for name in CLOSED),
    Row(GATEWAY, 1024, 8),
    *(Row(name, int(name.split()[0]), int(name.split()[0]), ("--protocol", "unary")) for name in UNARY),
    Row(TLS, 1024, 1024),
    Row(PACED, 10_000, 10_000, ("--rate", "1")),
    Row(IDLE, 10_000, 10_000, ("--idle",)),
]
STREAMS = (*CLOSED, GATEWAY)
NAMES = [row.name for row in ROWS]

Start = Callable[[], AbstractContextManager[Target]]


@dataclass(frozen=True)
class Contestant:
    """start: for one measurement; targets that live through the run are handed out again."""

    name: str
    start: Start
    rows: tuple[str, ...]
    flags: tuple[str, ...] = ()  # of the load
    checked: bool = True
    cpp: bool = False


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    command = ["cargo", "build", "--release", "--locked", "--quiet", "-p", "engram-load"]
    subprocess.run(command, cwd=ROOT / "native", check=True)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch, ExitStack() as stack:
        directory = Path(scratch)
        write_reference(directory / "reference")
        contestants = [*lasting(args, directory, stack), *passing(args, directory)]
        contestants = [one for one in contestants if not args.peers or one.name in args.peers]
        alone = [] if args.peers else ceilings(args)
        for number in range(args.rounds):
            for row in (row for row in ROWS if row.name in args.rows):
                for one in (one for one in contestants if row.name in one.rows):
                    with one.start() as target:
                        figures = drive(row, one, target, directory / "reference", args)
                    found.setdefault((row.name, one.name), []).append(figures)
                    say(f"round {number + 1}, {row.name}, {one.name}: {figures}")
                for name, ceiling in alone:
                    if ceiling.batch == row.sessions and row.name in STREAMS[:-1]:
                        rate = ceiling.rate()
                        figures = {
                            "steps_per_s": rate,
                            "p50_ms": 1000 * row.sessions / rate,
                            "failures": 0,
                            "sound": True,
                        }
                        found.setdefault((row.name, name), []).append(figures)
    rows = {key: summary(each) for key, each in found.items()}
    judged = list(goals(rows))
    text = page(rows, judged, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "connections.md").write_text(text)
    results = [{"row": row, "contestant": name, **figures} for (row, name), figures in rows.items()]
    described = {"machine": machine(), "results": results, "goals": [one.cells() for one in judged]}
    (args.out / "connections.json").write_text(json_text(described, indent=2) + "\n")
    print(text)
    return 0 if all(row["sound"] for (_, name), row in rows.items() if name in ("step", "interval")) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3, help="of each case; medians count (default: 3)")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--peers", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--redis", default="", metavar="URL", help="of the server (default: a private one)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="an older checkout")
    parser.add_argument("--prototype", type=Path, metavar="DIR", help="the built prototype")
    parser.add_argument(
        "--mosec", type=Path, metavar="DIR", help="a virtual environment with it, made if it is not there"
    )
    parser.add_argument("--mosec-batch", type=int, default=1024, help="its max_batch_size (default: 1024)")
    parser.add_argument("--cpp-client", type=Path, metavar="PATH", help="the load client on gRPC's C++ library")
    parser.add_argument("--out", type=Path, default=DIRECTORY)
    return parser.parse_args()


def lasting(args: argparse.Namespace, directory: Path, stack: ExitStack) -> Iterator[Contestant]:
    """Those that are started when they are first driven, and live through the run."""

    def once(start: Start) -> Start:
        running: list[Target] = []

        @contextmanager
        def target() -> Iterator[Target]:
            if not running:
                running.append(stack.enter_context(start()))
            yield running[0]

        return target

    weights = write_weights(directory)
    own = once(partial(server, directory, "server", redis=args.redis))
    yield Contestant("step", own, (*STREAMS, *UNARY, PACED))
    yield Contestant("interval", own, STREAMS, ("--interval",))
    if has_flag("--wire"):
        fallback = once(partial(server, directory, "python", ("--wire", "python"), args.redis))
        yield Contestant("python step", fallback, (*STREAMS, *UNARY))
        yield Contestant("python interval", fallback, STREAMS, ("--interval",))
    if args.against:
        old = once(partial(older, directory, args.against, weights))
        yield Contestant("older step", old, (*STREAMS, *UNARY))
        yield Contestant("older interval", old, STREAMS, ("--interval",))
    if args.mosec:
        python = mosec_python(args.mosec)
        for kind in ("torch", "onnx"):
            start = once(partial(mosec, directory, python, weights, kind, args.mosec_batch))
            yield Contestant(f"mosec {kind}", start, CLOSED, ("--protocol", "http"))
    yield Contestant("wire", once(echo), (*STREAMS, *UNARY), checked=False)
    if args.cpp_client:
        yield Contestant("C++ step", own, STREAMS, cpp=True)
        yield Contestant("C++ interval", own, STREAMS, ("--interval",), cpp=True)


def passing(args: argparse.Namespace, directory: Path) -> Iterator[Contestant]:
    """Those that are started for each measurement: what is at rest, or never forgets a session."""
    yield Contestant("step", partial(server, directory, "tls", redis=args.redis, tls=True), (TLS,))
    yield Contestant("step", partial(server, directory, "idle", redis=args.redis), (IDLE,))
    if args.against:
        weights = directory / "weights.npz"
        yield Contestant("older step", partial(older, directory, args.against, weights), (IDLE,))
    if not args.prototype:
        say("left out, for it was not given: the prototype (--prototype DIR)")
        return
    for name, durable in (("prototype durable", True), ("prototype volatile", False)):
        start = partial(prototype, directory, args.prototype, durable)
        yield Contestant(name, start, (*STREAMS, *((PACED, IDLE) if durable else ())))
        if args.cpp_client:
            yield Contestant(f"C++ {name}", start, STREAMS, cpp=True)


@dataclass
class Alone:
    """A plain library in a loop, batches of so many rows."""

    batch: int
    ceiling: Ceiling

    def rate(self) -> float:
        return self.ceiling.window()


def ceilings(args: argparse.Namespace) -> list[tuple[str, Alone]]:
    work = workload_w()
    batches = [row.sessions for row in ROWS if row.name in args.rows and row.name in CLOSED]
    window_s = min(1.0, args.seconds / 4)
    return [
        (f"plain {plain.name}", Alone(batch, Ceiling(plain, work.input_shape, batch, window_s)))
        for batch in batches
        for plain in work.plains
    ]


def write_reference(path: Path) -> None:
    """Inputs and outputs of W, as native/load reads them."""
    work = workload_w()
    pool = input_pool(SEED, VARIANTS, work.input_shape)
    inputs = np.stack([pool[step % len(pool)] for step in range(STEPS)]).swapaxes(0, 1)
    outputs = reference(work.plains[0], work.input_shape, SEED, VARIANTS, STEPS).swapaxes(0, 1)
    head = struct.pack("<4I", VARIANTS, STEPS, inputs.shape[2], outputs.shape[2])
    path.write_bytes(head + inputs.astype("<f4").tobytes() + outputs.astype("<f4").tobytes())


def drive(row: Row, one: Contestant, target: Target, own: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement. `sound`: no connection was lost, and outputs were right, where there are any."""
    if one.cpp:
        return drive_cpp(row, one, target, own, args)
    command = [
        LOAD, target.address, "--model", target.model, "--reference", target.reference or own, "--sessions", row.sessions,
        "--connections", row.connections, "--seconds", args.seconds, "--warm-up", args.warm_up, *row.flags, *one.flags,
        *(("--tls-ca", target.tls_ca) if target.tls_ca else ()),
    ]  # fmt: skip
    say(f"{row.name}, {one.name}")
    before = target.memory()
    with tempfile.TemporaryFile("w+") as errors:
        load = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, text=True)
        assert load.stdout is not None
        load.stdout.readline()  # the window begins
        cpu, began = target.cpu_s(), time.monotonic()
        held = target.memory() - before
        said, _ = load.communicate(timeout=args.seconds + LATE_S)
        used, took = target.cpu_s(), time.monotonic() - began
        errors.seek(0)
        told = errors.read().strip()
    if told:
        say(told)
    if load.returncode or not said:
        return {"steps_per_s": 0.0, "failures": row.connections, "why": told[-300:], "sound": False}
    found: dict[str, Any] = json.loads(said)
    found["server_cores"], found["redis_cores"] = ((now - then) / took for now, then in zip(used, cpu, strict=True))
    if row.name == IDLE:
        found["kb_each"] = held / 1000 / max(1, row.connections - found["failures"])
    right = found["outputs_equal"] or not one.checked or row.name == IDLE
    return {**found, "sound": not found["failures"] and right}


def drive_cpp(row: Row, one: Contestant, target: Target, own: Path, args: argparse.Namespace) -> dict[str, Any]:
    options = [f"model={target.model}", *(["interval=1"] if one.flags else [])]
    options += ["frames=8"] if row.name == GATEWAY else []
    command = [args.cpp_client.resolve(), "engram", target.address, row.sessions, 1, row.connections, args.warm_up, args.seconds,
               target.reference or own, *options]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    said = dict(re.findall(r"(\S+)=(\S+)", done.stdout))
    if "steps/s" not in said:
        return {"steps_per_s": 0.0, "failures": row.connections, "why": done.stderr[-300:], "sound": False}
    return {
        "steps_per_s": float(said["steps/s"]), "p50_ms": float(said["p50_us"]) / 1000, "p99_ms": float(said["p99_us"]) / 1000,
        "client_cores": float(said["cpu_client"]),
        "failures": int(said["errors"]), "why": done.stderr.strip()[:300], "sound": done.stdout.strip().endswith(" ok"),
    }  # fmt: skip


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians; the most failures of a round."""
    figures: dict[str, Any] = {}
    for name in FIGURES:
        values = [one[name] for one in found if one.get(name) is not None]
        figures[name] = float(np.median(values)) if values else None
    return {
        **figures,
        "each": [one["steps_per_s"] for one in found],
        "failures": max(one["failures"] for one in found),
        "sound": all(one["sound"] for one in found),
        "why": "; ".join(sorted({one["why"] for one in found if one.get("why")})),
    }


def page(rows: dict[tuple[str, str], dict[str, Any]], judged: list[Goal], args: argparse.Namespace) -> str:
    on, names = machine(), list(dict.fromkeys(name for _, name in rows))
    own = [row for row in NAMES if any(row == one for one, _ in rows)]
    lines = [
        "# Independent connections", "",
        f"`make bench-connections`, {datetime.now(UTC):%Y-%m-%d}, {on['cores']} cores, {on['processor']}. W, closed loop unless a",
        "rate is named, one session a connection but over 8 streams; servers, load client and Redis share the machine; windows of",
        f"{args.seconds:g} s after {args.warm_up:g}, medians of {args.rounds} rounds, contestants in turns; steps/s (p50 /",
        "p99 ms). *step*, *interval*: the durability. *older*: an older edition; *prototype*: of the wire, without the service's",
        "checks; *mosec*: 0.9.8 over HTTP/1.1, volatile; *wire*: the native wire with nothing behind it; *plain*: the library in a",
        "loop, batches of so many, no serving. *C++*: driven by a client on gRPC's C++ library, all else by native/load.", "",
        *table(["connections", *names], [[row, *(cell(rows.get((row, name))) for name in names)] for row in own]), "",
        "## Goals", "",
        *table(["ratio", "connections", "value", "goal", "met"], [one.cells() for one in judged]), "",
        "## Processor", "", "Microseconds of a core for each step: server / its Redis / the load client.", "",
        *table(["connections", *names], [[row, *(cost(rows.get((row, name))) for name in names)] for row in own]), "",
    ]  # fmt: skip
    whys = [f"- {row}, {name}: {one['why']}" for (row, name), one in rows.items() if one["why"]]
    return "\n".join([*lines, *(["## Connections that ended early", "", *whys, ""] if whys else [])])


def table(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---:"] * len(head), *body)]


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    wrong = (
        "" if row["sound"] else f" NOT SOUND ({row['failures']} ended early)" if row["failures"] else " OUTPUTS DIFFER"
    )
    if row["kb_each"] is not None:
        return f"{row['kb_each']:.1f} KB each{wrong}"
    times = " / ".join(f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms") if row[name] is not None)
    return f"{row['steps_per_s']:,.0f}{f' ({times})' if times else ''}{wrong}"


def cost(row: dict[str, Any] | None) -> str:
    names = ("server_cores", "redis_cores", "client_cores")
    if row is None or not row["steps_per_s"] or all(row[name] is None for name in names):
        return ""
    return " / ".join("-" if row[name] is None else f"{1e6 * row[name] / row['steps_per_s']:.1f}" for name in names)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
