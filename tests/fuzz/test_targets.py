"""The fuzz targets for a few seconds each, without atheris; `make fuzz` runs them for longer. And the runner itself."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from targets import FAULTY, NAMES, target
from targets.mutation import joined, mutated, parted
from targets.world import begun, world

from engram_service.sessions.handles import TAKEN_OVER
from engram_service.steps.repeats import Asked

ROOT = pathlib.Path(__file__).resolve().parents[2]
INPUTS = {"frames": 800, "exports": 1500, "chunks": 800, "records": 1000, "bundles": 60}


@pytest.mark.parametrize("name", NAMES)
def test_valid_inputs_pass_and_are_left_alone_by_mending(name: str) -> None:
    one = target(name)
    for seed in one.seeds():
        one.fuzz_one(seed)
        one.fuzz_one(one.mend(seed))
    if name not in ("frames", "bundles"):  # whose mending writes them anew
        assert [one.mend(seed) for seed in one.seeds()] == one.seeds()


@pytest.mark.promise(6)
@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs_are_read_or_refused(name: str) -> None:
    one, rng = target(name), random.Random(f"quick {name}")
    seeds = one.seeds()
    for _ in range(INPUTS[name]):
        data = mutated(one, seeds, rng)
        try:
            one.fuzz_one(data)
        except Exception as error:
            error.add_note(f"the input: {data.hex()}")
            raise


def test_several_strings_in_one_input() -> None:
    parts = [b"", b"one", b"two" * 100]
    assert parted(joined(parts)) == parts
    assert parted(b"\xff\xff\xff\xffrest") == [b"rest"]
    assert parted(b"\1") == [b""]


def test_a_repeat_that_waits_is_refused_with_its_session() -> None:
    """Found while the state machine's findings were mended: it stayed behind, and the row's next session would have answered it."""
    at = world()
    table, stream = at.table, begun(at.wire, at.streams, at.frames)
    row = table.add("given-up")
    table.model[row], table.stream[row], table.handle[row] = at.lstm.index, stream.id, stream.handles.name(row)
    handles, session = table.handle[[row]], table.refer(np.array([row]))
    streams = np.array([stream.id], np.uint32)
    at.streams.arrived(streams)
    at.repeats.wait(Asked(streams, session, handles, np.array([9], np.uint64)), np.array([np.inf]))
    at.ownership.dismiss(np.array([row]), TAKEN_OVER)
    assert not at.repeats._waiting and not table.alive(session).any() and not at.streams.in_flight
    refused, told = (response for response, _ in at.sent(stream))
    assert np.frombuffer(refused.errors.handles, np.uint32).tolist() == handles.tolist()
    assert np.frombuffer(refused.errors.seqs, np.uint64).tolist() == [9]
    assert refused.errors.errors[0].reason == "TAKEN_OVER" and told.WhichOneof("frame") == "event"
    at.ownership.disconnect(stream)


def run(tmp_path: pathlib.Path, name: str, *flags: str) -> tuple[int, dict[str, Any]]:
    """tools/fuzz.py in a folder of its own; its exit code and what it wrote."""
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "tools/fuzz.py", "--targets", name, "--engine", "mutator", "--work", str(tmp_path / "work"),
               "--out", str(out), *flags]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert out.exists(), done.stderr
    (found,) = json.loads(out.read_text())["runs"]
    return done.returncode, found


def test_the_runner_counts(tmp_path: pathlib.Path) -> None:
    code, found = run(tmp_path, "exports", "--inputs", "200")
    assert (code, found["inputs"], found["targets"]["exports"]["inputs"], found["findings"]) == (0, 200, 200, 0)


def test_the_runner_finds_errors_and_slow_inputs_and_keeps_them(tmp_path: pathlib.Path) -> None:
    code, found = run(tmp_path, FAULTY, "--inputs", "60", "--slow-s", "0.2")
    assert (code, found["findings"]) == (1, 2)
    errors = sorted(one["error"].split(":")[0] for one in found["targets"][FAULTY]["found"])
    assert errors == ["Hang", "ValueError at faulty.py"]
    kept = {path.read_bytes() for path in (tmp_path / "work" / FAULTY / "findings").iterdir()}
    assert kept == {b"error", b"slow"}
