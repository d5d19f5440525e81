"""The deck's picture of a letter and its noise, for the whole alphabet. procedures.py names it `letters`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engram_models.letters import SIDE, half_replaced, letters, letters_cell
from engram_models.patterns import Recalled
from engram_models.training.counted import Counted, flipped
from engram_models.training.experiment import Outcome
from engram_models.training.pictures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram_models.training.recipe import Recipe


@dataclass(frozen=True)
class LettersOptions:
    """How often every letter is tried, and the share of wrong units where they are spread."""

    trials: int = 100
    flips: float = 0.25

    def __post_init__(self) -> None:
        if self.trials < 1 or not 0 <= self.flips <= 0.5:
            raise ValueError("trials must be at least 1 and flips from 0 to 0.5")


class Letters(Counted):
    """The deck's picture for every letter: a half of its image replaced by noise, and wrong units spread over all of it.

    Metrics, shares of letters that come back whole: flips; lower, upper, left, right, by the half that was replaced; t_lower,
    the deck's 'T' alone. Some letters differ in one half alone (T and Y above, O and D on the left), so that the other
    halves cannot all be told from what is left.
    """

    Options = LettersOptions
    columns = ("flips", "lower", "upper", "left", "right", "t_lower")

    def __init__(self, recipe: Recipe, options: LettersOptions, seed: int) -> None:
        self.options = options
        super().__init__(recipe, seed, options.trials)
        self.cell = letters_cell()
        self._labels, self._patterns = letters()
        self._memory = self.cell.memory()

    def piece(self, number: int, generator: np.random.Generator) -> Sequence[float]:
        cues = {"flips": flipped(self._patterns, self.options.flips, generator)}
        cues |= {half: half_replaced(self._patterns, half, generator) for half in self.columns[1:5]}
        found = {name: self._whole(self._memory.recall(noisy)) for name, noisy in cues.items()}
        return [*(float(whole.mean()) for whole in found.values()), float(found["lower"][self._labels.index("T")])]

    def finish(self) -> Outcome:
        metrics = {name: round(float(self.column(name).mean()), 4) for name in self.columns}
        return Outcome(metrics, {}, {"letters": self._drawn}, self.cell)

    def _whole(self, found: list[Recalled]) -> NDArray[np.bool_]:
        return np.array([(one.pattern == pattern).all() for one, pattern in zip(found, self._patterns, strict=True)])

    def _drawn(self) -> Figure:
        """Every letter, with its lower half replaced, and what came back."""
        cues = half_replaced(self._patterns, "lower", self.generator(0))
        ends = np.stack([one.pattern for one in self._memory.recall(cues)])
        drawn = figure(13, 2)
        for column, images in enumerate(zip(self._patterns, cues, ends, strict=True)):
            for row, image in enumerate(images):
                axes = drawn.add_subplot(3, len(cues), row * len(cues) + column + 1)
                axes.imshow(-image.reshape(SIDE, SIDE), cmap="gray", interpolation="nearest")
                axes.axis("off")
        return drawn
