"""Runs a recipe from beginning to end: progress, checkpoints, then the result file, the pictures and the bundle.

<out>/checkpoint.safetensors   while it runs
<out>/result.json              metrics, curves, verdict, recipe, seed, time, machine
<out>/<name>.png               pictures
<out>/models/<name>/<version>  the bundle, ready to be served with --models <out>/models
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engram_models.bundle import BundleError
from engram_models.cell_bundles import write_bundle
from engram_models.files import read_file
from engram_models.json_text import json_text
from engram_models.training.checkpoint import load_checkpoint, save_checkpoint
from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Experiment, Outcome
from engram_models.training.output import write_whole
from engram_models.training.procedures import procedure
from engram_models.training.progress import Progress
from engram_models.training.recipe import Recipe, parsed

CHECKPOINT, RESULT = "checkpoint.safetensors", "result.json"
CHECKPOINT_S = 20.0
_RESULT_BYTES_MAX = 64 << 20


def run(
    recipe: Recipe, seed: int, out: Path, resume: bool = False, checkpoint_s: float = CHECKPOINT_S, threads: int = 1
) -> dict[str, Any]:
    """The result, as it was written. Raises TrainingError.

    One thread by default: sums then do not depend on how many cores there are. A finished run that is resumed is read.
    """
    torch.set_num_threads(threads)
    done = out / RESULT
    if resume and done.exists():
        return _finished(done, recipe, seed)
    if not resume and ((out / CHECKPOINT).exists() or done.exists()):
        raise TrainingError(f"{out} has a run already; --resume goes on with it, or choose another --out")
    experiment = procedure(recipe.procedure)(recipe, _options(recipe), seed)
    spent = _advance(experiment, recipe, seed, out, resume, checkpoint_s)
    begun = time.monotonic()
    outcome = experiment.finish()
    return _write(outcome, recipe, seed, out, spent + time.monotonic() - begun)


def _options(recipe: Recipe) -> Any:
    return parsed(procedure(recipe.procedure).Options, recipe.options, f"{recipe.path}: [options]")


def _advance(experiment: Experiment, recipe: Recipe, seed: int, out: Path, resume: bool, checkpoint_s: float) -> float:
    """Runs the experiment to its end; returns the seconds that it took, those before an interruption included."""
    path, spent = out / CHECKPOINT, 0.0
    if resume and path.exists():
        tensors = load_checkpoint(path, recipe.digest, seed)
        try:
            spent = float(tensors.pop("run.seconds"))
            experiment.restore(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{path}: not a checkpoint of this version of Engram ({error})") from error
    progress = Progress(experiment.total, f"{recipe.name} seed {seed}", done=experiment.done)
    begun = saved = time.monotonic()

    def save() -> None:
        seconds = torch.tensor(spent + time.monotonic() - begun, dtype=torch.float64)
        save_checkpoint(path, {**experiment.tensors(), "run.seconds": seconds}, recipe.name, recipe.digest, seed)

    while experiment.done < experiment.total:
        note = experiment.advance()
        progress.update(experiment.done, note)
        if time.monotonic() - saved > checkpoint_s:
            save()
            saved = time.monotonic()
    save()
    return spent + time.monotonic() - begun


def _write(outcome: Outcome, recipe: Recipe, seed: int, out: Path, seconds: float) -> dict[str, Any]:
    missed = recipe.verdict(outcome.metrics)
    result = {
        "recipe": recipe.name, "claim": recipe.claim, "seed": seed, "passed": not missed, "missed": missed,
        "metrics": dict(outcome.metrics), "options": dict(recipe.options), "model": dict(recipe.model),
        "task": dict(recipe.task), "curves": {name: _thinned(curve) for name, curve in outcome.curves.items()},
        "seconds": round(seconds, 1), "machine": machine(), "digest": recipe.digest,
    }  # fmt: skip
    for name, draw in _pictures(outcome, recipe).items():
        write_whole(out / f"{name}.png", _drawn(draw))
    if recipe.bundle and outcome.cell is not None:
        _bundle(outcome, recipe, out, result)
    write_whole(out / RESULT, (json_text(result, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)
    return result


def _bundle(outcome: Outcome, recipe: Recipe, out: Path, result: Mapping[str, Any]) -> None:
    assert outcome.cell is not None
    directory, bundle = out / "models", recipe.bundle
    shutil.rmtree(directory / bundle["name"] / bundle["version"], ignore_errors=True)  # of a run cut off just here
    try:
        description = " ".join(filter(None, (bundle.get("description", recipe.claim), outcome.note)))
        path = write_bundle(directory, bundle["name"], bundle["version"], outcome.cell, description)
    except BundleError as error:
        raise TrainingError(str(error)) from error
    write_whole(path / "training.json", (json_text({**result, "curves": {}}, indent=1) + "\n").encode())


def _finished(path: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
    try:
        result = json.loads(read_file(path, _RESULT_BYTES_MAX))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: not a result file: {error}") from error
    if not isinstance(result, dict):
        raise TrainingError(f"{path}: not a result file")
    if (result.get("digest"), result.get("seed")) != (recipe.digest, seed):
        raise TrainingError(f"{path} is the result of another recipe or seed; choose another --out")
    return result


def machine() -> str:
    """What the figures were measured on, in words that name no host."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )


def _pictures(outcome: Outcome, recipe: Recipe) -> dict[str, Callable[[], Any]]:
    pictures: dict[str, Callable[[], Any]] = dict(outcome.pictures)
    if "loss" in outcome.curves:
        from engram_models.training.pictures import curves

        pictures["loss"] = lambda: curves({"loss": outcome.curves["loss"]}, recipe.name)
    return pictures


def _drawn(draw: Callable[[], Any]) -> bytes:
    from engram_models.training.pictures import png

    try:
        return png(draw())
    except ImportError as error:
        raise TrainingError(f"pictures need matplotlib: pip install 'engram[train]' ({error})") from error


def _thinned(curve: list[float], most: int = 200) -> list[float]:
    """Means of equal parts: a result file is for reading."""
    size = math.ceil(len(curve) / most) or 1
    return [float(f"{sum(part) / len(part):.6g}") for part in (curve[i : i + size] for i in range(0, len(curve), size))]
