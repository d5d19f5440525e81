"""The bundle that ships: what it reads, how well, and from what it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_models import heldout_digits, load_bundle, load_cell, shipped_models_dir
from engram_models.digits import save_heldout_digits, split_digits
from engram_models.training.errors import TrainingError
from engram_models.training.recipe import load_recipe
from engram_models.training.tasks.digits import DigitRows

ACCURACY_MIN = 0.97
PATH = shipped_models_dir() / "digits-reader" / "1"


def test_digits_reader_reads_the_digits_that_it_never_saw() -> None:
    digits, bundle = heldout_digits(), load_bundle(PATH)
    with torch.inference_mode():
        beliefs = load_cell(bundle).sequence(torch.from_numpy(digits.rows))[0].numpy()
    assert np.allclose(beliefs.sum(2), 1, atol=1e-5)
    by_row = (beliefs.argmax(2) == digits.labels[:, None]).mean(0)
    assert by_row[-1] >= ACCURACY_MIN
    assert by_row[0] < by_row[3] < by_row[-1]
    assert [spec.shape for spec in (*bundle.schema.inputs, *bundle.schema.outputs)] == [(8,), (10,)]


def test_the_recorded_result_is_that_of_the_bundle() -> None:
    digits, bundle = heldout_digits(), load_bundle(PATH)
    recorded = json.loads((PATH / "training.json").read_text())
    assert recorded["passed"]
    assert recorded["digest"] == load_recipe("digits-reader").digest, "the recipe was changed after the bundle was made"
    metrics = recorded["metrics"]
    with torch.inference_mode():
        named = load_cell(bundle).sequence(torch.from_numpy(digits.rows))[0].argmax(2).numpy()
    by_row = (named == digits.labels[:, None]).mean(0)
    assert np.allclose(by_row, metrics["accuracy_by_step"], atol=0.003)  # one digit of 360
    assert metrics["held_out"] == len(digits.labels)


def test_the_held_out_digits_are_whole() -> None:
    digits = heldout_digits()
    assert digits.images.shape == (360, 8, 8)
    assert digits.images.dtype == np.uint8
    assert digits.images.max() == 16
    assert np.bincount(digits.labels).tolist() == [36] * 10
    assert digits.rows.dtype == np.float32
    assert (digits.rows.min(), digits.rows.max()) == (0, 1)


def test_the_split_is_the_shipped_one_and_leaks_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    trained, held = split_digits()
    shipped = heldout_digits()
    assert np.array_equal(held.images, shipped.images)
    assert np.array_equal(held.labels, shipped.labels)
    seen = {image.tobytes() for image in trained.images}
    assert not any(image.tobytes() in seen for image in held.images)
    assert len(trained.labels) + len(held.labels) == 1797
    save_heldout_digits(held, tmp_path)
    assert np.array_equal(heldout_digits(tmp_path).images, shipped.images)


def test_training_batches_take_every_training_digit_once_an_epoch_and_are_reproducible() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    task, still = DigitRows(), DigitRows(shift=0, noise=0)
    trained = split_digits()[0]
    epochs = [[still.batch(number, 100, seed=3) for number in range(start, start + 14)] for start in (0, 14)]
    for batches in epochs:
        seen = torch.cat([batch.inputs for batch in batches]).mul(16).round().byte().flatten(1).numpy()
        assert len({image.tobytes() for image in seen}) == 1400
        assert {image.tobytes() for image in seen} <= {image.tobytes() for image in trained.images}
    assert not torch.equal(epochs[0][0].inputs, epochs[1][0].inputs)
    once, again, other = task.batch(5, 64, 3), task.batch(5, 64, 3), task.batch(5, 64, 4)
    assert torch.equal(once.inputs, again.inputs)
    assert not torch.equal(once.inputs, other.inputs)
    assert torch.equal(once.targets, still.batch(5, 64, 3).targets)
    assert once.weights[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_training_moves_digits_to_the_side_and_pixel_by_pixel_is_the_same_picture() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    still, moved = (
        DigitRows(shift=0, noise=0).batch(0, 64, 1).inputs,
        DigitRows(shift=1, noise=0).batch(0, 64, 1).inputs,
    )
    aside = [torch.nn.functional.pad(still, (1, 1))[:, :, by : by + 8] for by in range(3)]
    found = {next(by for by in range(3) if torch.equal(moved[row], aside[by][row])) for row in range(64)}
    assert found == {0, 1, 2}
    pixels = DigitRows(width=1, shift=0, noise=0, last_only=True).batch(0, 64, 1)
    assert torch.equal(pixels.inputs.view(64, 8, 8), still)
    assert pixels.weights.count_nonzero() == 64
    with pytest.raises(ValueError, match="width must divide 8"):
        DigitRows(width=3)
    with pytest.raises(TrainingError, match="more than the 1437"):
        DigitRows().batch(0, 1438, 1)
