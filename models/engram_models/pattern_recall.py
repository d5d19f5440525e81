"""Recall: from a cue to a state at rest. Pure functions over arrays; patterns.py calls them.

Classical networks have E(s) = -1/2 s'Ws and the field h = Ws; a unit takes the sign of its field, and keeps its own where that
is 0. An unknown unit is 0 until its turn comes; where its field is 0, too, it becomes +1. Neither lets E rise. Source: Hopfield
1982. The dense network has E(s) = -1/beta log sum_mu exp(beta p_mu's) and s <- sign(sum_mu p_mu softmax_mu(beta p_mu's)).
Source: Ramsauer et al. 2020, (3), on the corners of the cube; E falls there since log-sum-exp is convex and that sign
maximises its tangent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_models.pattern_bits import unpack
from engram_models.pattern_search import PatternSearch

_NEAREST = 16  # patterns that are looked at before all are summed
_NOTHING = 1e-12  # of the nearest pattern's weight: less than this changes no energy that anyone reads
_LEAST = 1e-20

State = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Rest:
    """Where a recall ended. `energies` has one more than there were sweeps."""

    state: State
    energies: list[float]
    converged: bool  # the last sweep changed nothing


def settle_in_turn(
    weights: NDArray[np.floating], cue: State, generator: np.random.Generator, sweeps_max: int, scale: float
) -> Rest:
    """Asynchronous recall: one unit after another, in a new random order every sweep."""
    state = cue.astype(weights.dtype)
    fields = weights @ state
    energies = [_energy(state, fields, scale)]
    for _ in range(sweeps_max):
        changed = _sweep(weights, state, fields, generator.permutation(len(state)))
        energies.append(_energy(state, fields, scale))
        if not changed:
            return Rest(_signs(state), energies, True)
    return Rest(_signs(state), energies, False)


def _sweep(
    weights: NDArray[np.floating], state: NDArray[np.floating], fields: NDArray[np.floating], order: NDArray[np.int64]
) -> bool:
    """One turn of every unit, in place: from one unit that changes to the next, as if each had been asked."""
    turned, felt = state[order], fields[order]
    row, signed = np.empty_like(felt), np.empty_like(felt)
    unknown = turned == 0
    some_unknown = bool(unknown.any())
    place, changes = 0, 0
    while place < len(order):
        unstable = np.multiply(turned[place:], felt[place:], out=signed[place:]) < 0
        if some_unknown:
            unstable |= unknown[place:]  # those before `place` are no longer asked
        step = int(unstable.argmax())
        if not unstable[step]:
            break
        place += step
        new = 1 if felt[place] >= 0 else -1
        # Without "clip", take would write to a buffer first.
        np.take(weights[order[place]], order, out=row, mode="clip")
        np.multiply(row, new - turned[place], out=row)
        np.add(felt, row, out=felt)
        turned[place] = new
        changes += 1
        place += 1
    state[order], fields[order] = turned, felt
    return changes > 0


def settle_at_once(weights: NDArray[np.floating], cue: State, sweeps_max: int, scale: float) -> Rest:
    """Synchronous recall: all units from the same fields. It may come to swing between two states for ever."""
    state = cue.astype(weights.dtype)
    before = None
    fields = weights @ state
    energies = [_energy(state, fields, scale)]
    for _ in range(sweeps_max):
        new = np.where(fields == 0, np.where(state == 0, 1, state), np.sign(fields)).astype(weights.dtype)
        fields = weights @ new
        energies.append(_energy(new, fields, scale))
        if (new == state).all():
            return Rest(_signs(new), energies, True)
        if before is not None and (new == before).all():
            return Rest(_signs(new), energies, False)
        before, state = state, new
    return Rest(_signs(state), energies, False)


def _energy(state: NDArray[np.floating], fields: NDArray[np.floating], scale: float) -> float:
    return float(state.astype(np.float64) @ fields.astype(np.float64)) / (-2 * scale)


def _signs(state: NDArray[np.floating]) -> State:
    return state.astype(np.int8)


def settle_densely(
    patterns: PatternSearch, cues: State, beta: float, sweeps_max: int
) -> tuple[list[Rest], NDArray[np.int64], NDArray[np.int64]]:
    """Dense recall of cues [n, N]: all units of a cue at once, all cues side by side.

    With the nearest patterns' distances [n] and places [n], which the last sweep found.
    """
    states = cues.copy()
    energies: list[list[float]] = [[] for _ in cues]
    converged = np.zeros(len(cues), np.bool_)
    distances, places = np.zeros((2, len(cues)), np.int64)
    active = np.arange(len(cues))
    for sweep in range(sweeps_max + 1):
        found = dense_fields(patterns, states[active], beta)
        distances[active], places[active] = found.distances, found.places
        for row, energy in zip(active, found.energies, strict=True):
            energies[row].append(energy)
        if sweep == sweeps_max:
            break
        old, fields = states[active], found.fields
        states[active] = np.where(fields > 0, 1, np.where(fields < 0, -1, np.where(old == 0, 1, old)))
        still = active[(states[active] == old).all(1)]
        converged[still] = True
        for row in still:
            energies[row].append(energies[row][-1])
        active = active[~converged[active]]
        if not len(active):
            break
    return [Rest(*row) for row in zip(states, energies, converged.tolist(), strict=True)], distances, places


class DenseFields(NamedTuple):
    """What states [n, N] feel of a dense memory."""

    fields: NDArray[np.float64]  # [n, N]: sum_mu p_mu softmax_mu(beta p_mu's), each row times a positive number
    energies: list[float]  # [n]
    distances: NDArray[np.int64]  # [n], of the nearest pattern
    places: NDArray[np.int64]  # [n], which one it is


def dense_fields(patterns: PatternSearch, states: State, beta: float) -> DenseFields:
    """The sign of each field is that of the sum over all patterns.

    The nearest few nearly always prove it: what all the others weigh together is bounded by their number and the distance of
    the last of the few. Where they do not, all are summed.
    """
    distances, places = patterns.nearest(states, _NEAREST)
    weights = np.exp(-2 * beta * (distances - distances[:, :1]))
    others = (len(patterns) - distances.shape[1]) * weights[:, -1]
    known = (states != 0).sum(1)
    fields, energies = np.empty(states.shape), []
    for row, near in enumerate(places):
        fields[row] = weights[row] @ unpack(patterns.bits[near], states.shape[1])
        total = float(weights[row].sum())
        if others[row] > _NOTHING or np.abs(fields[row]).min() <= others[row] + _NOTHING:
            fields[row], total = _whole_sum(patterns, states[row], beta, int(distances[row, 0]))
        energies.append(-float(known[row] - 2 * distances[row, 0]) - log(total) / beta)
    return DenseFields(fields, energies, distances[:, 0], places[:, 0])


def _whole_sum(patterns: PatternSearch, state: State, beta: float, nearest: int) -> tuple[NDArray[np.float64], float]:
    """Over all patterns that weigh anything in float64. Units are counted by distance in whole numbers, so that what cancels
    out is 0 and the order of the patterns is nothing."""
    reach = min(ceil(log(max(len(patterns), 2) / _LEAST) / (2 * beta)), len(state))
    counts = np.zeros((reach + 1, len(state)), np.int64)
    numbers = np.zeros(reach + 1, np.int64)
    for distances, rows in patterns.within(state, nearest + reach):
        for distance in np.unique(distances):
            chosen = rows[distances == distance]
            counts[distance - nearest] += chosen.sum(0, dtype=np.int64)
            numbers[distance - nearest] += len(chosen)
    weights = np.array([exp(-2 * beta * step) for step in range(reach + 1)])
    return weights @ counts, float(weights @ numbers)
