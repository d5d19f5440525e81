"""`make bench-speech`: how many sessions of a speech-activity model in real time; docs/benchmarks/speech.md and .json.

The model is silero_vad.onnx of the PyPI package silero-vad, imported by `engram models import`. A session sends a frame of 32 ms
each 32 ms, whether the last one was answered or not; the time of an answer counts from when its frame was due. Sessions are in real
time where 99 of 100 answers come before the next frame is due. One client process has all sessions, in groups that are due one
after the other. Beside it, in the same run: the same graph in plain ONNX Runtime, batched, with nothing around it (the ceiling),
and a loop over the package's own wrapper, one for each session, in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import engram
from engram._json import json_text
from engram_service.bench.report import machine
from engram_service.local import LocalServer

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
MODEL, RATE, FRAME, CONTEXT = "vad", 16000, 512, 64
PERIOD_S = FRAME / RATE
FLAGS = ("--constant", f"sr={RATE}", "--context", f"input={CONTEXT}", "--shape", f"input={FRAME}")
DURABILITIES = ("step", "interval")
GROUPS, CONNECTIONS = 4, 2
BEHIND_MAX = 10  # frames of one group under way; with more the sessions are not in real time
STEP, STEPS = 0.0625, 16  # sessions are tried in parts of what the ceiling allows, up to all of it
TRIES = 2  # of a size that seems to be too many: the machine may have been busy elsewhere
BATCHES, THREADS = (64, 256), (1, 2)
SERVER = ("--shipped-models", "false", "--log-level", "warning")
TEXT = """\
# Speech activity in real time

Written by `make bench-speech` on {date}. {model}; each session sends {frame} samples each {period:.0f} ms.

Engram: one client process with {connections} connections and {groups} groups of sessions that are due in turn, server and Redis
on this machine; the most sessions of which 99 of 100 answers come within {period:.0f} ms of when the frame was due. The others:
frames/s x {period:.0f} ms, whatever the latency.

{machine}
- load of the machine before: {busy:.1f}

| what | sessions | p99 ms | of the ceiling |
|---|---:|---:|---:|
{rows}

The ceiling is plain ONNX Runtime in {best}: it has the machine for itself, Engram shares it with its clients and Redis.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each trial (default: 4)")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of speech.md and speech.json")
    parser.add_argument("--client", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--sessions", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        return asyncio.run(client(args.client, args.sessions, args.seconds))
    try:
        graph = graph_of_package()
    except importlib.metadata.PackageNotFoundError:
        return refuse("there is no model to measure: pip install --no-deps silero-vad")
    found = measured(graph, args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speech.json").write_text(json_text(found, indent=2) + "\n")
    (args.out / "speech.md").write_text(page(found))
    print(page(found))
    return 0


def measured(graph: Path, seconds: float) -> dict[str, Any]:
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        directory = Path(scratch)
        say("imports the model")
        command = (
            sys.executable,
            "-m",
            "engram",
            "models",
            "import",
            str(graph),
            "--models",
            str(directory / "models"),
        )
        subprocess.run([*command, "--name", MODEL, *FLAGS], check=True, stdout=subprocess.DEVNULL)
        say("plain ONNX Runtime, and the package's wrapper")
        before = ceiling(graph, seconds / 4)
        wrapper, wrapper_kind = alone(graph, seconds / 2)
        with LocalServer(directory / "server", directory / "models", SERVER) as server:
            sessions = {name: searched(server.address, name, max(before.values()), seconds) for name in DURABILITIES}
        after = ceiling(graph, seconds / 4)
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    best = max(rates, key=lambda name: rates[name])
    version = importlib.metadata.version("silero-vad")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(),
        "load_before": busy, "model": f"silero-vad {version}",
        "ceilings_sessions": {name: rate * PERIOD_S for name, rate in rates.items()}, "ceiling": best,
        "wrapper": wrapper_kind, "wrapper_sessions": wrapper * PERIOD_S, "engram": sessions,
        "of_ceiling": {name: one["sessions"] / (rates[best] * PERIOD_S) for name, one in sessions.items()},
    }  # fmt: skip


def graph_of_package() -> Path:
    """Raises PackageNotFoundError."""
    files = importlib.metadata.files("silero-vad") or []
    return next(Path(str(file.locate())) for file in files if file.name == "silero_vad.onnx")


# Without a server


def plain(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def ceiling(graph: Path, seconds: float) -> dict[str, float]:
    """Frames/s of the documented loop over whole batches, by batch and threads."""
    found = {}
    for threads in THREADS:
        session = plain(graph, threads)
        for batch in BATCHES:
            frames, step = noise(batch), Loop(session, batch).step
            found[f"batches of {batch}, {threads} thread{'s' * (threads > 1)}"] = batch * rate(
                lambda step=step, frames=frames: step(frames), seconds
            )
    return found


class Loop:
    """What somebody without a server writes around the graph."""

    def __init__(self, session: onnxruntime.InferenceSession, rows: int) -> None:
        self._session = session
        self._state, self._rate = np.zeros((2, rows, 128), np.float32), np.array(RATE, np.int64)
        self._taken = np.zeros((rows, CONTEXT + FRAME), np.float32)

    def step(self, frames: NDArray[np.float32]) -> Any:
        self._taken[:, :CONTEXT] = self._taken[:, FRAME:]
        self._taken[:, CONTEXT:] = frames
        feeds = {"input": self._taken, "state": self._state, "sr": self._rate}
        found, self._state = self._session.run(None, feeds)
        return found


def alone(graph: Path, seconds: float) -> tuple[float, str]:
    """Frames/s of one process with a wrapper for each of 16 sessions; what wrapper it was."""
    steps: list[Any]
    try:
        import torch
        from silero_vad.utils_vad import OnnxWrapper

        wrappers = [OnnxWrapper(str(graph), force_onnx_cpu=True) for _ in range(16)]
        frames, kind = torch.from_numpy(noise(1)), "the package's OnnxWrapper"
        steps = [lambda one=one: one(frames, RATE) for one in wrappers]
    except ImportError:
        kind, session = "the package's loop, written anew (its wrapper does not import here)", plain(graph, 1)
        steps = [lambda one=Loop(session, 1): one.step(noise(1)) for _ in range(16)]

    def everybody() -> None:
        for step in steps:
            step()

    return 16 * rate(everybody, seconds), kind


def rate(call: Any, seconds: float) -> float:
    """Calls/s."""
    call()
    count, begun = 0, time.perf_counter()
    while (took := time.perf_counter() - begun) < seconds:
        call()
        count += 1
    return count / took


def noise(rows: int) -> NDArray[np.float32]:
    return (np.random.default_rng(3).standard_normal((rows, FRAME)) * 0.1).astype(np.float32)


# With one


def searched(address: str, durability: str, frames_per_s: float, seconds: float) -> dict[str, Any]:
    """The most sessions that are in real time, by halving."""
    whole = frames_per_s * PERIOD_S
    sizes = [max(GROUPS, round(whole * STEP * part)) for part in range(1, STEPS + 1)]
    command = (sys.executable, __file__, "--client", address, "--sessions", str(sizes[-1]), "--seconds", str(seconds))
    good, low, high = {"sessions": 0, "p50_ms": None, "p99_ms": None}, -1, len(sizes)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{durability}\n")
        while high - low > 1:
            place = (low + high) // 2
            for _ in range(TRIES):
                process.stdin.write(f"{sizes[place]}\n")
                process.stdin.flush()
                told = json.loads(process.stdout.readline())
                if fits := told["kept_up"] and told["p99_ms"] < 1000 * PERIOD_S:
                    break
            say(f"{durability}: {sizes[place]} sessions, p99 {told['p99_ms']:.1f} ms{'' if fits else ': too many'}")
            if fits:
                low, good = place, {"sessions": sizes[place], "p50_ms": told["p50_ms"], "p99_ms": told["p99_ms"]}
            else:
                high = place
        process.stdin.close()
    return good


async def client(address: str, sessions: int, seconds: float) -> int:
    """The process with the sessions: a line of stdin is how many of them shall send, a line of stdout what came of it."""
    said = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), sys.stdin)
    durability = (await said.readline()).decode().strip()
    clients = [engram.AsyncClient(address, engram.ClientOptions(timeout_s=60.0)) for _ in range(CONNECTIONS)]
    for one in clients:
        await one.connect()
    groups = []
    for number, places in enumerate(np.array_split(np.arange(sessions), GROUPS)):
        one = clients[number % CONNECTIONS]
        groups.append(Group(one, await one.open_many(MODEL, len(places), durability=durability), number))
    while line := await said.readline():
        share = np.array_split(np.arange(int(line)), GROUPS)
        begun = time.perf_counter() + 0.05
        await asyncio.gather(
            *(group.send(len(part), begun, seconds) for group, part in zip(groups, share, strict=True))
        )
        waits = 1000 * np.concatenate([group.waits for group in groups])
        told = {
            "p50_ms": float(np.median(waits)), "p99_ms": float(np.quantile(waits, 0.99)),
            "kept_up": all(group.kept_up for group in groups),
        }  # fmt: skip
        print(json_text(told), flush=True)
    for one in clients:
        await one.aclose()
    return 0


