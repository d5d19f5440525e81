"""The bundle that ships: what it reads, how well, and from what it was trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engram_models import heldout_digits, load_bundle, shipped_models_dir

ACCURACY_MIN = 0.96
PATH = shipped_models_dir() / "digits-reader" / "1"


def test_digits_reader_reads_the_digits_that_it_never_saw() -> None:
    digits, bundle = heldout_digits(), load_bundle(PATH)
    with torch.inference_mode():
        beliefs = bundle.cell.sequence(torch.from_numpy(digits.rows))[0].numpy()
    assert np.allclose(beliefs.sum(2), 1, atol=1e-5)
    by_row = (beliefs.argmax(2) == digits.labels[:, None]).mean(0)
    assert by_row[-1] >= ACCURACY_MIN
    assert by_row[0] < by_row[3] < by_row[-1]
    assert (bundle.input.shape, bundle.output.shape) == ((8,), (10,))


def test_the_recorded_result_is_that_of_the_bundle() -> None:
    digits, bundle = heldout_digits(), load_bundle(PATH)
    recorded = json.loads((PATH / "training.json").read_text())
    with torch.inference_mode():
        named = bundle.cell.sequence(torch.from_numpy(digits.rows))[0].argmax(2).numpy()
    by_row = (named == digits.labels[:, None]).mean(0)
    assert np.allclose(by_row, recorded["held_out_accuracy_by_row"], atol=0.003)  # one digit of 360
    assert recorded["held_out"] == len(digits.labels)


def test_the_held_out_digits_are_whole() -> None:
    digits = heldout_digits()
    assert digits.images.shape == (360, 8, 8)
    assert digits.images.dtype == np.uint8
    assert digits.images.max() == 16
    assert np.bincount(digits.labels).tolist() == [36] * 10
    assert digits.rows.dtype == np.float32
    assert (digits.rows.min(), digits.rows.max()) == (0, 1)


def test_the_split_is_the_shipped_one_and_leaks_nothing() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    from engram_models.training.digits_reader import split_digits

    trained, held = split_digits()
    shipped = heldout_digits()
    assert np.array_equal(held.images, shipped.images)
    assert np.array_equal(held.labels, shipped.labels)
    seen = {image.tobytes() for image in trained.images}
    assert not any(image.tobytes() in seen for image in held.images)
    assert len(trained.labels) + len(held.labels) == 1797


def test_training_is_reproducible() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    from engram_models.training.digits_reader import Recipe, split_digits, train

    before = torch.get_num_threads()
    data = split_digits()[0]
    data = data._replace(images=data.images[:256], labels=data.labels[:256])
    first, second, other = (train(Recipe(seed=seed, epochs=2, hidden_size=16), data) for seed in (3, 3, 4))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)
