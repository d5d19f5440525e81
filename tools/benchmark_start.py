"""`make bench-start`: from `engram serve` to the first answered step, and the server's memory; docs/benchmarks/start.md and .json.

A server with one LSTM and a private Redis is started again and again, and a client that waits for it opens a session and steps
it. Cold: nothing that is installed is in the page cache, and nothing was kept by an earlier start. Warm: both are. `--against
DIR` does the same with an older checkout, in turns with this one.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from engram._json import json_text
from engram_service.bench.report import machine
from engram_service.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "docs" / "benchmarks"
PACKAGES = ("clients/python", "service", "models")
THIS = "this one"
RATIO_GOAL, PSS_GOAL_MB = 0.3, 150  # of an older edition's start, warm; of memory
START_S, STOP_S, SETTLE_S = 120.0, 40.0, 1.0

# Waits with all its imports done; then looks for the server's port, opens a session and steps it.
CLIENT = """
import socket, sys, time
import numpy as np, engram
host, port = sys.argv[1].split(":")
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + float(sys.argv[2])
while True:
    try:
        socket.create_connection((host, int(port)), 1).close()
        with engram.Client(sys.argv[1], engram.ClientOptions(backoff_initial_s=0.01, backoff_max_s=0.05)) as client:
            session = client.open("bench-w")
            session.step(np.zeros(64, np.float32))
            print(time.monotonic(), flush=True)
            for _ in range(100):
                session.step(np.zeros(64, np.float32))
            print("stepped", flush=True)
            sys.stdin.readline()
        break
    except (OSError, engram.EngramError) as error:
        if time.monotonic() > end:
            sys.exit(f"no answer: {error}")
        time.sleep(0.005)
"""


@dataclass(frozen=True)
class Edition:
    """A checkout and the Python that has what it needs."""

    name: str
    tree: Path
    python: str

    def environment(self, home: Path) -> dict[str, str]:
        """Whatever it keeps between starts, it keeps in `home`."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("ENGRAM_", "XDG_"))}
        path = os.pathsep.join(str(self.tree / package) for package in PACKAGES)
        return {**own, "PYTHONPATH": path, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


@dataclass(frozen=True)
class Start:
    answered_s: float
    cpu_s: float  # until a second after it had answered a hundred steps; a busy machine does not lengthen it much
    pss_mb: float
    rss_mb: float  # of its largest process
    processes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="warm starts of each edition; the median counts (default: 5)"
    )
    parser.add_argument("--cold-rounds", type=int, default=2)
    parser.add_argument("--against", type=Path, metavar="DIR", help="an older checkout")
    parser.add_argument("--against-python", default=sys.executable, metavar="PYTHON", help="with what that one needs")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of start.md and start.json")
    args = parser.parse_args()
    editions = [Edition(THIS, ROOT, sys.executable)]
    if args.against:
        editions.append(Edition(commit(args.against), args.against.resolve(), args.against_python))
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        starts = measure(editions, Path(scratch), args.rounds, args.cold_rounds)
    described = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "rounds": args.rounds}
    found = {**described, "editions": {one.name: summary(starts[one.name]) for one in editions}}
    if args.against:
        this, older = (found["editions"][one.name] for one in editions)
        found["ratio"] = this["warm_s"] / older["warm_s"]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "start.json").write_text(json_text(found, indent=2) + "\n")
    (args.out / "start.md").write_text(page(found))
    print(page(found))
    return 0


def commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "the older one"


def measure(editions: list[Edition], scratch: Path, rounds: int, cold_rounds: int) -> dict[str, dict[str, list[Start]]]:
    starts: dict[str, dict[str, list[Start]]] = {one.name: {"cold": [], "warm": []} for one in editions}
    models = {one.name: bundle(one, scratch) for one in editions}
    for number in range(cold_rounds + 1 + rounds):
        for one in editions:
            how = "cold" if number < cold_rounds else "warm"
            home = scratch / f"{one.name}-{number if how == 'cold' else 'warm'}"
            if how == "cold":
                forget_files(one)
            start = once(one, models[one.name], home)
            say(f"{one.name}, {how}: {start}")
            if number != cold_rounds:  # the first of the warm ones makes what the others find
                starts[one.name][how].append(start)
    return starts