class Group:
    """Sessions whose frames are due at the same moment, and leave as one."""

    def __init__(self, owner: engram.AsyncClient, sessions: list[engram.Session], number: int) -> None:
        self._owner, self._sessions = owner, sessions
        self._offset_s = number * PERIOD_S / GROUPS
        self._frames = noise(len(sessions))
        self.waits: NDArray[np.float64] = np.zeros(0)
        self.kept_up = True

    async def send(self, count: int, begun: float, seconds: float) -> None:
        """As long as it keeps up."""
        sessions, frames = self._sessions[:count], self._frames[:count]
        waits: list[float] = []
        self.kept_up = True

        async def step(due: float) -> None:
            await self._owner.step_many(sessions, frames)
            waits.append(time.perf_counter() - due)

        waiting: set[asyncio.Task[None]] = set()
        for number in range(round(seconds / PERIOD_S)):
            due = begun + self._offset_s + number * PERIOD_S
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(waiting) > BEHIND_MAX:
                self.kept_up = False
                break
            task = asyncio.create_task(step(due))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)
        self.waits = np.repeat(waits, count)


# Results


def page(found: dict[str, Any]) -> str:
    best = found["ceiling"]
    rows = [
        f"| plain ONNX Runtime, {name} | {count:,.0f} | - | - |" for name, count in found["ceilings_sessions"].items()
    ]
    rows.append(f"| {found['wrapper']}, one for each session, one process | {found['wrapper_sessions']:,.0f} | - | - |")
    for name, one in found["engram"].items():
        p99 = "-" if one["p99_ms"] is None else f"{one['p99_ms']:.1f}"
        rows.append(f"| Engram, `{name}` | {one['sessions']:,} | {p99} | {found['of_ceiling'][name]:.2f} |")
    return TEXT.format(
        date=found["date"], busy=found["load_before"],
        model=found["model"], frame=FRAME, period=1000 * PERIOD_S, connections=CONNECTIONS, groups=GROUPS,
        machine="\n".join(f"- {key}: {value}" for key, value in found["machine"].items()), rows="\n".join(rows), best=best,
    )  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse(text: str) -> int:
    say(f"make bench-speech: {text}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
