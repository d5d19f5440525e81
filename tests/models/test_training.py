"""Running a recipe: killed and taken up again, refused, stopped by a full disk or by numbers that run away."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engram_models import LSTM, BundleError, load_bundle, write_bundle
from engram_models.commands import train
from engram_models.training.checkpoint import load_checkpoint, save_checkpoint
from engram_models.training.errors import TrainingError
from engram_models.training.procedures import procedure
from engram_models.training.recipe import load_recipe, parsed
from engram_models.training.run import run

RECIPE = """
name = "small"
claim = "none"
procedure = "sequence"
seeds = [4, 5]
[model]
kind = "lstm"
hidden_size = 5
[task]
name = "adding"
length = 8
test_rows = 100
[options]
sequences = 960
batch = 16
learning_rate = 1e-2
schedule = "cosine"
clip_norm = 1.0
evaluate_every = 80
metric = "mse"
keep_best = true
[quick]
sequences = 320
[quick.pass]
mse = { max = 1e-9 }
[pass]
mse = { max = 10 }
[bundle]
name = "adder"
version = "1"
"""
CHILD = """
import os, signal, sys
from pathlib import Path
from engram_models.training.recipe import load_recipe
from engram_models.training.run import run

rename, count = os.replace, 0

def killed_at_the_twentieth_checkpoint(source, target):
    global count
    count += 1
    if count == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = killed_at_the_twentieth_checkpoint
run(load_recipe(sys.argv[1]), 4, Path(sys.argv[2]), checkpoint_s=0)
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def changed(path: Path, old: str, new: str) -> Path:
    """The recipe beside itself, with a line of it replaced."""
    text = path.read_text()
    assert text.count(old) == 1
    other = path.with_name("changed.toml")
    other.write_text(text.replace(old, new))
    return other


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_a_run_that_was_killed_ends_as_one_that_was_not(recipe_path: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe = load_recipe(recipe_path)
    child = subprocess.run([sys.executable, "-c", CHILD, str(recipe_path), str(cut)], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert files(cut) == [".checkpoint.safetensors.writing", "checkpoint.safetensors"]
    assert int(load_file(cut / "checkpoint.safetensors")["counts"][0]) == 19 * 16
    with pytest.raises(TrainingError, match="has a run already; --resume"):
        run(recipe, 4, cut)
    expected, result = run(recipe, 4, whole), run(recipe, 4, cut, resume=True)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    weights = [load_file(out / "models" / "adder" / "1" / "weights.safetensors") for out in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert files(cut) == files(whole)
    assert run(recipe, 4, cut, resume=True) == json.loads((cut / "result.json").read_text())  # read, not run again


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "weight_decay": 0.01},
        {"optimizer": "rmsprop", "momentum": 0.9, "k1": 3, "k2": 5},
        {"optimizer": "sgd", "momentum": 0.9},
        {"schedule": "one-cycle", "stop_at": 5.0},
    ],
)
def test_every_optimizer_goes_on_to_the_bit(recipe_path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = load_recipe(recipe_path)
    kind = procedure("sequence")
    table = {**recipe.options, "sequences": 480, "evaluate_every": 80, **options}

    def made() -> Any:
        return kind(recipe, parsed(kind.Options, table, "here"), seed=3)

    def to_the_end(experiment: Any, most: int = 10_000) -> Any:
        while experiment.done < min(experiment.total, most):
            experiment.advance()
        return experiment

    whole, first, second = to_the_end(made()), to_the_end(made(), 160), made()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, first.tensors(), "small", "d", 3)
    torch.manual_seed(99)  # what is drawn from the global generator in between must not matter
    second.restore(load_checkpoint(path, "d", 3))
    assert second.done == 160
    kept, other = whole.tensors(), to_the_end(second).tensors()
    assert kept.keys() == other.keys()
    assert all(torch.equal(kept[key], other[key]) for key in kept)
    assert whole.done == (240 if "stop_at" in options else 480)
    assert whole.finish().metrics == second.finish().metrics


def test_another_seed_gives_another_result_and_the_same_one_the_same(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, quick=True)
    results = [run(recipe, seed, tmp_path / str(place))["metrics"]["mse"] for place, seed in enumerate((4, 4, 5))]
    assert results[0] == results[1] != results[2]


