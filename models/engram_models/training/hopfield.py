"""How many random patterns the classical Hopfield rules carry. procedures.py names it `hopfield-capacity`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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

    Metrics: exact_at_<load>; at_rest_<load>, the share of the sought patterns that are themselves at rest, which no recall can
    exceed by much; energy_rises, over all asynchronous sweeps; converged, spurious: shares of all recalls.
    """

    Options = CapacityOptions
    columns = ("exact", "at_rest", "energy_rises", "converged", "spurious", "sweeps")

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
        at_rest = [one.converged for one in memory.recall(sought, synchronous=True, sweeps_max=1)]
        return [
            float(np.mean(exact)),
            float(np.mean(at_rest)),
            rises.sum(),
            converged.mean(),
            spurious.mean(),
            sweeps.mean(),
        ]

    def finish(self) -> Outcome:
        loads = self.options.loads
        exact, at_rest, sweeps = (self._by_load(name) for name in ("exact", "at_rest", "sweeps"))
        metrics: dict[str, Any] = {}
        for name, shares in (("exact_at", exact), ("at_rest", at_rest)):
            metrics |= {f"{name}_{load:g}": round(share, 4) for load, share in zip(loads, shares, strict=True)}
        metrics["energy_rises"] = int(self.column("energy_rises").sum())
        metrics |= {name: round(float(self.column(name).mean()), 4) for name in ("converged", "spurious")}
        metrics["recalls"] = self.total * self.options.cues
        return Outcome(
            metrics,
            {"load": list(loads), "exact": exact, "at_rest": at_rest, "sweeps": sweeps},
            {"capacity": lambda: self._capacity(exact, at_rest), "energy": self._energy},
        )

    def _by_load(self, name: str) -> list[float]:
        means: list[float] = self.column(name).reshape(len(self.options.loads), -1).mean(1).tolist()
        return means

    def _network(self, number: int, generator: np.random.Generator) -> tuple[PatternMemory, Patterns]:
        count = round(self.options.loads[number // self.options.networks] * self.options.size)
        return stored(random_patterns(count, self.options.size, generator), self.options.rule)

    def _recalled(
        self, memory: PatternMemory, patterns: Patterns, cues: int, generator: np.random.Generator
    ) -> tuple[Patterns, list[Recalled]]:
        sought = patterns[generator.integers(len(patterns), size=cues)]
        cue = flipped(sought, self.options.flips, generator)
        return sought, memory.recall(cue, seed=int(generator.integers(2**31)))

    def _capacity(self, exact: list[float], at_rest: list[float]) -> Figure:
        options = self.options
        drawn = figure()
        axes = drawn.subplots()
        axes.plot(options.loads, exact, "o-", color="tab:blue", label=f"{options.rule}, N = {options.size}")
        axes.plot(options.loads, at_rest, ":", color="0.5", label="patterns that are at rest")
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
