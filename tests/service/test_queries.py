"""What is asked of a model beside its steps: of which models, and with weights that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_models import (
    DBN,
    LSTM,
    NTM,
    RBM,
    BundleError,
    Cell,
    Hopfield,
    Normalised,
    content_addressing,
    load_bundle,
    write_bundle,
)
from engram_models.bundle_writing import write
from engram_service.queries import Queries


def queries_of(path: Path, cell: Cell) -> Queries:
    return Queries(load_bundle(write_bundle(path, "some", "1", cell.eval())))


@pytest.mark.parametrize(
    ("cell", "addressable", "recreates", "patterns"),
    [
        (LSTM(4, 6), None, False, None),
        (NTM(9, 8, 30, slots=32, width=10), (32, 10), False, None),
        (Normalised(NTM(9, 8, 30, slots=32, width=10)), (32, 10), False, None),
        (RBM(12, 7), None, True, None),
        (DBN([12, 7, 5], 3), None, True, None),
        (Normalised(RBM(12, 7)), None, False, None),
        (Hopfield(8, labels=["a"]), None, False, 1),
        (Hopfield(8), None, False, 0),
    ],
)
def test_models_are_asked_for_what_they_have(
    cell: Cell, addressable: Any, recreates: bool, patterns: int | None, tmp_path: Path
) -> None:
    queries = queries_of(tmp_path, cell)
    assert (queries.addressable and queries.addressable.shape) == addressable
    assert queries.recreates == recreates
    assert (None if queries.patterns is None else queries.patterns.count) == patterns


def test_a_memory_is_found_in_the_state(tmp_path: Path) -> None:
    cell, rng = NTM(9, 8, 30, slots=32, width=10, read_heads=2), np.random.default_rng(0)
    queries = queries_of(tmp_path, cell)
    state = [torch.from_numpy(rng.random(spec.shape, np.float32)) for spec in cell.state_schema]
    row = np.concatenate([values.numpy().reshape(-1) for values in state]).view(np.uint8)
    keys, strengths = rng.random((3, 10), np.float32), rng.random(3, np.float32)
    (memory,) = (values for values, spec in zip(state, cell.state_schema, strict=True) if spec.role == "memory")
    weightings, reads = queries.address(row, keys, strengths)
    expected = content_addressing(memory[None], torch.from_numpy(keys)[None], torch.from_numpy(strengths)[None])
    np.testing.assert_allclose(weightings, expected[0], atol=1e-6)
    np.testing.assert_allclose(reads, (expected @ memory)[0], atol=1e-5)


@pytest.mark.parametrize("unknown", [False, True])
def test_unknown_units_are_recreated_and_known_ones_kept(unknown: bool, tmp_path: Path) -> None:
    cell, x = DBN([12, 7, 5], 3), np.random.default_rng(0).random((4, 12), np.float32)
    mask = np.arange(12) < np.array([[0], [1], [5], [12]]) if unknown else None
    values, energies = queries_of(tmp_path, cell).recreate(x, mask, 2)
    with torch.inference_mode():
        expected = cell.recreate(torch.from_numpy(x), None if mask is None else torch.from_numpy(~mask), 2)
    assert values.dtype == energies.dtype == np.float32
    np.testing.assert_allclose(values, expected[0], atol=1e-5)
    np.testing.assert_allclose(energies, expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("cell", "config", "size", "message"),
    [
        (RBM(6, 4), {"visible": 6, "hidden": 5}, 6, "the weights and the config do not fit: weight is float32"),
        (RBM(6, 4), {"visible": 6, "hidden": 4}, 7, r"the inputs are \[\[7\]\], its weights take \[6\]"),
        (Hopfield(6, labels=["a"]), {"size": 6}, 6, "0 labels name"),
        (Hopfield(6), {"size": 6, "beta": "high"}, 6, "the weights and the config do not fit"),
        (Hopfield(6), {"size": 6, "colour": 1}, 6, "colour"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    cell: Cell, config: dict[str, Any], size: int, message: str, tmp_path: Path
) -> None:
    """A bundle of one model's weights, another one's config, and a third one's inputs, its fingerprint right."""
    weights = load_bundle(write_bundle(tmp_path, "one", "1", cell.eval())).read_weights()
    bundle = load_bundle(write_bundle(tmp_path, "other", "1", RBM(size, 2).eval()))
    tensors = {f"weight.{name}": value for name, value in weights.items()} | bundle.check.tensors(bundle.schema)
    path = write(
        tmp_path, "wrong", "1", cell.kind, config, bundle.schema, b"", tensors, description="", allows_non_finite=False
    )
    with pytest.raises(BundleError, match=message):
        Queries(load_bundle(path))
