"""Watches over the graphs that run: one that runs too long is stopped, and one that ends the process is known afterwards.

A batch runs in an engine's thread; this is another one, which tells ONNX Runtime to end the run (between two of its operators: a
single one cannot be stopped). What runs in a thread is written into a file that outlives the process, and the interpreter's fault
handler writes beside it which thread a fatal signal came from: the next start counts that against the model (`Crashes`).
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import mmap
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import onnxruntime

from engram_models.bundle import Bundle
from engram_models.files import read_file

log = logging.getLogger(__name__)

RUN_S_MAX = 10.0
CRASHES_MAX = 2  # then a model is not served
_LOOK_S = 0.5
_PLACES = 64  # threads that run graphs at once
_PLACE = 64  # bytes: the thread in 16 hex digits, a space, the model's fingerprint in 32
_BYTES_MAX = 1 << 20
_CRASHED = re.compile(rb"Current thread 0x0*([0-9a-f]+)")


@dataclass(slots=True)
class Run:
    """One call of a graph."""

    bundle: Bundle
    started: float
    seconds_max: float
    options: onnxruntime.RunOptions = field(default_factory=onnxruntime.RunOptions)
    stopped: str = ""  # why, if it was


class Watchdog:
    """`look` runs in a thread of its own, under the supervisor."""

    def __init__(self, crashes: Crashes | None = None) -> None:
        self._crashes = crashes
        self._runs: dict[int, Run] = {}  # by thread; each writes its own key alone
        self.stopped = threading.Event()

    @contextmanager
    def watching(self, bundle: Bundle, seconds_max: float = 0.0) -> Iterator[Run]:
        """Around one call of a graph, in the thread that makes it. `seconds_max`: RUN_S_MAX where it is 0."""
        thread, run = threading.get_ident(), Run(bundle, time.monotonic(), seconds_max or RUN_S_MAX)
        if self._crashes is not None:
            self._crashes.running(thread, bundle.fingerprint)
        self._runs[thread] = run
        try:
            yield run
        finally:
            del self._runs[thread]
            if self._crashes is not None:
                self._crashes.running(thread, "")

    def look(self) -> None:
        while not self.stopped.wait(_LOOK_S):
            now = time.monotonic()
            for run in list(self._runs.values()):
                if not run.stopped and now - run.started > run.seconds_max:
                    run.stopped = f"a batch of model {run.bundle.reference} ran for more than {run.seconds_max:g} s and was stopped"
                    run.options.terminate = True
                    log.error("%s", run.stopped)

    def stop(self) -> None:
        """Ends what still runs, too."""
        self.stopped.set()
        for run in list(self._runs.values()):
            run.stopped = run.stopped or f"model {run.bundle.reference} was stopped with the server"
            run.options.terminate = True


class Crashes:
    """How often each model has ended a process of this server, in a directory that outlives it.

    A server that was killed counts nothing: only a fatal signal (SEGV, ABRT, BUS, FPE, ILL) in the thread that ran a graph does.
    """

    def __init__(self, directory: Path) -> None:
        """Reads what earlier processes left. Where the directory cannot be used, nothing is counted, and the log says so."""
        self._directory = directory
        self.file = directory / "crashes.json"
        self._counts: dict[str, int] = {}
        self._places: mmap.mmap | None = None
        self._own: dict[int, int] = {}  # thread -> its place
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._counts = self._read()
            self._open()
        except OSError as error:
            log.warning("crashes of models are not counted: %s: %s", directory, error.strerror or error)

    def of(self, bundle: Bundle) -> int:
        return self._counts.get(bundle.fingerprint, 0)

    def running(self, thread: int, fingerprint: str) -> None:
        """What the thread runs from now on; "": nothing."""
        if self._places is None:
            return
        place = self._own.get(thread)
        if place is None:
            with self._lock:
                place = self._own.setdefault(thread, len(self._own) % _PLACES)
        start = place * _PLACE
        self._places[start : start + 49] = b"%016x %32s" % (thread, fingerprint.encode())

    def _open(self) -> None:
        """This process's own two files. The lock on one says that the process is there.

        Their names are nobody else's: in containers with one directory, processes may have one number.
        """
        trace = self._directory / f"{os.getpid()}-{secrets.token_hex(8)}.trace"
        self._trace: IO[bytes] = open(trace, "xb")  # noqa: SIM115 kept open until the end
        fcntl.flock(self._trace, fcntl.LOCK_EX)
        with open(trace.with_suffix(".running"), "x+b") as file:
            file.write(bytes(_PLACES * _PLACE))  # not a hole: on a full disk a page of one ends the process
            file.flush()
            self._places = mmap.mmap(file.fileno(), _PLACES * _PLACE)
        faulthandler.enable(self._trace, all_threads=True)

    def _read(self) -> dict[str, int]:
        """Counts what processes that are gone have left, and removes it."""
        file = self.file
        try:
            counts = {str(key): int(value) for key, value in json.loads(read_file(file, _BYTES_MAX)).items()}
        except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            counts = {}
        before = dict(counts)
        for trace in self._directory.glob("*.trace"):
            if trace.is_file() and (fingerprint := _crashed(trace)) is not None:
                if fingerprint:
                    counts[fingerprint] = counts.get(fingerprint, 0) + 1
                    log.error("a model with fingerprint %s has ended this server's last process", fingerprint)
                trace.with_suffix(".running").unlink(missing_ok=True)
                trace.unlink(missing_ok=True)
        if counts != before:
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(counts, allow_nan=False))
            temporary.replace(file)
        return counts


def _crashed(trace: Path) -> str | None:
    """The fingerprint of the model that the process's fatal signal came from; "": of none; None: the process is still there."""
    try:
        with open(trace, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = _CRASHED.search(file.read(_BYTES_MAX))
        places = read_file(trace.with_suffix(".running"), _PLACES * _PLACE) if found else b""
    except BlockingIOError:
        return None
    except OSError:
        return ""
    for start in range(0, len(places), _PLACE) if found else ():
        thread, _, fingerprint = places[start : start + 49].partition(b" ")
        if found and thread.lstrip(b"0") == found.group(1):
            return fingerprint.strip().decode("ascii", "replace")
    return ""
