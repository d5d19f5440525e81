"""What the type checker must not let pass: a row of the session table where a reference is wanted, and the other way round."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
MISTAKES = """
import numpy as np
from numpy.typing import NDArray

from engram_service.engine.engine import Engine
from engram_service.sessions.repeats import Repeats
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import References, SessionTable
from engram_service.store import Verdict


def mistakes(
    table: SessionTable, repeats: Repeats, residency: Residency, rows: NDArray[np.int32], kept: References, seqs: NDArray[np.uint64]
) -> None:
    repeats.moved_on(rows)
    residency.on_flushed(rows, seqs, Verdict.OK)
    table.row_of(int(rows[0]))
    table.remove(kept)
    table.durable[kept]


def right(table: SessionTable, repeats: Repeats, rows: NDArray[np.int32]) -> NDArray[np.int32]:
    kept = table.refer(rows)
    repeats.moved_on(kept)
    return table.rows_of(kept)
"""


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
    first = MISTAKES.splitlines().index("    repeats.moved_on(rows)") + 1
    assert wrong == set(range(first, first + 5)), done.stdout + done.stderr
