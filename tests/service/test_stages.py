"""Where the time of a step goes: the stages of each step follow one another, and what is scraped is exact however it was noted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engram_service.observability.deferred import DeferredCounter, DeferredHistogram
from engram_service.observability.stages import EDGES, STAGES, StageSeconds
from engram_service.protocols.http.get import get

ServerProcess = Any
Connect = Callable[..., Any]
MODEL = "digits-reader"
IN_ONE = [stage for stage in STAGES if stage not in ("wire_out", "total")]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def exposed(*collectors: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    for one in collectors:
        registry.register(one)
    return samples(generate_latest(registry).decode())


# What is noted is what is scraped


def test_a_scrape_says_what_prometheus_client_would() -> None:
    rng, edges = np.random.default_rng(0), (0.001, 0.01, 0.1)
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    counter, plain = Counter("c", "Count", ("a", "b"), registry=theirs), Counter("p", "Plain", registry=theirs)
    histogram = Histogram("h", "Seconds", ("a",), buckets=edges, registry=theirs)
    mine = DeferredCounter("c", "Count", ("a", "b")), DeferredHistogram("h", "Seconds", edges, ("a",))
    mine_plain = DeferredCounter("p", "Plain")
    for one in (*mine, mine_plain):
        ours.register(one)
    values = [*rng.exponential(0.01, 3000).tolist(), *edges, 0.0]
    for n, value in enumerate(values):
        label = "xy"[n % 2]
        for count, seconds in ((counter, histogram), mine):
            count.labels(label, "z").inc(value)
            seconds.labels(label).observe(value)
    plain.inc()
    mine_plain.inc()
    wanted, found = (generate_latest(one).decode() for one in (theirs, ours))

    def form(text: str) -> list[str]:
        return sorted(line if line.startswith("#") else line.rpartition(" ")[0] for line in text.splitlines())

    assert form(found) == form(wanted), "the same series under the same names, and the same types"
    expected, got = samples(wanted), samples(found)
    for key, value in expected.items():
        near = 60.0 if key[0].endswith("_created") else abs(value) * 1e-12
        assert got[key] == pytest.approx(value, rel=0, abs=near), key


def test_nothing_is_lost_or_counted_twice_while_others_scrape() -> None:
    histogram, stages, ended = DeferredHistogram("h", "Rows", (1.0, 2.0), ("a",)), StageSeconds("s", "Seconds"), []
    seen: list[list[float]] = [[], []]  # by scraper

    def scrape(mine: list[float]) -> None:
        while not ended:
            found = exposed(histogram, stages)
            mine.append(found["s_count", (("stage", "total"),)])

    scrapers = [threading.Thread(target=scrape, args=(mine,)) for mine in seen]
    for one in scrapers:
        one.start()
    times, batches = np.array([[0.0, 1.0, 2.0, 3.0]] * 3), 30_000
    for _ in range(batches):
        histogram.labels("x").observe(2.0)
        stages.answered(times, 4.0, 5.0, 6.0, 7.0)
    ended.append(True)
    for one in scrapers:
        one.join()
    found = exposed(histogram, stages)
    assert found["h_count", (("a", "x"),)] == batches and found["h_sum", (("a", "x"),)] == 2.0 * batches
    for stage in IN_ONE:
        assert found["s_count", (("stage", stage),)] == found["s_sum", (("stage", stage),)] == 3 * batches
    assert found["s_sum", (("stage", "total"),)] == 7 * 3 * batches
    assert all(mine and mine == sorted(mine) for mine in seen)


def test_the_stages_of_a_step_add_up_to_its_total() -> None:
    rng, stages, steps = np.random.default_rng(1), StageSeconds("s", "Seconds"), 0
    for batch in range(700):
        rows = int(rng.integers(1, 40))
        spans = rng.exponential(0.001, (rows, 4)).cumsum(axis=1)
        started = spans[:, -1].max() + rng.exponential(0.001)
        computed, committed, answered = (started + rng.exponential(0.01, 3).cumsum()).tolist()
        stages.answered(spans, started, computed, computed if batch % 3 == 0 else committed, answered)
        steps += rows
    found = exposed(stages)
    parts = sum(found["s_sum", (("stage", stage),)] for stage in IN_ONE)
    assert parts == pytest.approx(found["s_sum", (("stage", "total"),)], rel=1e-9)
    for stage in STAGES:
        count = found["s_count", (("stage", stage),)]
        if stage == "commit":
            assert 0.5 * steps < count < 0.8 * steps, "rows that were answered before their commit have no such stage"
        else:
            assert count == (0 if stage == "wire_out" else steps)
        cumulative = [found["s_bucket", (("le", le), ("stage", stage))] for le in edges_of(found, stage)]
        assert cumulative == sorted(cumulative) and cumulative[-1] == count and len(cumulative) == len(EDGES) + 1


def edges_of(found: dict[Any, float], stage: str) -> list[str]:
    here = [dict(labels)["le"] for name, labels in found if name == "s_bucket" and ("stage", stage) in labels]
    return sorted(here, key=float)


# Of a server


@pytest.fixture(params=("native", "python"))
def served(request: pytest.FixtureRequest, server_with: Callable[..., Any]) -> Iterator[ServerProcess]:
    if request.param == "native":
        pytest.importorskip("engram_native")
    with server_with("--wire", request.param) as server:
        yield server


def stage_sums(server: ServerProcess) -> dict[str, tuple[float, float]]:
    """Count and seconds of each stage."""
    found = samples(get(f"127.0.0.1:{server.http_port}", "/metrics"))
    return {
        stage: tuple(found[f"engram_stage_seconds_{what}", (("stage", stage),)] for what in ("count", "sum"))
        for stage in STAGES
    }  # type: ignore[return-value]


def test_the_stages_of_a_server_are_those_of_its_steps(served: ServerProcess, connect: Connect) -> None:
    raw, steps, took = connect(served), 30, 0.0
    handle = int(np.frombuffer(raw.open("a", model=MODEL).handles, np.uint32)[0])
    for seq in range(1, steps + 1):
        began = time.monotonic()
        raw.step(handle, seq)
        took += time.monotonic() - began
    until = time.monotonic() + 10
    while (found := stage_sums(served))["wire_out"][0] < steps and time.monotonic() < until:
        time.sleep(0.01)  # what has arrived here may be counted a moment later there
    assert {stage: count for stage, (count, _) in found.items()} == dict.fromkeys(STAGES, steps)
    assert all(seconds > 0 for _, seconds in found.values()), found
    total = found["total"][1]
    assert sum(found[stage][1] for stage in IN_ONE) == pytest.approx(total, rel=1e-6)
    assert total + found["wire_out"][1] < took, "the server's part of it, by one clock, is less than all of it"
    assert found["compute"][1] + found["commit"][1] > 0.1 * total
