"""`engram demo` and `engram bench` from outside: exit codes, JSON, and that what they claim is compared and not assumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engram_service.bench.breakdown import PARTS, of_load
from engram_service.bench.drive import BenchError, Load, Options, Target, specs_of, window
from engram_service.bench.workload import reference, workload_w
from engram_service.demo.stage import bits_that_differ

FIGURES = {
    "sessions", "durability", "steps_per_s", "p50_ms", "p99_ms", "ceiling_steps_per_s", "ratio", "batches_per_s",
    "rows_per_batch", "server_rss_mb", "redis_mb", "plain_steps_per_s", "plain_ratio", "outputs_equal", "ceilings",
}  # fmt: skip


def engram(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engram", *arguments], capture_output=True, text=True, check=False, timeout=110
    )


@pytest.mark.promise(5)
def test_the_demo_kills_its_server_and_not_a_bit_differs() -> None:
    done = engram("demo", "--json", "--sessions", "64")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"]
    assert found["kills"] == 1
    assert found["bits_differ"] == 0
    assert found["steps"] == 64 * 8
    assert "SIGKILL" in done.stderr


@pytest.mark.slow
def test_the_demo_draws_plain_lines_where_there_is_no_terminal() -> None:
    done = engram("demo", "--sessions", "8")
    assert "\x1b" not in done.stdout
    assert "bits that differ  0" in done.stdout, done.stderr


@pytest.mark.parametrize("durability", ["step", pytest.param("interval", marks=pytest.mark.slow)])
def test_the_bench_measures_and_compares(durability: str) -> None:
    done = engram(
        "bench", "--json", "--sessions", "12", "--connections", "4", "--seconds", "1", "--warm-up", "0.3", "--no-plain",
        "--durability", durability,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) >= FIGURES
    assert found["outputs_equal"]
    assert found["compared_with"] == ["ONNX Runtime", "torch"] == list(found["ceilings"])
    assert found["ceiling_steps_per_s"] == found["ceilings"]["ONNX Runtime"]
    assert found["checked_steps"] >= 12
    assert found["connections"] == 4
    assert found["steps_per_s"] > 0
    assert found["rows_per_batch"] > 0


def test_a_breakdown_says_where_the_time_of_a_step_goes() -> None:
    asked = ("bench", "--breakdown", "--sessions", "6", "--seconds", "1", "--warm-up", "0.3")
    done = engram(*asked, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["sessions"], found["connections"], found["durability"]) == (6, 6, "step")
    assert list(found["stages"]) == list(PARTS) and 1 <= found["rows_per_batch"] <= 6
    for stage, span in found["stages"].items():
        assert span["mean_us"] > 0 and 0 < span["p50_us"] <= span["p99_us"], stage
    mean = {name: span["mean_us"] for name, span in found["stages"].items()}
    assert sum(mean.values()) - mean["wire_out"] == pytest.approx(found["total"]["mean_us"], rel=1e-6)
    assert sum(mean.values()) + found["rest"]["mean_us"] == pytest.approx(found["client"]["mean_us"])
    assert found["rest"]["mean_us"] > 0, "nothing is counted that the client did not wait for"
    shares = [span["share"] for span in [*found["stages"].values(), found["rest"]]]
    assert sum(shares) == pytest.approx(1.0) and found["client"]["share"] == 1.0

    shown = engram(*asked[:3], "2", *asked[4:], "--connections", "1", "--durability", "interval")
    assert shown.returncode == 0, shown.stderr
    head, names, *lines = shown.stdout.splitlines()
    assert head.startswith("2 sessions over 1 connection, durability interval: ") and names.startswith("stage")
    assert [line.split()[0] for line in lines] == [*PARTS, "client", "as"]
    commit = lines[PARTS.index("commit")].split()
    assert commit == ["commit", "0.0", "0.0%"], "these were answered before their commit"


def test_a_breakdown_is_of_what_was_done_in_the_window() -> None:
    def load(before: dict[str, float], after: dict[str, float]) -> Load:
        return Load(steps=90, seconds=2.0, p50_ms=1.0, p99_ms=3.0, mean_ms=2.0, before=before, after=after)

    stage = "engram_stage_seconds"
    before = {
        f"{stage}_count:total": 10.0,
        f"{stage}_sum:total": 5.0,
        f"{stage}_count:wait": 10.0,
        f"{stage}_sum:wait": 5.0,
    }
    after = {
        f"{stage}_count:total": 110.0,
        f"{stage}_sum:total": 5.1,
        f"{stage}_count:wait": 110.0,
        f"{stage}_sum:wait": 5.1,
    }
    before |= {f"{stage}_bucket:wait:{edge}": 10.0 for edge in ("0.001", "0.002", "+Inf")}
    after |= {
        f"{stage}_bucket:wait:{edge}": value for edge, value in (("0.001", 60.0), ("0.002", 110.0), ("+Inf", 110.0))
    }
    # Half of the steps under interval durability, and one answer that was written after the window.
    after |= {f"{stage}_count:commit": 50.0, f"{stage}_sum:commit": 0.02, "engram_batch_rows_sum": 100.0}
    after |= {f"{stage}_count:wire_out": 99.0, f"{stage}_sum:wire_out": 0.0099, "engram_batch_rows_count": 40.0}
    found = of_load(64, 64, "step", load(before, after))
    assert (found.steps_per_s, found.rows_per_batch) == (45.0, 2.5)
    wait, commit, out = (found.stages[name] for name in ("wait", "commit", "wire_out"))
    assert (wait.mean_us, wait.p50_us, wait.share) == (pytest.approx(1000), pytest.approx(1000), pytest.approx(0.5))
    assert (commit.mean_us, out.mean_us) == (pytest.approx(200), pytest.approx(100)), "of each step, of each answer"
    assert found.rest.mean_us == pytest.approx(2000 - 1000 - 200 - 100)
    with pytest.raises(BenchError, match="no step"):
        of_load(64, 64, "step", load(after, after))


def test_the_bench_refuses_what_it_cannot_measure() -> None:
    done = engram("bench", "--breakdown", "--address", "127.0.0.1:9")
    assert done.returncode == 1 and "--http" in done.stderr
    assert engram("bench", "--breakdown", "--sessions", "0").returncode == 1
    assert engram("bench", "--durability", "never").returncode == 2
    done = engram("bench", "--model", "no-such-model", "--no-plain")
    assert done.returncode == 1
    assert "no-such-model" in done.stderr


def test_sessions_and_connections_are_dealt_out_whole(tmp_path: Path) -> None:
    for sessions, connections, processes in ((1, 0, 2), (7, 5, 2), (1024, 0, 2), (256, 256, 2), (10, 3, 4)):
        options = Options(sessions=sessions, connections=connections, processes=processes)
        specs = specs_of(options, Target("127.0.0.1:1", "", workload_w(), tmp_path))
        assert sum(spec.sessions for spec in specs) == sessions
        assert sum(spec.connections for spec in specs) == max(connections, min(processes, sessions))
        assert all(spec.connections <= spec.sessions for spec in specs)
        assert len({spec.seed for spec in specs}) == len(specs)


def test_latencies_are_of_steps_and_not_of_calls() -> None:
    # 99 steps in one call of 10 ms, one step in a call of 1 s, one call outside the window.
    figures = np.array([[1.0, 0.010, 99], [1.5, 1.0, 1], [9.0, 5.0, 1000]])
    load = window(figures, 0.5, 2.5, {}, {})
    assert (load.steps, load.seconds) == (100, 2.0)
    assert (load.p50_ms, load.p99_ms) == (10.0, 10.0)


def test_the_reference_is_a_sequence_and_not_a_repetition() -> None:
    for plain in workload_w().plains:
        outputs = reference(plain, (64,), 1, 3, 4)
        assert outputs.shape == (4, 3, 16)
        assert not np.array_equal(outputs[0], outputs[1])


def test_bits_that_differ_are_counted() -> None:
    one = np.array([1.0, 0.0, -0.0], np.float32)
    assert bits_that_differ(one, one.copy()) == 0
    assert bits_that_differ(one, np.array([1.0, -0.0, -0.0], np.float32)) == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        bits_that_differ(one, one[:2])
