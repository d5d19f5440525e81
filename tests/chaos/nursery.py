"""Makes the campaign's processes: imports everything once, then forks a server or a client in milliseconds.

A server imports torch for seconds, and the campaign kills hundreds. Nothing that cannot be forked is begun here: no thread,
no torch operation, no gRPC channel. Commands come as JSON lines on stdin; what became of children goes to stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import random
import select
import signal
import sys
import traceback
from typing import Any

CANCEL, HALF_CLOSE = signal.SIGUSR1, signal.SIGUSR2  # what a client is told, see client.py

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.02


def _serve(task: dict[str, Any]) -> int:
    from chaos.points import install
    from engram._cli import main

    control = pathlib.Path(task["control"])
    install(control)
    here = pathlib.Path(__file__).parent
    paths = [str(here / "entry"), str(here.parent), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"CHAOS_CONTROL": str(control), "PYTHONPATH": os.pathsep.join(paths)}  # of the data process
    return main(["serve", *task["flags"]])


def _client(task: dict[str, Any]) -> int:
    from chaos.client import run

    return run(task)


def _spawn(task: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        random.seed()
        os.environ.update(task.get("environment", {}))
        os.nice(task.get("nice", 0))
        code = {"server": _serve, "client": _client}[task["run"]](task)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import engram_service.app
    import engram_service.commands.serve  # noqa: F401

    for number in (CANCEL, HALF_CLOSE):
        signal.signal(number, signal.SIG_IGN)  # its children too, until they listen
    children: set[int] = set()
    _tell(ready=True)
    pending = b""
    while True:
        if select.select([0], [], [], _POLL_S)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                task = json.loads(line)
                if "run" in task:
                    pid = _spawn(task)
                    children.add(pid)
                    _tell(name=task["name"], pid=pid)
                elif task["pid"] in children:  # not yet reaped, so the number is still its own
                    os.kill(task["pid"], task["signal"])
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                children.discard(ended[0])
                _tell(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
