"""`make fuzz`: hostile bytes against everything that reads bytes from outside; counts and findings in docs/results/fuzz.json.

Each target of tests/fuzz/targets runs in a process of its own. With atheris (`pip install 'engram[fuzz]'`) what covers new code
is kept in runs/fuzz and mutated further; without it, valid inputs are. Every finding is kept there as a file and named with its
error; the exit code is then 1. `--replay FILE --targets T` runs one of them again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from engram._json import json_text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))

from targets import FAULTY, NAMES, Target, target  # noqa: E402
from targets.mutation import changed, mutated  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "fuzz.json"
WORK = ROOT / "runs" / "fuzz"
FIGURES = "figures.json"
MENDED = 0.3  # of the inputs that atheris' rounds make; mended ones get deep, and take many times as long
COVERED = ("engram_service.store.record", "engram_service.patterns", "engram_service.protocols.engram", "engram_service.sessions",
           "engram_service.steps", "engram_service.scheduling", "engram_service.wire",
           "engram_models.bundle", "engram_models.spec", "engram_models.patterns")  # fmt: skip
SLOW_S = 2.0  # of processor time for one input
HANG_S = 120  # of time; the machine may be busy
MEMORY_BYTES = 6 << 30  # on top of what the imports take
FINDINGS_MAX = 20
SAY_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="for each target (default: 120)")
    parser.add_argument("--inputs", type=int, default=0, help="for each target, at most; 0 (default): as time allows")
    parser.add_argument("--targets", nargs="+", choices=(*NAMES, FAULTY), default=NAMES)
    parser.add_argument("--engine", choices=("auto", "atheris", "mutator"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--replay", type=Path, help="run one input, against each of --targets")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="where corpora and findings are kept (default: runs/fuzz)"
    )
    parser.add_argument(
        "--slow-s", type=float, default=SLOW_S, help="processor time that is too long for an input (default: 2)"
    )
    parser.add_argument("--worker", choices=(*NAMES, FAULTY), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay:
        for name in args.targets:
            target(name).fuzz_one(args.replay.read_bytes())
        return 0
    there = importlib.util.find_spec("atheris") is not None
    engine = args.engine if args.engine != "auto" else "atheris" if there else "mutator"
    if args.worker:
        work(args.worker, engine, args)
    found = supervise(engine, args)
    write(args.out, found)
    print(json_text({"inputs": found["inputs"], "findings": found["findings"], "engine": engine}))
    return 1 if found["findings"] else 0


def write(path: Path, run: dict[str, Any]) -> None:
    """Adds a run to those that the file has: inputs count in all."""
    runs = [*(json.loads(path.read_text())["runs"] if path.exists() else []), run]
    path.write_text(json_text({"inputs": sum(one["inputs"] for one in runs), "runs": runs}, indent=2) + "\n")


def supervise(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the targets side by side and puts together what they write down."""
    busy = os.getloadavg()[0]
    workers = {}
    for name in args.targets:
        folder = args.work / name
        (folder / "findings").mkdir(parents=True, exist_ok=True)
        (folder / FIGURES).unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", name, "--engine", engine, "--seconds", str(args.seconds),
                   "--inputs", str(args.inputs), "--seed", str(args.seed),
                   "--work", str(args.work), "--slow-s", str(args.slow_s)]  # fmt: skip
        with (folder / "log").open("wb") as log:
            workers[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    begun = said = time.monotonic()
    while any(worker.poll() is None for worker in workers.values()):
        time.sleep(0.2)
        if time.monotonic() - said > SAY_S:
            said = time.monotonic()
            print(
                {name: _read(args.work / name).get("inputs", 0) for name in workers},
                f"{said - begun:.0f} s",
                file=sys.stderr,
            )
    targets = {name: _ended(args.work / name, worker) for name, worker in workers.items()}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_before": round(busy, 1),
        "niceness": os.nice(0),
        "commit": _commit(),
        "engine": engine,
        "seed": args.seed,
        "inputs": sum(figures.get("inputs", 0) for figures in targets.values()),
        "findings": sum(len(figures.get("found", [])) for figures in targets.values()),
        "targets": targets,
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _ended(folder: Path, worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    figures = _read(folder)
    if worker.returncode:
        tail = (folder / "log").read_text(errors="replace")[-1000:]
        figures.setdefault("found", []).append({"error": f"the process ended with {worker.returncode}", "log": tail})
    return figures


def _read(folder: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads((folder / FIGURES).read_text())
    except (FileNotFoundError, ValueError):  # not yet, or being written
        return {}
    return figures


# In a target's own process


class Hang(Exception):
    """An input that takes too long."""


class Count:
    """What was run and what was found. Ends the process when it has been enough: atheris has no way back."""

    def __init__(self, one: Target, args: argparse.Namespace) -> None:
        self._one, self._folder = one, args.work / args.worker
        self._seconds, self._inputs_max, self._slow_s = args.seconds, args.inputs, args.slow_s
        self._inputs, self._slowest_s = 0, 0.0
        self._found: dict[str, dict[str, Any]] = {}
        self._begun = self._written = time.monotonic()
        self._rss_mb = 0.0  # after a tenth of the time: caches are full by then

    def run(self, data: bytes) -> None:
        """One input. Whatever is wrong with it is written down, and the next one may come."""
        begun = time.thread_time()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            self._one.fuzz_one(data)
        except Exception as error:
            self._find(error, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.thread_time() - begun
        self._slowest_s = max(self._slowest_s, took)
        if took > self._slow_s:
            self._find(Hang(f"{took:.1f} s of processor time"), data)
        self._inputs += 1
        if self._inputs % 64 == 0 or self._inputs == self._inputs_max:
            self._look_at_the_clock()

    def _find(self, error: Exception, data: bytes) -> None:
        where = type(error).__name__
        for frame in traceback.extract_tb(error.__traceback__)[-1:]:
            where += f" at {Path(frame.filename).name}:{frame.lineno}"
        known = self._found.get(where)
        if known is not None:
            known["times"] += 1
        elif len(self._found) < FINDINGS_MAX:
            file = self._folder / "findings" / hashlib.blake2b(data, digest_size=8).hexdigest()
            file.write_bytes(data)
            self._found[where] = {"error": f"{where}: {str(error)[:300]}", "input": file.name, "times": 1}

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        took = now - self._begun
        if not self._rss_mb and took > self._seconds / 10:
            self._rss_mb = _rss_mb()
        over = took > self._seconds or 0 < self._inputs_max <= self._inputs
        if over or now - self._written > 2:
            self._written = now
            figures = {
                "inputs": self._inputs, "seconds": round(took, 1), "inputs_per_s": round(self._inputs / took, 1),
                "slowest_s": round(self._slowest_s, 3), "rss_mb": [round(self._rss_mb), round(_rss_mb())],
                "found": list(self._found.values()),
            }  # fmt: skip
            temporary = self._folder / f"{FIGURES}.new"
            temporary.write_text(json_text(figures))
            temporary.rename(self._folder / FIGURES)
        if over:
            os._exit(0)


def work(name: str, engine: str, args: argparse.Namespace) -> NoReturn:
    """Runs one target until time or inputs are up."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no end within {HANG_S} s")

    rng = random.Random(f"{args.seed} {name}")
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=list(COVERED), enable_loader_override=False):
            one = target(name)
        corpus = args.work / name / "corpus"
        corpus.mkdir(exist_ok=True)
        seeds = _warmed(one)
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)

        def mutate(data: bytes, size_max: int, number: int) -> bytes:
            made = bytes(atheris.Mutate(data, size_max)) if rng.random() < 0.5 else changed(data, rng, seeds)
            return (one.mend(made) if rng.random() < MENDED else made)[:size_max]

        count = Count(one, args)
        options = [
            f"-seed={args.seed}",
            "-timeout=0",
            "-rss_limit_mb=0",
            "-max_len=65536",
            "-len_control=0",
            "-verbosity=0",
            f"-artifact_prefix={corpus.parent}/",
        ]
        atheris.Setup([sys.argv[0], str(corpus), *options], count.run, custom_mutator=mutate)
        _limit(hang)
        atheris.Fuzz()
        raise SystemExit("atheris ended before its time")
    one = target(name)
    seeds = _warmed(one)
    count = Count(one, args)
    _limit(hang)
    while True:
        count.run(mutated(one, seeds, rng))


def _warmed(one: Target) -> list[bytes]:
    """The valid inputs, run once: what a first one loads is not the input's doing."""
    seeds = one.seeds()
    for seed in seeds:
        one.fuzz_one(seed)
    return seeds


def _limit(hang: Any) -> None:
    """An input that asks for the machine's memory or time is to be found, and not to have it."""
    signal.signal(signal.SIGALRM, hang)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    sys.exit(main())
