"""How exact recall from a large dense Hopfield memory is. procedures.py names it `dense-recall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_models.patterns import BETA, Recalled
from engram_models.training.counted import Counted, Patterns, flipped, random_patterns, stored, unknown
from engram_models.training.experiment import Outcome
from engram_models.training.pictures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram_models.training.recipe import Recipe


@dataclass(frozen=True)
class DenseOptions:
    """Random patterns; cues with `flips` wrong units, with `masked` of the units unknown, and with `hard_flips` wrong units."""

    size: int = 128
    patterns: int = 100_000
    beta: float = BETA
    flips: float = 0.2
    masked: float = 0.75
    hard_flips: float = 0.35
    batches: int = 20
    cues: int = 64

    def __post_init__(self) -> None:
        if min(self.size, self.patterns, self.batches, self.cues) < 1:
            raise ValueError("size, patterns, batches and cues must be at least 1")
        if not (0 <= self.flips <= 0.5 and 0 <= self.hard_flips <= 0.5 and 0 <= self.masked < 1):
            raise ValueError("flips and hard_flips must be from 0 to 0.5, masked from 0 to below 1")


class DenseRecall(Counted):
    """Recall from a large dense store, held against all overlaps computed one by one.

    Metrics: exact_flipped, exact_masked: shares that come back whole; nearest: the share of cues that end in the pattern that
    is truly nearest, of those where it leads by two units at least, `led` of them, of all three sorts; energy_rises.
    """

    Options = DenseOptions
    columns = ("exact_flipped", "exact_masked", "led", "nearest", "energy_rises")

    def __init__(self, recipe: Recipe, options: DenseOptions, seed: int) -> None:
        self.options = options
        super().__init__(recipe, seed, options.batches)
        drawn = random_patterns(options.patterns, options.size, np.random.Generator(np.random.PCG64(seed)))
        self._memory, self._patterns = stored(drawn, "dense", options.beta)
        self._floats = self._patterns.astype(np.float32)

    def piece(self, number: int, generator: np.random.Generator) -> Sequence[float]:
        options = self.options
        sought = self._patterns[generator.integers(options.patterns, size=options.cues)]
        masked = sought * unknown(sought.shape, options.masked, generator)
        sorts = [flipped(sought, options.flips, generator), masked, flipped(sought, options.hard_flips, generator)]
        found = [self._memory.recall(cues) for cues in sorts]
        exact = [np.mean([(one.pattern == p).all() for one, p in zip(ends, sought, strict=True)]) for ends in found]
        led, right = np.sum([self._against_truth(*pair) for pair in zip(sorts, found, strict=True)], 0)
        rises = sum(int((np.diff(one.energies) > 0).sum()) for ends in found for one in ends)
        return [float(exact[0]), float(exact[1]), float(led), float(right), rises]

    def finish(self) -> Outcome:
        led = self.column("led").sum()
        metrics: dict[str, Any] = {
            name: round(float(self.column(name).mean()), 5) for name in ("exact_flipped", "exact_masked")
        }
        metrics |= {"led": int(led), "nearest": float(self.column("nearest").sum() / led) if led else None}
        metrics["energy_rises"] = int(self.column("energy_rises").sum())
        return Outcome(metrics, {}, {"distances": self._distances})

    def _against_truth(self, cues: Patterns, found: list[Recalled]) -> tuple[int, int]:
        """How many cues have a nearest pattern that leads by two units, and how many of those ended in it."""
        overlaps = cues.astype(np.float32) @ self._floats.T
        nearest = overlaps.argmax(1)
        best = overlaps.max(1)
        np.put_along_axis(overlaps, nearest[:, None], -np.inf, 1)
        led = best - overlaps.max(1) >= 4  # a unit that differs is 2 of an overlap
        ends = np.stack([one.pattern for one in found])
        return int(led.sum()), int((led & (ends == self._patterns[nearest]).all(1)).sum())

    def _distances(self) -> Figure:
        """How far from a cue the pattern that is sought lies, and how far all the others."""
        generator = self.generator(0)
        cue = flipped(self._patterns[:1], self.options.flips, generator)
        distances = (self.options.size - self._floats @ cue[0].astype(np.float32)) / 2
        drawn = figure()
        axes = drawn.subplots()
        axes.hist(
            distances[1:],
            bins=[place - 0.5 for place in range(self.options.size + 2)],
            color="0.7",
            log=True,
            label="others",
        )
        axes.axvline(distances[0], color="tab:blue", label="the pattern that is sought")
        axes.set(
            title=f"{self.options.patterns:,} patterns around a cue", xlabel="units that differ", ylabel="patterns"
        )
        axes.legend()
        return drawn
