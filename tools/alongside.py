"""A benchmark's own file once more, in a process of its own: what competes with what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def alongside(*arguments: str, says: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Runs the script that was started with these arguments until the block ends, which begins when it `says` a first line."""
    process = subprocess.Popen([sys.executable, sys.argv[0], *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if says:
            process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
