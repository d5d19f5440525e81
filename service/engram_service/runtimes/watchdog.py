"""Watches over the graphs that run: one that runs too long is stopped, and one that ends the process is known afterwards.

A batch runs in the step loop's thread; this is another one, which tells ONNX Runtime to end the run (between two of its operators:
a single one cannot be stopped). What runs in a thread is written into a file that outlives the process, and the interpreter's fault
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
_PLACE = 64  # bytes: the thread in 16 hex digits, a model's fingerprint in 32, and 1 while the thread runs it
_BYTES_MAX = 1 << 20
_CRASHED = re.compile(rb"Current thread 0x0*([0-9a-f]+)")


@dataclass(slots=True)
class Run:
    """What one thread runs just now, if anything: it writes the fields, and the watchdog reads them and stops it."""

    seconds_max: float = 0.0
    options: onnxruntime.RunOptions = field(default_factory=onnxruntime.RunOptions)
    bundle: Bundle | None = None
    started: float = 0.0
    stopped: str = ""  # why, if it was
    place: int = -1  # in the file of what runs


class Watchdog:
    """`look` runs in a thread of its own, under the supervisor."""

    def __init__(self, crashes: Crashes | None = None) -> None:
        self._crashes = crashes
        self._own = threading.local()
        self._runs: list[Run] = []  # one a thread that has run something
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def begin(self, bundle: Bundle, seconds_max: float = 0.0) -> Run:
        """Before a call of a graph, in the thread that makes it; `end` goes with it. Takes a microsecond.

        `seconds_max`: RUN_S_MAX where it is 0.
        """
        run: Run | None = getattr(self._own, "run", None)
        if run is None or run.stopped:
            run = self._own.run = self._made(run)
        if self._crashes is not None:
            if run.bundle is not bundle:
                self._crashes.name(run.place, bundle.fingerprint)
            self._crashes.running(run.place, True)
        run.bundle, run.seconds_max = bundle, seconds_max or RUN_S_MAX
        run.started = time.monotonic()
        return run

    def end(self, run: Run) -> None:
        run.started = 0.0
        if self._crashes is not None:
            self._crashes.running(run.place, False)

    def _made(self, before: Run | None) -> Run:
        """A thread's own; a new one after it was stopped, for its options say so for good."""
        place = -1 if self._crashes is None else self._crashes.place() if before is None else before.place
        run = Run(place=place)
        with self._lock:
            if before is not None:
                self._runs.remove(before)
            self._runs.append(run)
        return run

    def look(self) -> None:
        while not self.stopped.wait(_LOOK_S):
            now = time.monotonic()
            for run in list(self._runs):
                started, bundle = run.started, run.bundle
                if started and bundle is not None and not run.stopped and now - started > run.seconds_max:
                    run.stopped = (
                        f"a batch of model {bundle.reference} ran for more than {run.seconds_max:g} s and was stopped"
                    )
                    run.options.terminate = True
                    log.error("%s", run.stopped)

    def running(self) -> list[str]:
        """What runs just now, and for how long."""
        now = time.monotonic()
        return [
            f"a batch of model {run.bundle.reference}, which has run for {now - started:.0f} s"
            for run in list(self._runs)
            if (started := run.started) and run.bundle is not None
        ]

    def stop(self) -> None:
        """Ends what still runs, too."""
        self.stopped.set()
        for run in list(self._runs):
            if run.started and run.bundle is not None:
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
        self._taken = 0
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._counts = self._read()
            self._open()
        except OSError as error:
            log.warning("crashes of models are not counted: %s: %s", directory, error.strerror or error)

    def of(self, bundle: Bundle) -> int:
        return self._counts.get(bundle.fingerprint, 0)

    def place(self) -> int:
        """Of the calling thread, in the file of what runs; -1: nothing is written."""
        if self._places is None:
            return -1
        with self._lock:
            place = self._taken % _PLACES
            self._taken += 1
        self._places[place * _PLACE : place * _PLACE + 16] = b"%016x" % threading.get_ident()
        return place

    def name(self, place: int, fingerprint: str) -> None:
        """Which model the thread at this place runs when it does."""
        if self._places is not None:
            self._places[place * _PLACE + 16 : place * _PLACE + 48] = fingerprint.encode()

    def running(self, place: int, runs: bool) -> None:
        if self._places is not None:
            self._places[place * _PLACE + 48] = runs

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
        thread, fingerprint, runs = places[start : start + 16], places[start + 16 : start + 48], places[start + 48]
        if found and runs and thread.lstrip(b"0") == found.group(1):
            return fingerprint.decode("ascii", "replace")
    return ""
