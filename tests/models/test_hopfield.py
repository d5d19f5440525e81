"""Hopfield memories against their definitions, written out slowly; what they refuse; the cell; the letters; the experiments."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engram_models import (
    RULES,
    Hopfield,
    PatternError,
    PatternMemory,
    Recalled,
    cell_floor,
    load_cell,
    shipped_models_dir,
    write_bundle,
)
from engram_models.letters import SIDE, draw, half_replaced, letters, letters_cell
from engram_models.pattern_recall import dense_fields
from engram_models.pattern_rules import exactly_summed, learn, load_warning
from engram_models.pattern_search import PatternSearch

Ints = NDArray[np.int8]
CLASSICAL = [rule for rule in RULES if rule != "dense"]


def random_patterns(count: int, size: int, seed: int = 0) -> Ints:
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (count, size))


def random_cues(patterns: Ints, flips: float, masked: float, seed: int = 1) -> Ints:
    generator = np.random.default_rng(seed)
    cues = patterns * np.where(generator.random(patterns.shape) < flips, -1, 1).astype(np.int8)
    cues[generator.random(patterns.shape) < masked] = 0
    cues[:, 0] = patterns[:, 0]  # one unit at least is known
    return cues


def names(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


def memory_of(patterns: NDArray[Any], rule: str = "dense", **options: Any) -> PatternMemory:
    memory = PatternMemory(patterns.shape[1], rule, **options)
    bits, labels = memory.pack(patterns, memory.size), names(len(patterns))
    memory.check(bits, labels)
    memory.add(bits, labels)
    return memory


def alike(one: Sequence[Recalled], other: Sequence[Recalled]) -> bool:
    return all(
        np.array_equal(a.pattern, b.pattern) and np.array_equal(a.energies, b.energies) and a.label == b.label
        for a, b in zip(one, other, strict=True)
    )


# Bits, and what is refused


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float32, np.bool_])
def test_patterns_are_packed_and_come_back(size: int, kind: Any) -> None:
    patterns = random_patterns(11, size)
    ones = (patterns > 0).astype(kind)
    bits = PatternMemory.pack(ones, size)
    assert bits.shape == (11, -(-size // 8))
    assert np.array_equal(bits, np.packbits(patterns > 0, axis=1))
    assert np.array_equal(PatternMemory.unpack(bits, size), patterns)
    if kind is not np.bool_:
        assert np.array_equal(PatternMemory.pack(patterns.astype(kind), size), bits)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (np.ones((2, 5)), r"shape \[2, 5\]; \[n, 4\]"),
        (np.ones(4), r"shape \[4\]"),
        (np.array([[1, 1, 1, 1], [1, 2, 1, 1]]), "pattern 1 has 2 at unit 1"),
        (np.array([[1, 1, np.nan, 1]]), "pattern 0 has nan at unit 2"),
        (np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, -1, 1]]), "pattern 2 has both 0 and -1"),
        (np.array([["a"] * 4]), "give numbers"),
    ],
)
def test_what_is_no_pattern_is_refused(patterns: NDArray[Any], message: str) -> None:
    with pytest.raises(PatternError, match=message) as error:
        PatternMemory.pack(patterns, 4)
    assert error.value.reason == "INVALID_PATTERN"


@pytest.mark.parametrize(
    ("cues", "reason", "message"),
    [
        (np.ones((1, 5)), "INVALID_PATTERN", "shape"),
        (np.array([[1, 1, 1, 1], [1, 1, 3, 1]]), "INVALID_PATTERN", "cue 1 has 3 at unit 2"),
        (np.array([[1, np.nan, 1, 1]]), "INVALID_PATTERN", "nan"),
        (np.array([[1, 1, 1, 1], [0, 0, 0, 0]]), "CUE_ALL_MASKED", "cue 1"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_cue_is_refused(rule: str, cues: NDArray[Any], reason: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as error:
        memory_of(random_patterns(2, 4), rule).recall(cues)
    assert error.value.reason == reason


def test_a_store_refuses_what_it_cannot_hold() -> None:
    memory = memory_of(random_patterns(3, 12), patterns_max=5)
    bits = memory.pack(random_patterns(2, 12, seed=4), 12)

    def refused(reason: str, message: str, bits: NDArray[np.uint8], labels: list[str]) -> None:
        with pytest.raises(PatternError, match=message) as error:
            memory.check(bits, labels)
        assert error.value.reason == reason
        assert memory.count == 3

    refused("DUPLICATE_LABEL", "pattern 1: the label 'p2' is stored already", bits, ["new", "p2"])
    refused("DUPLICATE_LABEL", "pattern 1: the label 'new' is given twice", bits, ["new", "new"])
    refused("MEMORY_FULL", "limit of 5", memory.pack(random_patterns(3, 12), 12), ["a", "b", "c"])
    refused("INVALID_PATTERN", "2 patterns have 1 labels", bits, ["new"])
    refused("INVALID_PATTERN", "uint8", bits[:, :1], ["a", "b"])
    refused("INVALID_PATTERN", "beyond its 12 units", bits | 1, ["a", "b"])
    assert memory.check(bits, ["a", "b"]) == ""
    with pytest.raises(PatternError, match="'q'") as error:
        memory.remove(["p0", "q"])
    assert error.value.reason == "UNKNOWN_LABEL"
    assert memory.count == 3
    with pytest.raises(PatternError) as error:
        PatternMemory(12).recall(np.ones((1, 12)))
    assert error.value.reason == "EMPTY_MEMORY"


@pytest.mark.parametrize(
    ("rule", "size", "count", "theory"),
    [
        ("hebb", 1000, 60, ""),
        ("hebb", 1000, 100, "0.100; beyond 0.0724 = 1 / "),
        ("hebb", 1000, 139, "Amit"),
        ("storkey", 500, 130, ""),
        ("storkey", 500, 150, "Storkey 1997"),
        ("pseudo-inverse", 100, 50, ""),
        ("pseudo-inverse", 100, 51, "Kanter"),
        ("pseudo-inverse", 100, 101, "Personnaz"),
        ("dense", 256, 1_000_000, ""),
        ("dense", 20, 1025, "Demircigil"),
    ],
)
def test_a_load_beyond_the_theory_is_warned_of(rule: str, size: int, count: int, theory: str) -> None:
    warning = load_warning(rule, size, count, 4.0)
    assert theory in warning
    assert bool(theory) == bool(warning)
    assert not warning or f"{count}/{size}" in warning


def test_the_warning_counts_what_is_stored_already() -> None:
    memory = memory_of(random_patterns(10, 100), "hebb")
    bits = memory.pack(random_patterns(10, 100, seed=2), 100)
    assert "20/100 = 0.200" in memory.check(bits, [f"q{number}" for number in range(10)])
    assert "ln(P)/4 = 1.15" in PatternMemory(64, beta=1.0).check(
        PatternMemory.pack(random_patterns(100, 64), 64), names(100)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "oja"}, "oja"),
        ({"size": 0}, "at least 1"),
        ({"patterns_max": 0}, "at least 1"),
        ({"beta": 0.0}, "above 0"),
        ({"beta": float("nan")}, "above 0"),
        ({"size": 100_000, "rule": "hebb"}, "take dense"),
    ],
)
@pytest.mark.parametrize("kind", [PatternMemory, Hopfield])
def test_wrong_sizes_are_refused(kind: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"size": 8, **wrong})


# The rules


def slow_storkey(patterns: Ints) -> NDArray[np.float64]:
    size = patterns.shape[1]
    weights = np.zeros((size, size))
    for p in patterns.astype(float):
        old = weights.copy()
        for i in range(size):
            for j in range(size):
                if i != j:
                    h_ij = sum(old[i, k] * p[k] for k in range(size) if k not in (i, j))
                    h_ji = sum(old[j, k] * p[k] for k in range(size) if k not in (i, j))
                    weights[i, j] += (p[i] * p[j] - p[i] * h_ji - h_ij * p[j]) / size
    return weights


def without_diagonal(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return weights - np.diag(np.diag(weights))


def test_weights_are_those_of_the_papers() -> None:
    patterns = random_patterns(5, 13)
    rows = patterns.astype(float)
    np.testing.assert_array_equal(learn("hebb", patterns), without_diagonal(rows.T @ rows))
    np.testing.assert_allclose(learn("storkey", patterns), slow_storkey(patterns), atol=1e-13)
    projection = without_diagonal(np.linalg.pinv(rows) @ rows)
    np.testing.assert_allclose(learn("pseudo-inverse", patterns), projection, atol=1e-12)


@pytest.mark.parametrize("count", [6, 40])
def test_the_pseudo_inverse_bears_dependent_patterns(count: int) -> None:
    patterns = random_patterns(count, 13)
    patterns[1], patterns[2] = patterns[0], -patterns[3]
    rows = patterns.astype(float)
    expected = without_diagonal(np.linalg.pinv(rows, rcond=1e-10) @ rows)
    np.testing.assert_allclose(learn("pseudo-inverse", patterns), expected, atol=1e-10)


@pytest.mark.parametrize("rule", CLASSICAL)
def test_sums_over_weights_are_exact(rule: str) -> None:
    """The same whatever the order: that is what bits and falling energies rest on."""
    weights = exactly_summed(learn(rule, random_patterns(30, 100)))
    state = random_patterns(1, 100, seed=3)[0].astype(weights.dtype)
    order = np.random.default_rng(0).permutation(100)
    assert np.array_equal(weights, weights.T)
    assert not np.diag(weights).any()
    assert np.array_equal(weights @ state, weights[:, order] @ state[order])
    assert np.array_equal(weights @ state, np.cumsum(weights * state, axis=1)[:, -1])
    np.testing.assert_allclose(weights, learn(rule, random_patterns(30, 100)), atol=1e-9)
    assert weights.dtype == (np.float32 if rule == "hebb" else np.float64)


# Recall, classical


def slow_recall(weights: NDArray[np.float64], cue: Ints, generator: np.random.Generator) -> tuple[list[int], int]:
    """One unit after another, each looking at all the others afresh."""
    state = [int(unit) for unit in cue]
    for sweep in range(1, 100):
        before = list(state)
        for unit in generator.permutation(len(state)):
            field = float(weights[unit] @ np.array(state))
            state[unit] = 1 if field > 0 else -1 if field < 0 else state[unit] or 1
        if state == before:
            return state, sweep
    raise AssertionError("no rest")


@pytest.mark.parametrize("rule", CLASSICAL)
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_asynchronous_recall_is_unit_after_unit(rule: str, masked: float) -> None:
    patterns = random_patterns(12, 61)  # beyond what it carries: long ways to spurious states
    memory = memory_of(patterns, rule)
    weights = exactly_summed(learn(rule, patterns)).astype(np.float64)
    cues = random_cues(patterns, 0.25, masked)
    for row, found in enumerate(memory.recall(cues, seed=9)):
        expected, sweeps = slow_recall(weights, cues[row], np.random.Generator(np.random.PCG64([9, row])))
        assert found.pattern.tolist() == expected
        assert (found.sweeps, found.converged) == (sweeps, True)
        distances = (patterns != found.pattern).sum(1)
        assert found.label == f"p{distances.argmin()}"
        assert found.distance == distances.min()
        assert found.overlap == pytest.approx(float(patterns[distances.argmin()] @ found.pattern.astype(float)) / 61)
        assert found.spurious == (found.distance > 0)


@pytest.mark.parametrize("rule", RULES)
def test_the_energy_is_that_of_the_state_and_never_rises(rule: str) -> None:
    patterns = random_patterns(20, 80)
    memory = memory_of(patterns, rule, beta=0.05)
    cues = random_cues(random_patterns(60, 80, seed=8), 0, 0.3)
    divided = {"hebb": 80.0, "dense": 1.0}.get(rule, 1.0)
    for cue, found in zip(cues, memory.recall(cues), strict=True):
        assert len(found.energies) == found.sweeps + 1
        assert (np.diff(found.energies) <= 0).all() if rule != "dense" else (np.diff(found.energies) <= 1e-9).all()
        for state, energy in ((cue, found.energies[0]), (found.pattern, found.energies[-1])):
            s = state.astype(float)
            if rule == "dense":
                expected = -np.log(np.exp(0.05 * patterns @ s).sum()) / 0.05
            else:
                expected = -0.5 * s @ exactly_summed(learn(rule, patterns)).astype(float) @ s / divided
            assert energy == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rule", CLASSICAL)
def test_a_seed_decides_and_the_company_does_not(rule: str) -> None:
    patterns = random_patterns(12, 61)
    memory, cues = memory_of(patterns, rule), random_cues(patterns, 0.3, 0.2)
    whole = memory.recall(cues, seed=3)
    assert alike(whole, memory.recall(cues, seed=3))
    assert alike(whole[:4], memory.recall(cues[:4], seed=3))
    assert not alike(whole, memory.recall(cues, seed=4))
    with ThreadPoolExecutor(4) as pool:
        fresh = memory_of(patterns, rule)
        assert all(alike(whole, found) for found in pool.map(lambda _: fresh.recall(cues, seed=3), range(8)))


def test_synchronous_recall_may_swing() -> None:
    memory = memory_of(np.array([[1, 1]]), "hebb")
    (found,) = memory.recall(np.array([[1, -1]]), synchronous=True)
    assert not found.converged
    assert found.spurious
    assert found.sweeps == 2
    (found,) = memory.recall(np.array([[1, -1]]), synchronous=False)
    assert found.converged
    (found,) = memory.recall(np.array([[1, 0]]), synchronous=True)
    assert (found.pattern.tolist(), found.spurious) == ([1, 1], False)


@pytest.mark.parametrize("rule", CLASSICAL)
def test_synchronous_recall_is_all_units_at_once(rule: str) -> None:
    patterns = random_patterns(8, 60)
    weights = exactly_summed(learn(rule, patterns)).astype(np.float64)
    cues = random_cues(patterns, 0.2, 0.3)
    for cue, found in zip(cues, memory_of(patterns, rule).recall(cues, synchronous=True), strict=True):
        state = cue.astype(float)
        for _ in range(found.sweeps):
            field = weights @ state
            state = np.where(field == 0, np.where(state == 0, 1, state), np.sign(field))
        assert found.pattern.tolist() == state.tolist()


def test_a_negative_is_spurious_and_few_sweeps_are_few() -> None:
    patterns = random_patterns(2, 100)
    memory = memory_of(patterns, "hebb")
    (found,) = memory.recall(-patterns[:1])
    assert (found.spurious, found.converged, found.distance) == (True, True, (patterns[1] != -patterns[0]).sum())
    (found,) = memory.recall(random_cues(patterns[:1], 0.2, 0), sweeps_max=1)
    assert (found.sweeps, found.converged, found.distance) == (1, False, 0)
    with pytest.raises(ValueError, match="sweeps_max"):
        memory.recall(patterns, sweeps_max=0)


# Recall, dense


@pytest.mark.parametrize(("size", "count"), [(5, 3), (13, 200), (64, 1), (100, 40), (256, 3000)])
def test_the_nearest_are_found_over_known_bits(size: int, count: int) -> None:
    patterns = random_patterns(count, size)
    search = PatternSearch(size)
    for part in np.array_split(PatternMemory.pack(patterns, size), 3):
        search.add(part)
    cues = random_cues(random_patterns(20, size, seed=2), 0, 0.4)
    distances, places = search.nearest(cues, 7)
    full = (cues[:, None] * patterns[None] < 0).sum(2)
    order = np.argsort(full, axis=1, kind="stable")[:, :7]
    assert np.array_equal(places, order)
    assert np.array_equal(distances, np.take_along_axis(full, order, 1))
    found = [row for _, rows in search.within(cues[0], int(distances[0, -1])) for row in rows.tolist()]
    assert found == patterns[full[0] <= distances[0, -1]].tolist()


@pytest.mark.parametrize("beta", [0.003, 0.02, 0.1, 0.5, 4.0])
@pytest.mark.parametrize(("size", "count"), [(9, 30), (40, 10), (64, 400)])
def test_dense_recall_is_the_softmax_over_all_patterns(size: int, count: int, beta: float) -> None:
    patterns = random_patterns(count, size)
    search = PatternSearch(size)
    search.add(PatternMemory.pack(patterns, size))
    states = random_cues(random_patterns(50, size, seed=3), 0, 0.3)
    overlaps = states.astype(float) @ patterns.T
    weights = np.exp(beta * (overlaps - overlaps.max(1, keepdims=True)))
    expected = weights @ patterns / weights.sum(1, keepdims=True)
    found = dense_fields(search, states, beta)
    clear = np.abs(expected) > 1e-12
    assert np.array_equal(np.sign(found.fields)[clear], np.sign(expected)[clear])
    energies = -(overlaps.max(1) + np.log(weights.sum(1)) / beta)
    np.testing.assert_allclose(found.energies, energies, rtol=1e-11)


def test_what_cancels_out_keeps_the_unit() -> None:
    """Two patterns equally far from a cue between them: the units in which they differ stay as they were."""
    patterns = np.ones((2, 8), np.int8)
    patterns[0, :3] = patterns[1, 3:6] = -1
    cue = np.array([[1, 1, 1, 1, 1, 1, -1, 1]], np.int8)
    (found,) = memory_of(patterns).recall(cue)
    assert found.pattern.tolist() == [1] * 8
    assert found.spurious
    assert found.converged
    (found,) = memory_of(patterns).recall(np.array([[0, 0, 0, 0, 0, 0, 1, 1]]))
    assert found.pattern.tolist() == [1] * 8


def assert_nearest(memory: PatternMemory, patterns: Ints, cues: Ints) -> int:
    """Every cue whose nearest pattern leads by two units ends in it; how many those are."""
    overlaps = cues.astype(np.float32) @ patterns.astype(np.float32).T
    second, first = np.sort(overlaps, axis=1)[:, -2:].T
    led = np.flatnonzero(first - second >= 4)
    found = memory.recall(cues)
    for row in led:
        assert np.array_equal(found[row].pattern, patterns[overlaps[row].argmax()])
        assert not found[row].spurious
        assert found[row].converged
    return len(led)


@pytest.mark.parametrize(("flips", "masked"), [(0.2, 0.0), (0.0, 0.75), (0.35, 0.0), (0.1, 0.5), (0.5, 0.5)])
def test_dense_recall_ends_in_the_truly_nearest_pattern(flips: float, masked: float) -> None:
    patterns = random_patterns(20_000, 128)
    cues = random_cues(patterns[:100], flips, masked)
    assert assert_nearest(memory_of(patterns), patterns, cues) >= (95 if flips < 0.3 else 10)


@pytest.mark.slow
def test_a_million_patterns_are_searched_exactly() -> None:
    patterns = random_patterns(1_000_000, 256)
    memory = memory_of(patterns)
    for start in range(0, 1000, 100):
        cues = random_cues(patterns[start : start + 100], 0.25, 0.1)
        assert assert_nearest(memory, patterns, cues) >= 95


# Coming and going


@pytest.mark.parametrize("rule", RULES)
def test_what_was_forgotten_is_as_if_it_had_never_been(rule: str) -> None:
    patterns = random_patterns(9, 70)
    memory = memory_of(patterns[:5], rule)
    memory.recall(patterns[:1])  # weights are made now, and must be brought up to date
    memory.add(memory.pack(patterns[5:], 70), ["a", "b", "c", "d"])
    memory.recall(patterns[:1])
    memory.remove(["p1", "a", "p1"])
    kept = [0, 2, 3, 4, 6, 7, 8]
    assert list(memory.labels) == ["p0", "p2", "p3", "p4", "b", "c", "d"]
    assert memory.count == 7
    assert memory.load == pytest.approx(0.1)
    assert not memory.contains("a")
    assert memory.contains("b")
    assert np.array_equal(memory.bits, memory.pack(patterns[kept], 70))
    assert np.array_equal(memory.bits_of(["d", "p0"]), memory.pack(patterns[[8, 0]], 70))
    fresh, cues = memory_of(patterns[kept], rule), random_cues(patterns, 0.2, 0.1)
    for one, other in zip(memory.recall(cues), fresh.recall(cues), strict=True):
        assert np.array_equal(one.pattern, other.pattern)
        np.testing.assert_array_equal(one.energies, other.energies)
    assert (memory.nbytes > 70 * 70 * 4) == (rule != "dense")
    memory.remove(memory.labels)
    assert (memory.count, list(memory.labels)) == (0, [])
    with pytest.raises(PatternError, match="no pattern is stored"):
        memory.recall(cues)
    memory.add(memory.pack(patterns[:1], 70), ["again"])
    assert memory.recall(cues[:1])[0].label == "again"


# The cell


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_a_synchronous_sweep(rule: str, tmp_path: Path) -> None:
    patterns = random_patterns(6, 50)
    made = Hopfield.of(patterns, names(6), rule)
    cell = load_cell(write_bundle(tmp_path, "some", "1", made))
    assert isinstance(cell, Hopfield)
    assert cell.schema.generates
    memory, cues = cell.memory(), random_cues(patterns, 0.2, 0.2)
    assert list(memory.labels) == names(6)
    assert np.array_equal(memory.bits, memory.pack(patterns, 50))
    y, state = cell(torch.from_numpy(cues).float() * 7, cell.initial_state(6))
    sure = (y != 0).all(1)  # a unit that is unknown and feels nothing stays so here; recall must end in a pattern
    assert sure.sum() >= 4
    for row, found in enumerate(memory.recall(cues, synchronous=True, sweeps_max=1)):
        assert torch.where(y[row] == 0, 1, y[row]).tolist() == found.pattern.tolist()
    for _ in range(20):
        y, state = cell(torch.zeros(6, 50), state)
    rested = [
        (row.tolist(), one.pattern.tolist())
        for row, one, told in zip(y, memory.recall(cues, synchronous=True), sure, strict=True)
        if one.converged and told
    ]
    assert all(one == other for one, other in rested)
    assert len(rested) >= 3


def test_a_cell_without_patterns_keeps_what_it_was_told() -> None:
    cell = Hopfield(4)
    y, state = cell(torch.tensor([[0.0, -3, 2, 0]]), cell.initial_state(1))
    assert y.tolist() == [[0, -1, 1, 0]]
    y, _ = cell(torch.tensor([[1.0, 1, 0, 0]]), state)
    assert y.tolist() == [[1, 1, 1, 0]]
    assert cell.memory().count == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_served_size_needs_no_floor(rule: str) -> None:
    torch.set_num_threads(1)
    cell = Hopfield.of(random_patterns(40, 150), names(40), rule, beta=0.02)
    assert cell_floor(cell.eval(), 64) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "distinct"),
        (["a", ""], "1 to 256 bytes"),
        (["a", "µ" * 129], "1 to 256 bytes"),
        ([1, 2], "strings"),
        (["a", "b", "c"], "2"),
    ],
)
def test_wrong_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hopfield(8, labels=labels, patterns_max=2)


# The letters


def test_letters_are_drawn() -> None:
    labels, patterns = letters()
    assert labels == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert patterns.shape == (26, SIDE * SIDE)
    lines = draw(patterns[labels.index("T")]).splitlines()
    assert lines[0] == "##" * SIDE
    assert lines[-1] == " ." * 7 + "##" * 2 + " ." * 7
    assert draw(np.zeros(4)) == " ? ?\n ? ?"
    assert draw(np.array([True, False, False, True])) == "## .\n .##"


def test_the_shipped_letters_come_back_from_noise() -> None:
    cell = load_cell(shipped_models_dir() / "letters-hopfield" / "1")
    assert isinstance(cell, Hopfield)
    assert torch.equal(cell.patterns, letters_cell().patterns)
    (labels, patterns), memory, generator = letters(), cell.memory(), np.random.default_rng(0)
    whole = np.array(
        [
            [one.label == label and not one.spurious for one, label in zip(memory.recall(cues), labels, strict=True)]
            for _ in range(20)
            for cues in (half_replaced(patterns, "lower", generator), random_cues(patterns, 0.25, 0, seed=_))
        ]
    )
    assert whole.mean() >= 0.99
    assert whole[:, labels.index("T")].all()


# The experiments


def test_an_experiment_taken_up_again_counts_the_same() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `train`")
    from engram_models.training.hopfield import CapacityOptions, HopfieldCapacity

    options = CapacityOptions("storkey", 60, 0.1, (0.1, 0.4), networks=2, cues=10)
    recipe: Any = SimpleNamespace(path="here")

    def experiment(seed: int = 3) -> HopfieldCapacity:
        return HopfieldCapacity(recipe, options, seed)

    def finished(running: HopfieldCapacity) -> Any:
        while running.done < running.total:
            running.advance()
        return running.finish()

    whole, first, second = finished(experiment()), experiment(), experiment()
    first.advance()
    second.restore(first.tensors())
    assert second.done == 1
    assert finished(second).metrics == whole.metrics
    assert whole.metrics["exact_at_0.1"] > whole.metrics["exact_at_0.4"]
    assert whole.metrics["energy_rises"] == 0
    assert finished(experiment(4)).curves != whole.curves
    other = HopfieldCapacity(recipe, CapacityOptions(loads=(0.1,)), 1)
    with pytest.raises(ValueError, match="table"):
        other.restore(first.tensors())


@pytest.mark.parametrize("wrong", [{"rule": "oja"}, {"loads": ()}, {"flips": 0.6}, {"reference_loads": (0.1,)}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    from engram_models.training.hopfield import CapacityOptions

    with pytest.raises(ValueError, match=r"oja|at least|from 0|equally"):
        CapacityOptions(**wrong)
