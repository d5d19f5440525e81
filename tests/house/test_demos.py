"""`engram demo recall | ntm | variants` from outside, and that a promise that is broken is said."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_models import NTM, write_bundle
from engram_models.letters import letters
from engram_service.demo.characters import beside, pixels, shades, spark
from engram_service.demo.digits import DigitsOutcome
from engram_service.demo.ntm import NtmOutcome, sequence
from engram_service.demo.outcome import Outcome
from engram_service.demo.recall import RecallOutcome
from engram_service.demo.screen import Lines, Terminal
from engram_service.demo.variants import VariantsOutcome

DIGITS = DigitsOutcome(
    sessions=8, steps=64, kills=1, away_s=1.0, accuracy=0.95, bits_differ=0, sessions_at_the_end=8, seconds=3.0
)
RECALL = RecallOutcome(
    label="T", overlap=1.0, converged=True, energies=[-120.0, -256.0, -256.0], letters=26, letters_recalled=25, kills=1,
    away_s=1.0, own_label="smile", own_bits_wrong=0, seconds=3.0,
)  # fmt: skip
TURING = NtmOutcome(
    vectors=20,
    bits=8,
    bits_wrong=1,
    kills=1,
    away_s=1.0,
    state_bytes=12144,
    state_bits_differ=0,
    bits_differ=0,
    seconds=3.0,
)
VARIANTS = VariantsOutcome(
    generated=22, generated_bits_differ=0, digits=32, digits_right=29, horizon_years=12, horizon_error=14.0,
    horizon_mean_error=41.0, online_years=50, online_error=15.0, online_persistence_error=30.0, seconds=3.0,
)  # fmt: skip


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engram", "demo", *arguments], capture_output=True, text=True, check=False, timeout=110
    )


def test_recall_brings_the_letter_back_and_keeps_a_pattern_through_a_kill(tmp_path: Path) -> None:
    done = demo("recall", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"]
    assert (found["label"], found["overlap"], found["own_label"]) == ("T", 1.0, "smile")
    assert found["energies"][0] > found["energies"][-1]
    assert "SIGKILL" in done.stderr
    assert "\x1b" not in done.stderr
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_the_turing_machine_reads_back_what_it_wrote_before_the_kill() -> None:
    done = demo("ntm", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"]
    assert (found["vectors"], found["kills"], found["state_bits_differ"], found["bits_differ"]) == (20, 1, 0, 0)
    assert found["bits_wrong"] <= 1


def test_all_four_variants_run_on_models_that_ship() -> None:
    done = demo("variants", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"]
    assert found["generated_bits_differ"] == 0
    assert found["horizon_error"] < found["horizon_mean_error"]
    assert (found["online_years"], found["digits"]) == (50, 32)


@pytest.mark.slow
def test_a_machine_that_learnt_nothing_breaks_the_promise_and_only_that(tmp_path: Path) -> None:
    torch.manual_seed(1)
    write_bundle(tmp_path, "copy-ntm", "1", NTM(9, 8, 20, slots=16, width=8, activation="sigmoid"))
    done = demo("ntm", "--json", "--vectors", "4", "--models", str(tmp_path))
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert not found["held"]
    assert found["bits_wrong"] > 1
    assert (found["state_bits_differ"], found["bits_differ"], found["kills"]) == (0, 0, 1)


@pytest.mark.slow
def test_every_picture_is_written(tmp_path: Path) -> None:
    for story, names in (
        ("ntm", ["ntm"]),
        ("variants", ["after-waiting", "one-to-many", "online"]),
        ("digits", ["digits"]),
    ):
        assert demo(story, "--json", "--sessions", "8", "--out", str(tmp_path / story)).returncode == 0
        assert [path.name for path in sorted((tmp_path / story).iterdir())] == [f"{name}.png" for name in names]


def test_wrong_use_and_missing_models_are_said_before_anything_starts(tmp_path: Path) -> None:
    for arguments in (["dance"], ["ntm", "--vectors", "0"], ["recall", "--seed", "-1"], ["recall", "--pace", "nan"]):
        assert demo(*arguments).returncode == 2, arguments
    done = demo("ntm", "--models", str(tmp_path))
    assert done.returncode == 1
    assert "there is no bundle 'copy-ntm'" in done.stderr
    assert "engram train copy-ntm" in done.stderr


@pytest.mark.parametrize(
    ("kept", "broken"),
    [
        (DIGITS, {"bits_differ": 1}),
        (DIGITS, {"kills": 0}),
        (DIGITS, {"sessions_at_the_end": 7}),
        (DIGITS, {"accuracy": 0.5}),
        (RECALL, {"label": "I"}),
        (RECALL, {"overlap": 0.9}),
        (RECALL, {"converged": False}),
        (RECALL, {"energies": [-256.0, -256.0]}),
        (RECALL, {"energies": [-120.0, -119.0, -256.0]}),
        (RECALL, {"letters_recalled": 20}),
        (RECALL, {"own_label": "T"}),
        (RECALL, {"own_bits_wrong": 1}),
        (RECALL, {"kills": 0}),
        (TURING, {"bits_wrong": 2}),
        (TURING, {"state_bits_differ": 1}),
        (TURING, {"bits_differ": 1}),
        (TURING, {"kills": 0}),
        (VARIANTS, {"generated_bits_differ": 1}),
        (VARIANTS, {"digits_right": 20}),
        (VARIANTS, {"horizon_error": 42.0}),
        (VARIANTS, {"online_error": float("nan")}),
    ],
    ids=str,
)
def test_one_broken_promise_is_enough(kept: Outcome, broken: dict[str, Any]) -> None:
    assert kept.held
    assert kept.summary().endswith("yes")
    found = replace(kept, **broken)
    assert not found.held
    assert found.summary().endswith("NO")


def test_pictures_of_characters() -> None:
    assert pixels(np.array([[1, 1, -1, -1, 0], [1, -1, 1, -1, -1], [1, -1, -1, -1, -1]])) == ["█▀▄ ░", "▀    "]
    names, patterns = letters()
    assert pixels(patterns[names.index("T")].reshape(16, 16))[:2] == ["█" * 16, "       ██       "]
    assert shades(np.array([[0, 0.5, 1, 7]])) == [" ▒██"]
    assert spark(np.array([0, 50, np.nan, 100]), 100.0) == "▁▅ █"
    assert beside([("a", ["xyz", "w"]), ("long", ["1"])]) == ["a     long", "xyz   1", "w"]


def test_a_terminal_draws_over_the_picture_before_and_keeps_within_its_lines() -> None:
    out = io.StringIO()
    screen = Terminal(out, width=10, height=6)
    screen.picture(["x" * 30] * 9, "first")
    first = out.getvalue()
    assert first.count("\n") == 5
    assert "x" * 10 in first
    assert "x" * 11 not in first
    screen.picture(["y"], "second")
    assert out.getvalue()[len(first) :].startswith("\x1b[5A\x1b[J")
    screen.say("said")
    before = len(out.getvalue())
    screen.picture(["z"], "third")
    assert "\x1b[J" not in out.getvalue()[before:]


def test_lines_leave_out_what_passes() -> None:
    out = io.StringIO()
    screen = Lines(out)
    screen.picture(["one"], "passes", passing=True)
    screen.picture(["two"], "stays")
    assert out.getvalue() == "\ntwo\n\nstays\n"


def test_the_sequence_is_bits_a_delimiter_and_silence() -> None:
    inputs = sequence(9, 5, np.random.Generator(np.random.PCG64(3)))
    assert inputs.shape == (11, 9)
    assert set(np.unique(inputs[:5, :8])) == {0, 1}
    assert not inputs[:5, 8].any()
    assert inputs[5].tolist() == [0] * 8 + [1]
    assert not inputs[6:].any()
