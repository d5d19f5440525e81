"""What is asked of a model beside its steps, on NumPy: against torch and against faiss, and where neither is installed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engram_models import (
    DBN,
    RBM,
    RULES,
    Cell,
    Hopfield,
    PatternMemory,
    content_addressing,
    pattern_counting,
    pattern_search,
)
from engram_models.addressing import address
from engram_models.pattern_search import PatternSearch
from engram_models.patterns import own_memory
from engram_models.recreation import Recreation

Floats = NDArray[np.floating]


def weights_of(cell: Cell) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in cell.state_dict().items()}


# An NTM's memory


@pytest.mark.parametrize(("slots", "width", "count"), [(1, 1, 1), (7, 3, 4), (128, 20, 9), (1000, 33, 2)])
def test_a_memory_is_addressed_as_torch_does_it(slots: int, width: int, count: int) -> None:
    rng = np.random.default_rng(slots)
    memory, keys = (rng.standard_normal((n, width)).astype(np.float32) for n in (slots, count))
    memory[0], keys[0] = 0, 0
    strengths = rng.uniform(-1, 20, count).astype(np.float32)
    weightings, reads = address(memory, keys, strengths)
    batch = torch.from_numpy(memory)[None]
    expected = content_addressing(batch, torch.from_numpy(keys)[None], torch.from_numpy(strengths)[None])
    assert weightings.dtype == reads.dtype == np.float32
    np.testing.assert_allclose(weightings, expected[0], atol=2e-6)
    np.testing.assert_allclose(reads, (expected @ batch)[0], atol=5e-6)
    np.testing.assert_allclose(weightings.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("slots", "width"), [(7, 3), (128, 20), (1000, 33)])
def test_a_key_is_answered_the_same_whatever_is_asked_beside_it(slots: int, width: int) -> None:
    rng = np.random.default_rng(1)
    memory, keys = (rng.standard_normal((n, width)).astype(np.float32) for n in (slots, 40))
    strengths = rng.uniform(0, 20, 40).astype(np.float32)
    whole = address(memory, keys, strengths)
    for chosen in ([3], [39], range(1, 40), rng.permutation(40)):
        for some, all_of_them in zip(address(memory, keys[chosen], strengths[chosen]), whole, strict=True):
            assert np.array_equal(some, all_of_them[chosen])


def test_extreme_memories_and_keys_are_answered_without_a_warning() -> None:
    memory = np.array([[1e30, 0], [0, 1e-30], [0, 0]], np.float32)
    weightings, _ = address(memory, np.array([[1e30, 0], [0, 0]], np.float32), np.array([3e38, 5], np.float32))
    assert weightings[0].tolist() == [1, 0, 0]
    np.testing.assert_allclose(weightings[1], 1 / 3)
    memory[2, 0] = np.nan
    assert np.isnan(address(memory, memory[:1], np.ones(1, np.float32))[0]).all()


# Boltzmann machines


def machines() -> list[RBM | DBN]:
    torch.manual_seed(3)
    cells: list[RBM | DBN] = [RBM(30, 20), RBM(5, 9, "features"), DBN([30, 20, 9], 3), DBN([12, 7], 2, "recreate")]
    for cell in cells:
        for parameter in cell.parameters():
            torch.nn.init.normal_(parameter, std=0.8)
    return cells


def recreation_of(cell: RBM | DBN) -> Recreation:
    return Recreation(cell.kind, cell.config, weights_of(cell))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sweeps", [1, 6])
def test_inputs_are_recreated_as_torch_does_it(masked: bool, sweeps: int) -> None:
    for cell in machines():
        rng = np.random.default_rng(2)
        x = rng.random((8, cell.input.shape[0]), np.float32)
        x[0], x[1] = 0, 1
        known = rng.random(x.shape) < 0.4 if masked else None
        if known is not None:
            x[~known] = np.nan
        given = x.copy()
        with torch.inference_mode():
            values, energies = cell.recreate(
                torch.from_numpy(x), None if known is None else torch.from_numpy(known), sweeps
            )
        found = recreation_of(cell).recreate(x, known, sweeps)
        assert found[0].dtype == found[1].dtype == np.float32
        np.testing.assert_allclose(found[0], values, atol=1e-5)
        np.testing.assert_allclose(found[1], energies, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(x, given, "what is given is left alone")
        if known is not None:
            assert np.array_equal(found[0][known], x[known])
        wide = recreation_of(cell.double())
        with torch.inference_mode():
            values, energies = cell.recreate(
                torch.from_numpy(x).double(), None if known is None else torch.from_numpy(known), sweeps
            )
        for one, other in zip(wide.recreate(x, known, sweeps), (values, energies), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


def test_large_sums_are_recreated_without_a_warning() -> None:
    cell = RBM(3, 2)
    torch.nn.init.constant_(cell.weight, 500)
    torch.nn.init.constant_(cell.bias, -700)
    values, energies = recreation_of(cell).recreate(np.array([[0, 0, 0], [1, 1, 1]], np.float32))
    assert values.tolist() == [[0.5] * 3, [1] * 3]
    assert np.isfinite(energies).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.recreate(np.full((2, 6), 1.5)), "within 0..1"),
        (lambda one: one.recreate(np.full((2, 6), np.nan)), "within 0..1"),
        (lambda one: one.recreate(np.zeros((2, 5))), r"expected \[batch, 6\]"),
        (lambda one: one.recreate(np.zeros((2, 6)), np.ones((2, 5), np.bool_)), "must be alike"),
        (lambda one: one.recreate(np.zeros((2, 6)), sweeps=0), "at least 1"),
    ],
)
def test_what_cannot_be_recreated_is_refused(call: Callable[[Recreation], object], message: str) -> None:
    for cell in (RBM(6, 4), DBN([6, 5, 4], 3)):
        with pytest.raises(ValueError, match=message):
            call(recreation_of(cell))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("lstm", {}, "rbm and dbn"),
        ("rbm", {"visible": 6}, "sizes"),
        ("rbm", {"visible": 6, "hidden": "4"}, "sizes"),
        ("rbm", {"visible": 6, "hidden": 3}, r"weight is float32 \[4, 6\]; the config says float32 \[3, 6\]"),
        ("dbn", {"sizes": [6]}, "sizes"),
        ("dbn", {"sizes": 6}, "sizes"),
        ("dbn", {"sizes": [6, 4]}, r"rbms.0.weight is missing"),
    ],
)
def test_weights_that_are_no_machine_are_refused(kind: str, config: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recreation(kind, config, weights_of(RBM(6, 4)))


# Patterns


def alike(one: PatternMemory, other: PatternMemory) -> bool:
    wholes = [(m.size, m.rule, m.beta, m.patterns_max, list(m.labels), m.bits.tolist()) for m in (one, other)]
    return wholes[0] == wholes[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_network_comes_with_its_patterns(rule: str) -> None:
    patterns = np.random.default_rng(0).choice([-1, 1], (5, 43))
    cell = Hopfield.of(patterns, list("abcde"), rule, beta=0.5, patterns_max=9)
    own = own_memory(cell.config, weights_of(cell))
    assert alike(own, cell.memory()) and own.count == 5
    assert np.array_equal(own.bits, PatternMemory.pack(patterns, 43))
    copy = own.copy()
    assert alike(copy, own)
    copy.add(PatternMemory.pack(-patterns[:1], 43), ["f"])
    copy.remove(["a"])
    assert list(copy.labels) == list("bcdef") and list(own.labels) == list("abcde")
    assert own.recall(patterns[:1])[0].label == "a" and copy.recall(-patterns[:1])[0].label == "f"
    assert alike(own_memory({"size": 8}, {}), Hopfield(8).memory())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 43, "labels": ["a"]}, r"patterns are bool \[2, 43\]; 1 labels name bool \[1, 43\]"),
        ({"size": 42, "labels": ["a", "b"]}, r"patterns are bool \[2, 43\]"),
        ({"size": 43, "labels": ["a", "a"]}, "distinct"),
        ({"size": 43, "labels": ["a", 1]}, "strings"),
        ({"size": 43, "labels": ["a", "b"], "patterns_max": 1}, "patterns_max"),
        ({"size": 43, "labels": ["a", "b"], "rule": "oja"}, "oja"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(config: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_memory(config, {"patterns": np.zeros((2, 43), np.bool_)})


def searches(size: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, PatternSearch]:
    """One of each kind."""
    made = {"faiss": PatternSearch(size)}
    monkeypatch.setitem(sys.modules, "faiss", None)
    made["numpy"] = PatternSearch(size)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize(
    ("size", "count", "distinct"),
    [(5, 3, 3), (9, 5000, 300), (13, 200, 200), (64, 1, 1), (100, 40, 40), (256, 20_000, 30), (300, 9000, 9000),
     (1100, 3000, 40), (70_000, 60, 9)],
)  # fmt: skip
def test_numpy_finds_what_faiss_finds_ties_too(
    size: int, count: int, distinct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="needs the extra `faiss`")
    rng = np.random.default_rng(size)
    bits = np.packbits(rng.integers(0, 2, (distinct, size), np.uint8), axis=1)[rng.integers(0, distinct, count)]
    cues = PatternMemory.unpack(bits[rng.integers(0, count, 33)], size)
    cues *= rng.choice(np.array([-1, 0, 1, 1, 1], np.int8), cues.shape)
    both = searches(size, monkeypatch)
    for search in both.values():
        for part in np.array_split(bits, 3):
            search.add(part)
    assert both["faiss"].nbytes == 2 * both["numpy"].nbytes
    for kept in (None, np.arange(count) % 3 != 1):
        for k in (1, 7, 16):
            found = [search.nearest(cues, k) for search in both.values()]
            for one, other in zip(*found, strict=True):
                assert one.shape == (33, min(k, len(both["numpy"]))) and np.array_equal(one, other)
        assert np.array_equal(*(search.bits for search in both.values()))
        reach = int(found[0][0][0, -1])
        near = [[row for _, rows in s.within(cues[0], reach) for row in rows.tolist()] for s in both.values()]
        assert near[0] == near[1] and len(near[0]) >= 1
        if kept is not None:
            break
        for search in both.values():
            search.keep(np.arange(count) % 3 != 1)


def test_bits_are_counted_without_bitwise_count_too() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 63, (5, 7), np.uint64) | np.uint64(1 << 63)
    words[0] = 0
    expected = [[int(word).bit_count() for word in row] for row in words.tolist()]
    assert pattern_counting.looked_up(words).tolist() == pattern_counting.ones(words).tolist() == expected


def test_a_search_of_many_without_faiss_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pattern_search._tell.cache_clear()
    search = searches(16, monkeypatch)["numpy"]
    search.add(np.packbits(np.random.default_rng(0).integers(0, 2, (10_001, 16), np.uint8), axis=1))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            search.nearest(np.ones((1, 16), np.int8), 1)
    assert [record.message for record in caplog.records] == [
        "many patterns are searched without faiss; pip install 'engram[faiss]' makes it quicker"
    ]


# Without torch and faiss

ALONE = """
import sys
for name in ("torch", "faiss", "onnx"):
    sys.modules[name] = None