def test_a_checkpoint_or_result_of_another_recipe_or_seed_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    recipe, out = load_recipe(recipe_path, quick=True), tmp_path / "out"
    other = load_recipe(changed(recipe_path, "hidden_size = 5", "hidden_size = 6"), quick=True)
    path = out / "checkpoint.safetensors"
    save_checkpoint(path, {"x": torch.zeros(3)}, recipe.name, recipe.digest, 4)
    before = path.read_bytes()
    for one, seed, message in ((other, 4, "checkpoint of another recipe \\(small"), (recipe, 5, "of seed 4, not of 5")):
        with pytest.raises(TrainingError, match=message):
            run(one, seed, out, resume=True)
    with pytest.raises(TrainingError, match="not a checkpoint of this version"):
        run(recipe, 4, out, resume=True)
    assert path.read_bytes() == before
    path.write_bytes(before[:-5])
    with pytest.raises(TrainingError, match="not a checkpoint"):
        run(recipe, 4, out, resume=True)
    path.unlink()
    run(recipe, 4, out)
    with pytest.raises(TrainingError, match="result of another recipe or seed"):
        run(other, 4, out, resume=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('claim = "none"', 'clam = "none"', "there is no key 'clam'; there are: name, claim"),
        ("batch = 16", "batches = 16", "\\[options\\]: there is no key 'batches'"),
        ("batch = 16", "batch = 0", "sequences, batch and learning_rate must be greater than 0"),
        ("batch = 16", "batch = 16.5", "batch must be a whole number, not 16.5"),
        ("batch = 16", "batch = true", "batch must be a whole number"),
        ("clip_norm = 1.0", "clip_norm = nan", "clip_norm must be a finite number"),
        ("sequences = 960", "", "lacks the key 'sequences'"),
        ('schedule = "cosine"', 'schedule = "cosines"', "'cosines' is not one of constant, cosine"),
        ('metric = "mse"', "", "keep_best need evaluate_every and metric"),
        ("length = 8", "length = 1", "length must be at least 2"),
        ("length = 8", "lenght = 8", "\\[task\\]: there is no key 'lenght'; there are: length, test_rows"),
        ('name = "adding"', 'name = "subtracting"', "there is no task 'subtracting'; there are: adding"),
        ('kind = "lstm"', 'kind = "lstn"', "kind must be one of bidirectional"),
        ("hidden_size = 5", "hidden_size = 0", "does not fit kind lstm: .* at least 1"),
        ("hidden_size = 5", "output_size = 5", "output_size is 5, the task's is 1"),
        ("hidden_size = 5", 'hidden_size = 5\nactivation = "tanh"', "activation must be one of none, softmax, sigmoid"),
        ('procedure = "sequence"', 'procedure = "sequences"', "there is no procedure 'sequences'; there are: sequence"),
        ("seeds = [4, 5]", "seeds = []", "seeds must be a list of whole numbers"),
        ("mse = { max = 10 }", "mse = 10", "\\[pass\\] mse must be"),
        ('version = "1"', "", "\\[bundle\\] needs name and version"),
        ('version = "1"', 'licence = "1"', "\\[bundle\\]: there is no key 'licence'"),
        ("[model]", "[model", "not toml"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_written(
    recipe_path: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=message):
        run(load_recipe(changed(recipe_path, old, new)), 4, out)
    assert not out.exists()


def test_a_metric_that_the_task_has_not_ends_training(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="metric 'mae' is not one of this task's: mse"):
        run(load_recipe(changed(recipe_path, 'metric = "mse"', 'metric = "mae"')), 4, tmp_path / "out")


def test_numbers_that_run_away_end_training_and_leave_no_result(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(changed(recipe_path, "learning_rate = 1e-2", "learning_rate = 1e30"))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) after \d+ sequences; a smaller learning_rate"):
        run(recipe, 4, tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
    assert not (tmp_path / "out" / "models").exists()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write further, as it does where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(recipe_path: Path, tmp_path: Path) -> None:
    recipe, out = load_recipe(recipe_path, quick=True), tmp_path / "out"
    whole = run(recipe, 4, tmp_path / "whole")
    kind = procedure("sequence")
    half = kind(recipe, parsed(kind.Options, recipe.options, "here"), 4)
    for _ in range(10):
        half.advance()
    path = out / "checkpoint.safetensors"
    save_checkpoint(path, {**half.tensors(), "run.seconds": torch.tensor(1.0)}, recipe.name, recipe.digest, 4)
    before = path.read_bytes()
    with (
        files_of_at_most(len(before) // 2),
        pytest.raises(TrainingError, match=r"checkpoint.safetensors: .*nothing was"),
    ):
        run(recipe, 4, out, resume=True, checkpoint_s=0)
    assert path.read_bytes() == before
    assert files(out) == ["checkpoint.safetensors"]
    result = run(recipe, 4, out, resume=True)  # there is room again
    assert {**result, "seconds": 0} == {**whole, "seconds": 0}


def test_a_disk_that_is_full_at_the_end_leaves_no_half_bundle(recipe_path: Path, tmp_path: Path) -> None:
    recipe, out = load_recipe(recipe_path, quick=True), tmp_path / "out"
    run(recipe, 4, tmp_path / "whole")
    names = ("loss.png", "models/adder/1/weights.safetensors")
    picture, weights = (len((tmp_path / "whole" / name).read_bytes()) for name in names)
    assert weights < picture
    with files_of_at_most(picture - 1), pytest.raises(TrainingError, match=r"loss.png: .*nothing was written"):
        run(recipe, 4, out)
    assert files(out) == ["checkpoint.safetensors"]
    result = run(recipe, 4, out, resume=True)
    assert result["metrics"]["sequences"] == 320
    load_bundle(out / "models" / "adder" / "1")


def test_a_bundle_for_which_there_is_no_room_is_not_written(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(BundleError, match=r"adder/1: "):
        write_bundle(tmp_path, "adder", "1", LSTM(2, 16, output_size=1))
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_said(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(TrainingError, match="out"):
        run(load_recipe(recipe_path, quick=True), 4, tmp_path / "out")


def engram_train(*words: str) -> int:
    parser = argparse.ArgumentParser()
    train.configure(parser)
    return train.run(parser.parse_args(words))


def test_the_command_says_what_came_out(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert engram_train(str(recipe_path), "--quick") == 1  # its [quick.pass] is out of reach
    printed = capsys.readouterr().out
    assert "NO: mse is" in printed
    assert os.path.exists("runs/small/seed-4/result.json")
    assert engram_train(str(recipe_path), "--json", "--seed", "5", "--out", "here") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["seed"], result["passed"], result["missed"]) == (5, True, [])
    assert engram_train(str(recipe_path), "--json", "--out", "here") == 1
    assert "has a run already" in json.loads(capsys.readouterr().out)["error"]
    assert engram_train("no-such-recipe") == 1
    assert "no recipe 'no-such-recipe' and no such file; there are: adding-lstm" in capsys.readouterr().err
    assert engram_train() == 2
    assert engram_train("--list") == 0
    assert "digits-reader" in capsys.readouterr().out
