"""Inputs recreated by a Boltzmann machine or belief network, without torch: for the service, which is asked to beside steps.

The cells themselves recreate by boltzmann.py; the equations and refusals are the same here.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = ("rbm", "dbn")

Floats = NDArray[np.floating]


class _Machine(NamedTuple):
    """One restricted Boltzmann machine: weight [hidden, visible], its hidden biases [hidden] and visible ones [visible]."""

    weight: Floats
    bias: Floats
    visible_bias: Floats

    def sums(self, v: Floats) -> Floats:
        return v @ self.weight.T + self.bias

    def up(self, v: Floats) -> Floats:
        """P(h = 1 | v). [batch, visible] -> [batch, hidden]"""
        return _sigma(self.sums(v))

    def down(self, h: Floats) -> Floats:
        """P(v = 1 | h). [batch, hidden] -> [batch, visible]"""
        return _sigma(h @ self.weight + self.visible_bias)

    def energy(self, v: Floats) -> Floats:
        """The free energy less the entropy of units that are on with probability v. [batch]"""
        softplus = np.logaddexp(self.sums(v), 0)
        entropy = (_entropy(v) + _entropy(1 - v)).sum(1)
        energy: Floats = -(v * self.visible_bias).sum(1) - softplus.sum(1) - entropy
        return energy


class Recreation:
    """A model of kind rbm or dbn as what recreates its inputs."""

    def __init__(self, kind: str, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
        """`config` is the cell's, `weights` its parameters by name. Raises ValueError where they do not fit each other."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} recreates no inputs; {' and '.join(KINDS)} do")
        sizes = [config.get("visible"), config.get("hidden")] if kind == "rbm" else config.get("sizes")
        if not isinstance(sizes, list) or len(sizes) < 2 or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"the config of kind {kind} has sizes {sizes}; two or more whole numbers are expected")
        prefixes = [""] if kind == "rbm" else [f"rbms.{number}." for number in range(len(sizes) - 1)]
        self._stack = [_machine(weights, prefix, *pair) for prefix, pair in zip(prefixes, pairwise(sizes), strict=True)]
        self.visible: int = sizes[0]

    def recreate(self, x: Floats, known: NDArray[np.bool_] | None = None, sweeps: int = 1) -> tuple[Floats, Floats]:
        """x recreated by sweeps of mean-field updates, up through all machines and down again, and the energies.

        x [batch, visible], 0..1; known [batch, visible]: units that keep their values, while the others start from
        P(v | h = 0), whatever x has there. None: all start as they are in x, and all are recreated.
        -> probabilities [batch, visible]; the lowest machine's mean-field energies, before the first sweep and after each,
        [batch, sweeps + 1]. Raises ValueError where a known unit is not within 0..1, and for other shapes.
        """
        if sweeps < 1:
            raise ValueError(f"sweeps {sweeps} must be at least 1")
        if x.ndim != 2 or x.shape[1] != self.visible:
            raise ValueError(f"inputs are {list(x.shape)}, expected [batch, {self.visible}]")
        if known is not None and known.shape != x.shape:
            raise ValueError(f"the mask is {list(known.shape)}, the inputs are {list(x.shape)}; they must be alike")
        lowest = self._stack[0]
        v = x.astype(lowest.weight.dtype)
        if known is not None:
            v = np.where(known, v, _sigma(lowest.visible_bias))
        if not ((v >= 0) & (v <= 1)).all():
            raise ValueError("a known unit is not within 0..1; a unit's value is the probability that it is 1")
        given, energies = v, [lowest.energy(v)]
        for _ in range(sweeps):
            v = self._swept(v) if known is None else np.where(known, given, self._swept(v))
            energies.append(lowest.energy(v))
        return v, np.stack(energies, 1)

    def _swept(self, v: Floats) -> Floats:
        for machine in self._stack:
            v = machine.up(v)
        for machine in reversed(self._stack):
            v = machine.down(v)
        return v


def _machine(weights: Mapping[str, NDArray[Any]], prefix: str, visible: int, hidden: int) -> _Machine:
    shapes = {"weight": (hidden, visible), "bias": (hidden,), "visible_bias": (visible,)}
    for name, shape in shapes.items():
        found = weights.get(prefix + name)
        if found is None or found.shape != shape or found.dtype not in (np.float32, np.float64):
            what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise ValueError(f"{prefix}{name} {what}; the config says float32 {list(shape)}")
    return _Machine(*(weights[prefix + name] for name in shapes))


def _sigma(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the right 0
        value: Floats = 1 / (1 + np.exp(-sums))
    return value


def _entropy(v: Floats) -> Floats:
    """-v log v, which is 0 at 0."""
    value: Floats = -v * np.log(np.where(v > 0, v, 1))
    return value
