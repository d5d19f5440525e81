"""Clients and checkers of others, in Go: built once, at the versions of go/go.mod, and kept for all workers and later runs.

`python tests/interop/programs.py` builds them before a suite runs; a test that finds none does it itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("go")
PACKAGES = {
    "interop": ".",
    "client": "google.golang.org/grpc/interop/client",  # grpc-go's own interop client
    "h2spec": "github.com/summerwind/h2spec/cmd/h2spec",
    "grpcurl": "github.com/fullstorydev/grpcurl/cmd/grpcurl",
    "ghz": "github.com/bojand/ghz/cmd/ghz",
}


class ProgramsMissingError(Exception):
    """Why they cannot be had here."""


def programs() -> Path:
    """The directory that has them. Raises ProgramsMissingError where there is no Go, or no module proxy."""
    go = shutil.which("go")
    if go is None:
        raise ProgramsMissingError("there is no go here, which builds grpc-go's client, h2spec, grpcurl and ghz")
    version = subprocess.run([go, "version"], check=True, capture_output=True).stdout
    sources = [path.read_bytes() for path in sorted(SOURCE.iterdir())]
    digest = hashlib.sha256(b"\0".join([version, *sources])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram-tests"
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / f"go-{digest}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            _build(go, kept)
    return kept


def _build(go: str, kept: Path) -> None:
    print("the Go programs of tests/interop are built, which takes two to five minutes the first time", file=sys.stderr)
    made = kept.with_suffix(".made")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    fetched = subprocess.run([go, "mod", "download"], cwd=SOURCE, check=False, capture_output=True, text=True)
    if fetched.returncode:
        raise ProgramsMissingError("the Go modules cannot be had here: " + fetched.stderr.strip().splitlines()[-1])
    for name, package in PACKAGES.items():
        command = [go, "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", str(made / name), package]
        subprocess.run(command, cwd=SOURCE, check=True)
    made.rename(kept)


def main() -> int:
    try:
        print(programs())
    except ProgramsMissingError as error:
        print(f"{error}; the tests that need them are skipped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
