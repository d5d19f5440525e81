"""Runs a function of ours on a stranger's graph in a process of its own, with limits on memory, time and files. For the import.

A graph of a few bytes may loop for ever, ask for terabytes, or crash the library that runs it. Whatever happens there becomes
one ImportRefusedError here. The two processes share a folder: call.json goes in with whatever files the caller put there,
answer.json comes out with whatever files the function put there. Nothing is pickled.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engram_models.files import read_file
from engram_models.importing.errors import ImportRefusedError, KilledError, shown

MEMORY_BYTES = 2 << 30  # beyond what the libraries take and beside MEMORY_PER_BYTE of the model
MEMORY_PER_BYTE = 6  # the file, what is parsed of it, prepacked weights, and a copy of each on the way
SECONDS = 120.0
ANSWER_BYTES_MAX = 1 << 24
_PROGRESS = b"\x01progress "
_LINE_MAX = 300
_LOOK_S = 0.25  # so often is looked whether it shall be stopped
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "TMPDIR", "LD_LIBRARY_PATH")

_FEW_THREADS = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def memory_limit(model_bytes: int) -> int:
    """Bytes that a run of a model of this size may take: relative to it, and no more than three quarters of this machine's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MEMORY_BYTES + MEMORY_PER_BYTE * model_bytes, machine * 3 // 4)


def run(
    call: str,
    folder: Path,
    arguments: Mapping[str, Any],
    memory_bytes: int,
    seconds: float = SECONDS,
    progress: Callable[[str], None] | None = None,
    stopped: threading.Event | None = None,
    niceness: int = 0,
) -> Any:
    """What `call` (`module:function`) returns, which is JSON, of `folder` and `arguments`, JSON too. Raises ImportRefusedError.

    What the function says with `report` comes to `progress`, line by line. Once `stopped` is set, it is ended at once.
    """
    (folder / "answer.json").unlink(missing_ok=True)
    limits = {"memory_bytes": memory_bytes, "seconds": seconds, "niceness": niceness}
    (folder / "call.json").write_text(
        json.dumps({"call": call, "arguments": dict(arguments), **limits}, allow_nan=False)
    )
    environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "engram_models.importing.sandbox", str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder,
        env={**environment, **_FEW_THREADS, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )  # fmt: skip
    try:
        in_time = _follow(process, time.monotonic() + seconds, progress, stopped or threading.Event())
    finally:
        _end(process)
    if stopped is not None and stopped.is_set():
        raise ImportRefusedError("it was stopped, for nobody waits for it any more")
    if not in_time:
        raise ImportRefusedError(
            f"it ran for more than {seconds:g} s and was stopped: a loop without an end, or a model that is too slow"
        )
    return _answer(folder, process.returncode, memory_bytes)


def report(line: str) -> None:
    """Called by what runs in the sandbox: a line about how far it is."""
    text = "".join(c if c.isprintable() else " " for c in line)[:_LINE_MAX]
    os.write(1, _PROGRESS + text.encode(errors="replace") + b"\n")


def _follow(
    process: subprocess.Popen[bytes], until: float, progress: Callable[[str], None] | None, stopped: threading.Event
) -> bool:
    """Whether it ended in time. What else is written on its standard output is read and dropped."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0 and not stopped.is_set():
            if not selector.select(min(left, _LOOK_S)):
                continue
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                break
            *lines, rest = (rest + part).split(b"\n")
            rest = rest[-_LINE_MAX * 4 :]
            for line in lines if progress else ():
                if line.startswith(_PROGRESS) and progress:
                    progress(line[len(_PROGRESS) :].decode(errors="replace"))
    while (left := until - time.monotonic()) > 0 and not stopped.is_set():
        try:
            process.wait(min(left, _LOOK_S))
            return True
        except subprocess.TimeoutExpired:
            continue
    return process.poll() is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _answer(folder: Path, code: int, memory_bytes: int) -> Any:
    try:
        answer = json.loads(read_file(folder / "answer.json", ANSWER_BYTES_MAX))
    except (OSError, ValueError):
        answer = {}
    if code == 0 and "result" in answer:
        return answer["result"]
    if "refused" in answer:
        raise ImportRefusedError(answer["refused"])
    if code == -signal.SIGKILL:
        raise KilledError(
            f"its process was killed: it needs more than {memory_bytes >> 20} MB of memory, or somebody did"
        )
    if answer.get("memory") or code == -signal.SIGXFSZ:
        raise ImportRefusedError(f"it needs more than {memory_bytes >> 20} MB of memory to run and was stopped")
    if code < 0:
        raise ImportRefusedError(f"it crashed the process that ran it ({signal.Signals(-code).name})")
    raise ImportRefusedError(f"it could not be run: {answer.get('failed', f'its process ended with {code}')}")


def _main(folder: Path) -> None:
    asked = json.loads((folder / "call.json").read_text())
    os.nice(asked["niceness"])
    module, _, name = asked["call"].partition(":")
    function = getattr(importlib.import_module(module), name)
    _limit(asked["memory_bytes"], asked["seconds"])
    try:
        answer = {"result": function(folder, **asked["arguments"])}
    except ImportRefusedError as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"memory": True}
    except Exception as error:  # of any of ONNX Runtime's kinds, which have no common root
        text = str(error)
        out_of_memory = any(word in text for word in ("bad_alloc", "allocate memory", "AllocateRaw"))
        answer = (
            {"memory": True}
            if out_of_memory
            else {"failed": f"{type(error).__name__}: {shown(text.strip()[:_LINE_MAX])}"}
        )
    (folder / "answer.json").write_text(json.dumps(answer, allow_nan=False))


def _limit(memory_bytes: int, seconds: float) -> None:
    """Memory counts from here on: what the libraries have mapped is not the model's. Time also where the parent was killed."""
    mapped = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if sys.platform == "linux"
        else 1 << 32
    )
    for kind, value in (
        (resource.RLIMIT_AS, mapped + memory_bytes),
        (resource.RLIMIT_FSIZE, memory_bytes),
        (resource.RLIMIT_CPU, int(seconds) + 5),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, hard))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
