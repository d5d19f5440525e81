"""Trains `digits-reader`: an LSTM that reads an 8x8 handwritten digit row by row and says after every row what it may be.

    python -m engram_models.training.digits_reader [--out DIR] [--seed N] [--replace]

The data are scikit-learn's digits (1,797 images of 8x8 pixels). 36 of each digit, drawn once with a fixed seed of their own, are
held out: neither training nor any choice of the recipe's numbers looked at them. They are written beside the bundle. The same seed
gives the same bundle on the same machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_models.bundle import BundleError, shipped_models_dir, write_bundle
from engram_models.digits import Digits, save_heldout_digits
from engram_models.recurrent import LSTM
from engram_models.training.progress import Progress

NAME = "digits-reader"
DESCRIPTION = (
    "Reads an 8x8 handwritten digit one row (8 values, 0..1) at a time; ten class probabilities after every row."
)
SPLIT_SEED = 1797
HELD_OUT_PER_CLASS = 36


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the outcome."""

    seed: int = 1
    hidden_size: int = 96
    epochs: int = 80
    batch: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    noise: float = 0.05  # standard deviation, of pixels 0..1
    clip_norm: float = 1.0


def split_digits() -> tuple[Digits, Digits]:
    """(training, held-out) parts of scikit-learn's digits: the same for every recipe, all classes alike in the latter."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    per_class = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    held = generator.permutation(np.concatenate([rows[:HELD_OUT_PER_CLASS] for rows in per_class]))
    trained = generator.permutation(np.concatenate([rows[HELD_OUT_PER_CLASS:] for rows in per_class]))
    data = Digits(images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.int64))
    return Digits(data.images[trained], data.labels[trained]), Digits(data.images[held], data.labels[held])


def train(recipe: Recipe, data: Digits) -> LSTM:
    """A trained cell. One thread, so that sums do not depend on how many cores there are."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    cell = LSTM(8, recipe.hidden_size, output_size=10, activation="softmax")
    images, labels = torch.from_numpy(data.rows), torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(cell.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches = len(labels) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.epochs * batches)
    progress = Progress(recipe.epochs, f"training {NAME}")
    for epoch in range(1, recipe.epochs + 1):
        order = torch.randperm(len(labels), generator=generator)
        total = 0.0
        for rows in order[: batches * recipe.batch].view(batches, recipe.batch):
            loss = row_loss(cell.sequence(_disturb(images[rows], recipe.noise, generator))[0], labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(cell.parameters(), recipe.clip_norm)
            optimizer.step()
            schedule.step()
            total += loss.item()
        progress.update(epoch, f"loss {total / batches:.4f}")
    return cell


def row_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy after every row, weighted 1..8: the last row counts most, the first must still be calibrated.

    probabilities [batch, rows, classes], labels int64 [batch].
    """
    right = probabilities.gather(2, labels.view(-1, 1, 1).expand(-1, probabilities.shape[1], 1)).squeeze(2)
    weights = torch.arange(1.0, probabilities.shape[1] + 1)
    return -(torch.log(right.clamp_min(1e-9)) * (weights / weights.sum())).sum(1).mean()


def _disturb(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel to the side, and noise: 1,437 images alone are learnt by heart."""
    padded = torch.nn.functional.pad(images, (1, 1))
    shift = torch.randint(0, 3, (len(images), 1, 1), generator=generator)
    columns = (torch.arange(8).view(1, 1, 8) + shift).expand(-1, 8, -1)
    return padded.gather(2, columns) + noise * torch.randn(images.shape, generator=generator)


def accuracy_by_row(cell: LSTM, data: Digits) -> list[float]:
    """The share of digits named correctly after each of the eight rows."""
    with torch.inference_mode():
        named = cell.sequence(torch.from_numpy(data.rows))[0].argmax(2)
    return [round(share, 4) for share in (named == torch.from_numpy(data.labels)[:, None]).double().mean(0).tolist()]


def _report(recipe: Recipe, cell: LSTM, trained: Digits, held: Digits, seconds: float) -> dict[str, Any]:
    return {
        "model": NAME,
        "recipe": asdict(recipe),
        "split_seed": SPLIT_SEED,
        "trained_on": len(trained.labels),
        "held_out": len(held.labels),
        "training_accuracy_by_row": accuracy_by_row(cell, trained),
        "held_out_accuracy_by_row": accuracy_by_row(cell, held),
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    default = Recipe()
    parser = argparse.ArgumentParser(prog="digits_reader", description="Trains digits-reader and writes its bundle.")
    parser.add_argument(
        "--out", type=Path, default=shipped_models_dir(), help="where bundles are (default: the shipped ones)"
    )
    parser.add_argument("--model-version", default="1", help="version to write (default: 1)")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--replace", action="store_true", help="remove that version first, if there is one")
    args = parser.parse_args(arguments)
    target = args.out / NAME / args.model_version
    if target.exists() and not args.replace:
        print(f"{target} exists; --replace removes it", file=sys.stderr)
        return 1
    recipe = Recipe(seed=args.seed, epochs=args.epochs)
    start = time.monotonic()
    trained, held = split_digits()
    cell = train(recipe, trained)
    report = _report(recipe, cell, trained, held, time.monotonic() - start)
    if target.exists():
        shutil.rmtree(target)
    try:
        path = write_bundle(args.out, NAME, args.model_version, cell, DESCRIPTION)
    except BundleError as error:
        print(error, file=sys.stderr)
        return 1
    save_heldout_digits(held, args.out)
    (path / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["held_out_accuracy_by_row"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
