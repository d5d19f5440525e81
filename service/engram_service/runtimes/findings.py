"""What was found out about bundles on this machine (engram_models.examination), kept in files: a start need not look again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engram_models.bundle import Bundle
from engram_models.examination import TILE_ROWS, Examination, examine
from engram_models.files import read_file
from engram_models.probe import FLOORS

log = logging.getLogger(__name__)

_FORMAT = 2  # of what is looked at and how: what an older version found does not count
_BYTES_MAX = 1 << 12


class Findings:
    """Examinations by bundle, version of the libraries and kind of processor. Where the directory cannot be used, none is kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.stopped = threading.Event()  # ends an examination that is under way

    def of(self, bundle: Bundle, rows_max: int, onnx_runtime: str, behind: int = 0, niceness: int = 0) -> Examination:
        """Kept, or found now, in a process of its own. `onnx_runtime`: the version of who is to run it. `behind`: models that wait
        for this one. Raises BundleError."""
        if (kept := self.kept(bundle, rows_max, onnx_runtime)) is not None:
            return kept
        told = "model %s is examined, in a process of its own; models to be looked at after it: %d"
        log.info(told, bundle.reference, behind)
        examination = examine(bundle, rows_max, self.stopped, niceness)
        self._keep(self._file(bundle, rows_max, onnx_runtime), examination)
        return examination

    def kept(self, bundle: Bundle, rows_max: int, onnx_runtime: str) -> Examination | None:
        try:
            data = read_file(self._file(bundle, rows_max, onnx_runtime), _BYTES_MAX)
            return _kept(Examination(**json.loads(data)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def _file(self, bundle: Bundle, rows_max: int, onnx_runtime: str) -> Path:
        return self._directory / f"{_key(bundle, rows_max, onnx_runtime)}.json"

    def _keep(self, file: Path, examination: Examination) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(asdict(examination), allow_nan=False))
            temporary.replace(file)
        except OSError as error:
            log.warning("what was found out about models is not kept: %s: %s", self._directory, error.strerror)


def _kept(found: Examination) -> Examination:
    """What an examination can find. Raises ValueError."""
    kinds = tuple(type(value) for value in (found.floor, found.tile, found.row_s))
    if kinds not in ((int, int, float), (type(None), int, float)):
        raise ValueError(found)
    if found.floor not in (None, *FLOORS) or found.tile not in (1, TILE_ROWS) or not 0 <= found.row_s < math.inf:
        raise ValueError(found)
    return found


def _key(bundle: Bundle, rows_max: int, onnx_runtime: str) -> str:
    what = (
        _FORMAT, bundle.fingerprint, bundle.graph, bundle.batch, rows_max, onnx_runtime, np.__version__, _processor(),
    )  # fmt: skip
    return hashlib.blake2b(json.dumps(what, allow_nan=False).encode(), digest_size=16).hexdigest()


def _processor() -> str:
    """What libraries choose their kernels by: the model, and which instructions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    pairs = (line.partition(":") for line in lines)
    return " ".join(value.strip() for key, _, value in pairs if key.strip() in wanted)
