"""`engram demo` and `engram bench` from outside: exit codes, JSON, and that what they claim is compared and not assumed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from engram_service.bench.measure import Options, _specs, _window
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


def test_the_bench_refuses_what_it_cannot_measure() -> None:
    assert engram("bench", "--durability", "never").returncode == 2
    done = engram("bench", "--model", "no-such-model", "--no-plain")
    assert done.returncode == 1
    assert "no-such-model" in done.stderr


def test_sessions_and_connections_are_dealt_out_whole(tmp_path: object) -> None:
    for sessions, connections, processes in ((1, 0, 2), (7, 5, 2), (1024, 0, 2), (256, 256, 2), (10, 3, 4)):
        options = Options(sessions=sessions, connections=connections, processes=processes)
        specs = _specs(options, workload_w(), "127.0.0.1:1", tmp_path)  # type: ignore[arg-type]
        assert sum(spec.sessions for spec in specs) == sessions
        assert sum(spec.connections for spec in specs) == max(connections, min(processes, sessions))
        assert all(spec.connections <= spec.sessions for spec in specs)
        assert len({spec.seed for spec in specs}) == len(specs)


def test_latencies_are_of_steps_and_not_of_calls() -> None:
    # 99 steps in one call of 10 ms, one step in a call of 1 s, one call outside the window.
    figures = np.array([[1.0, 0.010, 99], [1.5, 1.0, 1], [9.0, 5.0, 1000]])
    load = _window(figures, 0.5, 2.5, {}, {})
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
