"""What a stranger's graph may do to the process that runs it. For tests of the sandbox, which calls these by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engram_models.importing.errors import ImportRefusedError
from engram_models.importing.sandbox import report


def answer(folder: Path, **arguments: Any) -> dict[str, Any]:
    report("a line\nof progress")
    return {"arguments": arguments, "here": str(Path.cwd()), "there": str(folder), "files": sorted(os.listdir(folder))}


def crash(folder: Path, signal_number: int) -> None:
    os.kill(os.getpid(), signal_number)


def hog(folder: Path) -> None:
    bytearray(1 << 36)


def fail(folder: Path) -> None:
    raise ValueError("two\nlines\x1b[31m")


def refuse(folder: Path) -> None:
    raise ImportRefusedError("it is not to my taste")


def spin(folder: Path) -> None:
    """With a child that would go on alone."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child").write_text(str(child.pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def chatter(folder: Path) -> str:
    """More on both streams than pipes hold, without an end of line."""
    for number in (1, 2):
        for _ in range(64):
            os.write(number, b"x" * (1 << 16))
    return "done"


def large_answer(folder: Path) -> str:
    return "x" * (1 << 25)
