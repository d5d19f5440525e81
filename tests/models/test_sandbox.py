"""Whatever runs in the sandbox may crash, hang, take all memory and write what it likes: it becomes one line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from engram_models.importing import sandbox
from engram_models.importing.errors import ImportRefusedError

MEMORY = 1 << 28


def run(call: str, folder: Path, seconds: float = 30.0, **arguments: object) -> object:
    return sandbox.run(f"misbehaving:{call}", folder, arguments, MEMORY, seconds)


def test_a_function_runs_in_its_folder_and_answers(tmp_path: Path) -> None:
    said: list[str] = []
    found = sandbox.run("misbehaving:answer", tmp_path, {"one": [1, "a"]}, MEMORY, progress=said.append)
    here = str(tmp_path.resolve())
    assert found == {"arguments": {"one": [1, "a"]}, "here": here, "there": str(tmp_path), "files": ["call.json"]}
    assert said == ["a line of progress"]


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("crash", {"signal_number": signal.SIGSEGV}, r"it crashed the process that ran it \(SIGSEGV\)"),
        ("crash", {"signal_number": signal.SIGABRT}, r"it crashed the process that ran it \(SIGABRT\)"),
        ("crash", {"signal_number": signal.SIGKILL}, "needs more than 256 MB of memory"),
        ("hog", {}, "needs more than 256 MB of memory"),
        ("fail", {}, "it could not be run: ValueError: 'two"),
        ("refuse", {}, "^it is not to my taste$"),
        ("large_answer", {}, "it could not be run"),
    ],
)
def test_what_goes_wrong_there_is_one_line_here(
    call: str, arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ImportRefusedError, match=message) as refused:
        run(call, tmp_path, **arguments)
    assert str(refused.value).isprintable()


def test_a_loop_without_an_end_is_stopped_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ImportRefusedError, match="ran for more than 3 s and was stopped"):
        run("spin", tmp_path, seconds=3.0)
    assert time.monotonic() - started < 10
    child = int((tmp_path / "child").read_text())
    assert _ended(child)


def test_what_it_prints_holds_up_nobody(tmp_path: Path) -> None:
    assert run("chatter", tmp_path) == "done"


def test_a_smaller_machine_has_a_smaller_limit() -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert sandbox.memory_limit(0) <= sandbox.memory_limit(1 << 20) <= sandbox.memory_limit(1 << 40) < machine


def _ended(process: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
