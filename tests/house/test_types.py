"""What the type checker must not let pass: a row of the session table where a reference is wanted, and the other way round."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MISTAKES = """
import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.errors import ServiceError
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import References, SessionTable
from engram_service.steps.flushes import Flushes
from engram_service.steps.repeats import Asked, Repeats
from engram_service.store import Verdict


def mistakes(
    table: SessionTable, repeats: Repeats, residency: Residency, ownership: Ownership, flushes: Flushes, served: Served,
    rows: NDArray[np.int32], kept: References, seqs: NDArray[np.uint64], streams: NDArray[np.uint32], why: ServiceError,
) -> None:
    repeats.moved_on(kept)
    repeats.refuse(rows, why)
    Asked(streams, rows, streams, seqs)
    residency.on_flushed(rows, seqs, Verdict.OK)
    flushes.add(served, rows)
    ownership.lose(kept, Verdict.GONE)
    ownership.lose_when_free(rows, Verdict.GONE)
    table.row_of(int(rows[0]))
    table.remove(kept)
    table.durable[kept]


def right(table: SessionTable, repeats: Repeats, rows: NDArray[np.int32], why: ServiceError) -> NDArray[np.int32]:
    kept = table.refer(rows)
    repeats.refuse(kept, why)
    repeats.moved_on(table.rows_of(kept))
    return table.rows_of(kept)
"""


@pytest.mark.promise(10)
def test_a_bare_row_is_no_reference(tmp_path: pathlib.Path) -> None:
    code = tmp_path / "mistakes.py"
    code.write_text(MISTAKES)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(code),
    ]  # with make check's cache
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    wrong = {
        int(line.split(":")[1]) for line in done.stdout.splitlines() if "mistakes.py" in line and ": error:" in line
    }
    first = MISTAKES.splitlines().index("    repeats.moved_on(kept)") + 1
    assert wrong == set(range(first, first + 10)), done.stdout + done.stderr
