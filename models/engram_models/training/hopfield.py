"""How many random patterns the classical Hopfield rules carry. procedures.py names it `hopfield-capacity`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram_models.pattern_rules import RULES
from engram_models.patterns import PatternMemory, Recalled
from engram_models.training.counted import Counted, Patterns, flipped, random_patterns, stored
from engram_models.training.experiment import Outcome
from engram_models.training.pictures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram_models.training.recipe import Recipe


@dataclass(frozen=True)
class CapacityOptions:
    """Random patterns and cues with exactly round(flips * size) wrong units; `networks` of `cues` cues for each load."""

    rule: str = "hebb"
    size: int = 1000
    flips: float = 0.2
    loads: tuple[float, ...] = (0.05, 0.1, 0.138)
    networks: int = 20
    cues: int = 100
    reference_loads: tuple[float, ...] = ()  # published or earlier figures, for the picture
    reference_exact: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule {self.rule!r} is not one of {', '.join(RULES)}")
        if min(self.size, self.networks, self.cues, len(self.loads)) < 1 or not 0 <= self.flips <= 0.5:
            raise ValueError("size, networks, cues and loads must be at least 1 and flips from 0 to 0.5")
        if min(self.loads) * self.size < 1:
            raise ValueError(f"loads times size, which is {self.size}, must be at least one pattern")
        if len(self.reference_loads) != len(self.reference_exact):
            raise ValueError("reference_loads and reference_exact must be equally long")


class HopfieldCapacity(Counted):
    """The share of cues that come back without a single wrong unit, over the load alpha = P/N.

    Metrics: exact_at_<load>; energy_rises, over all asynchronous sweeps; converged, spurious: shares of all recalls.
    """

    Options = CapacityOptions
    columns = ("exact", "energy_rises", "converged", "spurious", "sweeps")

    def __init__(self, recipe: Recipe, options: CapacityOptions, seed: int) -> None:
        self.options = options
        super().__init__(recipe, seed, len(options.loads) * options.networks)

    def piece(self, number: int, generator: np.random.Generator) -> Sequence[float]:
        memory, patterns = self._network(number, generator)
        sought, recalled = self._recalled(memory, patterns, self.options.cues, generator)
        exact = [(found.pattern == pattern).all() for pattern, found in zip(sought, recalled, strict=True)]
        shares = [
            [(np.diff(found.energies) > 0).sum(), found.converged, found.spurious, found.sweeps] for found in recalled
        ]
        rises, converged, spurious, sweeps = np.array(shares, np.float64).T
        return [float(np.mean(exact)), rises.sum(), converged.mean(), spurious.mean(), sweeps.mean()]

    def finish(self) -> Outcome:
        loads, networks = self.options.loads, self.options.networks
        exact = self.column("exact").reshape(len(loads), networks).mean(1)
        metrics: dict[str, Any] = {
            f"exact_at_{load:g}": round(float(share), 4) for load, share in zip(loads, exact, strict=True)
        }
        metrics["energy_rises"] = int(self.column("energy_rises").sum())
        metrics |= {name: round(float(self.column(name).mean()), 4) for name in ("converged", "spurious")}
        metrics["recalls"] = self.total * self.options.cues
        sweeps = self.column("sweeps").reshape(len(loads), networks).mean(1)
        return Outcome(
            metrics,
            {"load": list(loads), "exact": exact.tolist(), "sweeps": sweeps.tolist()},
            {"capacity": lambda: self._capacity(exact), "energy": self._energy},
        )

    def _network(self, number: int, generator: np.random.Generator) -> tuple[PatternMemory, Patterns]:
        count = round(self.options.loads[number // self.options.networks] * self.options.size)
        return stored(random_patterns(count, self.options.size, generator), self.options.rule)

    def _recalled(
        self, memory: PatternMemory, patterns: Patterns, cues: int, generator: np.random.Generator
    ) -> tuple[Patterns, list[Recalled]]:
        sought = patterns[generator.integers(len(patterns), size=cues)]
        cue = flipped(sought, self.options.flips, generator)
        return sought, memory.recall(cue, seed=int(generator.integers(2**31)))

    def _capacity(self, exact: NDArray[np.float64]) -> Figure:
        options = self.options
        drawn = figure()
        axes = drawn.subplots()
        axes.plot(options.loads, exact, "o-", color="tab:blue", label=f"{options.rule}, N = {options.size}")
        if options.reference_loads:
            axes.plot(options.reference_loads, options.reference_exact, "x", color="tab:red", label="reference")
        axes.set(
            title=f"Patterns that come back whole from {options.flips:.0%} wrong units",
            xlabel="load P/N", ylabel="share of cues", ylim=(-0.03, 1.03),
        )  # fmt: skip
        axes.legend()
        return drawn

    def _energy(self) -> Figure:
        """The energy over sweeps of a few recalls at every load."""
        drawn = figure()
        axes = drawn.subplots()
        for place, load in enumerate(self.options.loads):
            generator = self.generator(place * self.options.networks)
            _, found = self._recalled(*self._network(place * self.options.networks, generator), 8, generator)
            for number, one in enumerate(found):
                label = f"P/N = {load:g}" if not number else None
                axes.plot(one.energies / self.options.size, ".-", color=f"C{place}", label=label, linewidth=0.7)
        axes.set(title=f"Energy under asynchronous sweeps, {self.options.rule}", xlabel="sweep", ylabel="E / N")
        axes.legend()
        return drawn