import numpy as np
from engram_models import PatternMemory
from engram_models.addressing import address
from engram_models.patterns import own_memory
from engram_models.recreation import Recreation

with np.load(sys.argv[1]) as file:
    given = dict(file)
found = {}
for rule in ("dense", "hebb", "storkey", "pseudo-inverse"):
    memory = own_memory({"size": 64, "labels": [f"p{row}" for row in range(6)], "rule": rule}, given)
    hits = memory.recall(given["cues"], seed=3)
    found[rule] = np.stack([hit.pattern for hit in hits])
    found[f"{rule} energies"] = np.concatenate([hit.energies for hit in hits])
    found[f"{rule} labels"] = np.array([hit.label for hit in hits])
found["weightings"], found["reads"] = address(given["memory"], given["keys"], given["strengths"])
weights = {name[2:]: value for name, value in given.items() if name.startswith("w.")}
found["values"], found["energies"] = Recreation("dbn", {"sizes": [12, 7, 5], "classes": 3}, weights).recreate(given["x"])
np.savez(sys.argv[2], **found)
"""


def test_all_is_answered_where_neither_torch_nor_faiss_is_installed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    patterns = rng.choice(np.array([-1, 1], np.int8), (6, 64))
    cues = patterns * rng.choice(np.array([-1, 0, 1, 1, 1], np.int8), patterns.shape)
    dbn, names = DBN([12, 7, 5], 3), [f"p{row}" for row in range(6)]
    memory, keys, strengths, x = (rng.random(shape, np.float32) for shape in ((20, 4), (3, 4), 3, (5, 12)))
    np.savez(
        tmp_path / "given.npz", patterns=patterns > 0, cues=cues, memory=memory, keys=keys, strengths=strengths, x=x,
        **{f"w.{name}": value for name, value in weights_of(dbn).items()},
    )  # fmt: skip
    paths = str(tmp_path / "given.npz"), str(tmp_path / "found.npz")
    subprocess.run([sys.executable, "-c", ALONE, *paths], check=True, timeout=60)
    with np.load(tmp_path / "found.npz") as file:
        found = dict(file)
    for rule in RULES:
        hits = Hopfield.of(patterns, names, rule).memory().recall(cues, seed=3)
        assert [hit.label for hit in hits] == found[f"{rule} labels"].tolist()
        assert np.array_equal(np.stack([hit.pattern for hit in hits]), found[rule])
        assert np.array_equal(np.concatenate([hit.energies for hit in hits]), found[f"{rule} energies"])
    batch = torch.from_numpy(memory)[None]
    expected = content_addressing(batch, torch.from_numpy(keys)[None], torch.from_numpy(strengths)[None])
    np.testing.assert_allclose(found["weightings"], expected[0], atol=1e-6)
    np.testing.assert_allclose(found["reads"], (expected @ batch)[0], atol=1e-6)
    with torch.inference_mode():
        values, energies = dbn.recreate(torch.from_numpy(x))
    np.testing.assert_allclose(found["values"], values, atol=1e-5)
    np.testing.assert_allclose(found["energies"], energies, rtol=1e-5)
