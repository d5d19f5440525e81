"""`engram demo recall`: the deck's picture. A 'T', half of it replaced by noise, and the 'T' that the memory makes of it.

Then the whole alphabet so, and a pattern of one's own, which outlives the server that took it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import engram
from engram_models.letters import SIDE, half_replaced, letters
from engram_service.demo.characters import beside, framed, pixels
from engram_service.demo.figures import recall as recall_figure
from engram_service.demo.outcome import Outcome, Told
from engram_service.demo.screen import Screen
from engram_service.demo.stage import FEW_SESSIONS, Stage, stage

MODEL = "letters-hopfield"
LETTER = "T"
OWN = "smile"
LETTERS_MIN = 24  # of 26: what is left of some letters is close to another; training finds 99 % of them on average
_SWEEPS_MAX = 100
_SMILE = (
    "................", ".....######.....", "...##......##...", "..#..........#..", ".#............#.", ".#..##....##..#.",
    "#...##....##...#", "#..............#", "#..............#", "#...#......#...#", "#...##....##...#", ".#...##..##...#.",
    ".#.....##.....#.", "..#..........#..", "...##......##...", ".....######.....",
)  # fmt: skip

Pattern = NDArray[np.int8]
_Sweep = tuple[float, Pattern]  # the energy after it, and the state


@dataclass(frozen=True, kw_only=True)
class RecallOutcome(Outcome):
    """What was recalled."""

    label: str
    overlap: float
    converged: bool
    energies: list[float]  # before the first sweep and after each
    letters: int
    letters_recalled: int
    kills: int
    away_s: float
    own_label: str
    own_bits_wrong: int

    @property
    def held(self) -> bool:
        letter = self.label == LETTER and self.overlap == 1 and self.converged
        own = self.own_label == OWN and self.own_bits_wrong == 0 and self.kills == 1
        return letter and self.falls and self.letters_recalled >= LETTERS_MIN and own

    @property
    def falls(self) -> bool:
        """The energy never rises, and is lower in the end."""
        return bool((np.diff(self.energies) <= 0).all()) and self.energies[-1] < self.energies[0]

    def rows(self) -> list[tuple[str, str]]:
        course = " → ".join(f"{energy:.1f}" for energy in self.energies)
        return [
            (
                "half a 'T'",
                f"recalled as {self.label!r}, overlap {self.overlap:.2f}, in {len(self.energies) - 1} sweeps",
            ),
            ("energy", f"{course}, {'never rising' if self.falls else 'NOT FALLING'}"),
            ("halves of letters", f"{self.letters_recalled} of {self.letters} recalled"),
            ("kills", f"{self.kills}; away for {self.away_s:.1f} s"),
            ("own pattern", f"recalled as {self.own_label!r}, {self.own_bits_wrong} bits wrong, by the server after"),
        ]


async def tell(screen: Screen, seed: int, pace_s: float, models: Path | None = None) -> Told:
    """Runs it. Raises LocalServerError or EngramError if it cannot be told to the end."""
    begun = time.monotonic()
    generator = np.random.Generator(np.random.PCG64(seed))
    labels, patterns = letters()
    cues = half_replaced(patterns, "lower", generator)
    at = labels.index(LETTER)
    with stage(screen, [MODEL], models, FEW_SESSIONS) as on:
        async with engram.AsyncClient(on.address) as client:
            session = await client.open(MODEL, "demo-recall")
            screen.say(f"a session of {MODEL}, which knows the letters A to Z; the lower half of a 'T' becomes noise")
            hit, sweeps = await _sweep_by_sweep(screen, session, patterns[at], cues[at], seed, pace_s)
            found = await session.recall(cues, seed=seed)
            recalled = sum(one.label == label and not one.spurious for one, label in zip(found, labels, strict=True))
            screen.say(f"all {len(labels)} letters with their lower halves replaced, in one call: {recalled} recalled")
            own = await _own(screen, session, on)
    outcome = RecallOutcome(
        label=hit.label, overlap=hit.overlap, converged=hit.converged, energies=[float(one) for one in hit.energies],
        letters=len(labels), letters_recalled=recalled, kills=on.kills, away_s=on.away_s, own_label=own.label,
        own_bits_wrong=int((own.pattern != _smile()).sum()), seconds=time.monotonic() - begun,
    )  # fmt: skip
    panels = [("stored", patterns[at]), ("half replaced", cues[at])]
    panels += [(f"sweep {number}", state) for number, (_, state) in enumerate(sweeps, 1)]
    return Told(outcome, {"recall": lambda: recall_figure(panels, outcome.energies)})


async def _sweep_by_sweep(
    screen: Screen, session: engram.Session, stored: Pattern, cue: Pattern, seed: int, pace_s: float
) -> tuple[engram.Recall, list[_Sweep]]:
    """Asks for one sweep, then for two, ...: the same seed takes the same way, until it rests."""
    known = [("stored", _drawn(stored)), ("half replaced", _drawn(cue))]
    screen.picture(beside(known), "the cue", passing=True)
    sweeps: list[_Sweep] = []
    while True:
        await asyncio.sleep(pace_s)
        hit: engram.Recall = await session.recall(cue, seed=seed, sweeps_max=len(sweeps) + 1)
        sweeps.append((float(hit.energies[-1]), hit.pattern))
        panels = [*known, (f"sweep {len(sweeps)}", _drawn(hit.pattern))]
        over = hit.converged or len(sweeps) == _SWEEPS_MAX
        rest = "; it changes no more" if hit.converged else ""
        caption = f"energy {hit.energies[0]:.1f}, after sweep {len(sweeps)} {hit.energies[-1]:.1f}{rest}"
        screen.picture(beside(panels), f"{caption}; nearest: {hit.label!r}, overlap {hit.overlap:.2f}")
        if over:
            return hit, sweeps


async def _own(screen: Screen, session: engram.Session, on: Stage) -> engram.Recall:
    """A pattern that no model ever saw is stored, and recalled from its upper half by a server that did not take it."""
    smile = _smile()
    stored = await session.store(smile, OWN)
    screen.say(f"a pattern of one's own is stored in the session, which now has {stored.count}")
    await on.kill("the pattern in Redis alone")
    unknown = np.arange(SIDE * SIDE) >= SIDE * SIDE // 2
    hit: engram.Recall = await session.recall(smile, mask=unknown)
    panels = [("stored", _drawn(smile)), ("asked, half unknown", _drawn(np.where(unknown, 0, smile)))]
    screen.picture(
        beside([*panels, ("recalled", _drawn(hit.pattern))]), f"nearest: {hit.label!r}, overlap {hit.overlap:.2f}"
    )
    return hit


def _drawn(pattern: NDArray[np.int8]) -> list[str]:
    return framed(pixels(pattern.reshape(SIDE, SIDE)))


def _smile() -> Pattern:
    return np.array([1 if pixel == "#" else -1 for row in _SMILE for pixel in row], np.int8)