def bundle(edition: Edition, scratch: Path) -> Path:
    """W as that edition writes it."""
    directory = scratch / f"{edition.name}-models"
    command = [edition.python, "-m", "engram", "bench", "--write-bundle", str(directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=edition.environment(scratch), cwd=scratch)
    return directory


def once(edition: Edition, models: Path, home: Path) -> Start:
    """One start, in processes of its own. Raises SystemExit where it does not answer."""
    home.mkdir(parents=True, exist_ok=True)
    address, environment = f"127.0.0.1:{free_port()}", edition.environment(home)
    flags = [
        "--listen",
        address,
        "--http",
        f"127.0.0.1:{free_port()}",
        "--data-dir",
        str(home / "data"),
        "--models",
        str(models),
    ]
    flags += ["--shipped-models", "false", "--log-level", "warning"]
    client = subprocess.Popen(
        [edition.python, "-c", CLIENT, address, str(START_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment, cwd=home,
    )  # fmt: skip
    assert client.stdin is not None and client.stdout is not None
    client.stdout.readline()
    with (home / "server.log").open("ab") as log:
        begun = time.monotonic()
        server = subprocess.Popen(
            [edition.python, "-m", "engram", "serve", *flags], stdout=log, stderr=log, env=environment, cwd=home
        )
    try:
        client.stdin.write("go\n")
        client.stdin.flush()
        answered, stepped = client.stdout.readline(), client.stdout.readline()
        if not stepped:
            raise SystemExit(f"{edition.name} did not answer:\n{(home / 'server.log').read_text()[-2000:]}")
        time.sleep(SETTLE_S)
        return Start(float(answered) - begun, *used(server.pid))
    finally:
        client.communicate("end\n", timeout=STOP_S)
        server.send_signal(signal.SIGTERM)
        server.wait(STOP_S)


def used(pid: int) -> tuple[float, float, float, int]:
    """Of a server and its processes without Redis: seconds of CPU; MB, the sum of their proportional shares and the largest
    resident set; how many they are."""
    server = psutil.Process(pid)
    ours = [one for one in (server, *server.children(recursive=True)) if "redis" not in one.name()]
    maps, times = [one.memory_full_info() for one in ours], [one.cpu_times() for one in ours]
    cpu_s = sum(one.user + one.system + one.children_user + one.children_system for one in times)
    return cpu_s, sum(one.pss for one in maps) / 2**20, max(one.rss for one in maps) / 2**20, len(ours)


def forget_files(edition: Edition) -> None:
    """Has the kernel drop from its page cache what is installed there and not in use: a start reads it from the disk."""
    prefix = subprocess.run(
        [edition.python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    os.sync()
    for root in (Path(prefix).resolve() / "lib", *(edition.tree / package for package in PACKAGES)):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(starts: dict[str, list[Start]]) -> dict[str, Any]:
    warm = starts["warm"]
    return {
        **{f"{how}_s": statistics.median(one.answered_s for one in some) for how, some in starts.items() if some},
        **{f"{how}_cpu_s": statistics.median(one.cpu_s for one in some) for how, some in starts.items() if some},
        **{f"{how}_each_s": [one.answered_s for one in some] for how, some in starts.items()},
        "pss_mb": statistics.median(one.pss_mb for one in warm), "rss_mb": statistics.median(one.rss_mb for one in warm),
        "processes": warm[-1].processes,
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    on = found["machine"]
    lines = [
        "# Start and memory", "",
        f"`make bench-start`, {found['date']}, {on['cores']} cores, {on['processor']}, Python {on['python']}. A server with one",
        "LSTM (W) and a private Redis, from `engram serve` to the answer of the first step of a client that was there before;",
        "medians. *Cold*: nothing that is installed is in the page cache, nothing was kept by an earlier start. *Memory*: the",
        "proportional set sizes of all its processes but Redis, after a hundred steps.", "",
        "| edition | cold s | warm s | cold, s of CPU | warm, s of CPU | memory MB | largest process, resident MB | processes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, one in found["editions"].items():
        starts = [f"{one[key]:.2f}" if key in one else "-" for key in ("cold_s", "warm_s", "cold_cpu_s", "warm_cpu_s")]
        rest = [f"{one['pss_mb']:.0f}", f"{one['rss_mb']:.0f}", str(one["processes"])]
        lines.append(f"| {' | '.join([name, *starts, *rest])} |")
    this = found["editions"][THIS]
    lines += ["", f"Memory: {this['pss_mb']:.0f} MB; the goal is at most {PSS_GOAL_MB}."]
    if "ratio" in found:
        lines += [f"Warm, of the older edition's time: {found['ratio']:.2f}; the goal is at most {RATIO_GOAL}."]
    each = "; ".join(
        f"{name}: {', '.join(f'{seconds:.2f}' for seconds in one['warm_each_s'])}"
        for name, one in found["editions"].items()
    )
    lines += [f"Each warm start, in seconds: {each}.", ""]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
