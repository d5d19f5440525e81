"""`engram demo ntm`: a Neural Turing Machine writes a sequence down, its server is killed, and it reads the sequence back.

What it wrote is session state like any other: in Redis before the step was answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram
from engram_service.demo.characters import beside, framed, pixels, shades
from engram_service.demo.figures import tape
from engram_service.demo.outcome import Outcome, Told
from engram_service.demo.screen import Screen
from engram_service.demo.stage import FEW_SESSIONS, bits_that_differ, stage

MODEL = "copy-ntm"
VECTORS_MAX = 20  # what it was trained on; it also copies longer ones
BITS_WRONG_MAX = 1
_WRITE, _READ = "write_weighting0", "read_weighting0"
_ROWS = 24  # of the memory, on the screen

Floats = NDArray[np.float32]
State = dict[str, NDArray[Any]]
Show = Callable[[list[State], list[Floats]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class NtmOutcome(Outcome):
    """What was written, kept and read back."""

    vectors: int
    bits: int
    bits_wrong: int
    kills: int
    away_s: float
    state_bytes: int
    state_bits_differ: int  # after the kill, from before it
    bits_differ: int  # of all outputs and the last state, from a run that nobody disturbed

    @property
    def held(self) -> bool:
        same = self.state_bits_differ == 0 and self.bits_differ == 0
        return same and self.kills == 1 and self.bits_wrong <= BITS_WRONG_MAX

    def rows(self) -> list[tuple[str, str]]:
        kept = f"{self.state_bits_differ} bits of its {self.state_bytes:,} bytes of state differ after the kill"
        return [
            ("written", f"{self.vectors} vectors of {self.bits} bits"),
            ("kept", f"{self.kills} kill; away for {self.away_s:.1f} s; {kept}"),
            ("read back", f"{self.bits_wrong} of {self.vectors * self.bits} bits wrong"),
            ("bits that differ", f"{self.bits_differ}, against a run that nobody disturbed"),
        ]


async def tell(screen: Screen, vectors: int, seed: int, pace_s: float, models: Path | None = None) -> Told:
    """Runs it with a random sequence. Raises LocalServerError or EngramError if it cannot be told to the end."""
    begun = time.monotonic()
    with stage(screen, [MODEL], models, FEW_SESSIONS) as on:
        async with engram.AsyncClient(on.address) as client:
            session = await client.open(MODEL, "demo-ntm")
            inputs = sequence(session.model.inputs[0].shape[0], vectors, np.random.Generator(np.random.PCG64(seed)))
            shown = inputs[:vectors, :-1]
            screen.say(
                f"a session of {MODEL} is shown {vectors} random vectors of {shown.shape[1]} bits, and told the end"
            )

            async def show(states: list[State], outputs: list[Floats]) -> None:
                _picture(screen, inputs, states, outputs)
                await asyncio.sleep(pace_s)

            states, outputs = await _steps(session, inputs[: vectors + 1], show)
            await on.kill("the memory in Redis alone")
            kept = await session.state()
            screen.say("silence now, in which it reads back what it wrote")
            more = await _steps(session, inputs[vectors + 1 :], show, states, outputs)
            calm = await client.open(MODEL, "demo-ntm-calm")
            undisturbed = await calm.run(inputs)
            at_the_end = await calm.state()
    written, (states, outputs) = states[vectors], more
    answers = np.stack(outputs)
    outcome = NtmOutcome(
        vectors=vectors, bits=shown.shape[1], kills=on.kills, away_s=on.away_s,
        bits_wrong=int(((answers[vectors + 1 :] > 0.5) != (shown > 0.5)).sum()),
        state_bytes=sum(tensor.nbytes for tensor in written.values()),
        state_bits_differ=_state_bits(written, kept),
        bits_differ=bits_that_differ(answers, undisturbed) + _state_bits(states[-1], at_the_end),
        seconds=time.monotonic() - begun,
    )  # fmt: skip
    return Told(outcome, {"ntm": lambda: tape(_panels(inputs, states, outputs), f"copying {vectors} vectors")})


def sequence(width: int, vectors: int, generator: np.random.Generator) -> Floats:
    """Inputs [2 * vectors + 1, width]: random bits, the delimiter in the last channel, then silence. Graves et al. 2014, 4.1."""
    inputs = np.zeros((2 * vectors + 1, width), np.float32)
    inputs[:vectors, :-1] = generator.integers(0, 2, (vectors, width - 1))
    inputs[vectors, -1] = 1
    return inputs


async def _steps(
    session: engram.Session,
    inputs: Floats,
    show: Show,
    states: list[State] | None = None,
    outputs: list[Floats] | None = None,
) -> tuple[list[State], list[Floats]]:
    """One input after the other, looking at the state in between; what was there before, with all that came."""
    states, outputs = list(states or ()), list(outputs or ())
    for x in inputs:
        outputs.append(await session.step(x))
        states.append(await session.state())
        await show(states, outputs)
    return states, outputs


def _picture(screen: Screen, inputs: Floats, states: list[State], outputs: list[Floats]) -> None:
    """Shown and read back in one picture, as they do not overlap in time; the heads beside the memory under it."""
    shown = (len(inputs) - 1) // 2
    done, reading = len(states), len(states) > shown + 1
    bits = np.full((inputs.shape[1] - 1, len(inputs)), -1)
    bits[:, : min(done, shown)] = np.where(inputs[: min(done, shown), :-1].T > 0.5, 1, -1)
    for step in range(shown + 1, done):
        bits[:, step] = np.where(outputs[step] > 0.5, 1, -1)
    heads = np.full((_ROWS, len(inputs)), -1)
    for step, state in enumerate(states):
        weighting = state[_READ if step > shown else _WRITE][:_ROWS]
        heads[: len(weighting), step] = np.where(weighting > 0.5, 1, -1)
    memory = np.abs(states[-1]["memory"][:_ROWS])
    lines = beside([("bits shown, then read back", framed(pixels(bits)))])
    lines += beside(
        [
            ("write head, then read head", framed(pixels(heads))),
            ("memory, every other row", framed(shades(memory[::2]))),
        ]
    )
    caption = f"step {done} of {len(inputs)}: {'reading' if reading else 'writing'}"
    screen.picture(lines, caption, passing=done not in (shown + 1, len(inputs)))


def _panels(inputs: Floats, states: list[State], outputs: list[Floats]) -> list[tuple[str, NDArray[Any]]]:
    heads = [("write head", _WRITE), ("read head", _READ)]
    top = min(len(states[0][_WRITE]), len(inputs) // 2 + 4)
    panels: list[tuple[str, NDArray[Any]]] = [("inputs", inputs.T), ("outputs", np.stack(outputs).T)]
    panels += [(name, np.stack([state[tensor][:top] for state in states]).T) for name, tensor in heads]
    return [*panels, ("memory at the end", states[-1]["memory"][:top].T)]


def _state_bits(one: State, other: State) -> int:
    return sum(bits_that_differ(one[name], other[name]) for name in one)
