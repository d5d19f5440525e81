"""`engram demo variants`: the deck's four ways from inputs to outputs, each on a model that ships. One mechanism serves all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

import engram
from engram_models import heldout_digits
from engram_service.demo.characters import beside, framed, pixels, spark
from engram_service.demo.figures import forecast
from engram_service.demo.outcome import Outcome, Told
from engram_service.demo.screen import Screen
from engram_service.demo.stage import FEW_SESSIONS, bits_that_differ, stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS, SUNSPOTS = "digits-reader", "sunspots"
ACCURACY_MIN = 0.9
_DIGITS = 32
_HALF_BRIGHT = 13  # of twice a pixel of 0 to 16: what counts as ink
_CYCLE = 11  # years, of the sun
_ONLINE_FROM, _WAIT_UNTIL = 1959, 1996  # nothing of the model was chosen by the years from 1959 on

Floats = NDArray[np.float32]
Pictures = Mapping[str, Callable[[], "Figure"]]


class Sunspots(NamedTuple):
    """The yearly series."""

    years: NDArray[np.int64]  # [n]
    numbers: Floats  # [n, 1], as the model takes them

    def place(self, year: int) -> int:
        return int(year - self.years[0])


@dataclass(frozen=True, kw_only=True)
class VariantsOutcome(Outcome):
    """What the four came to. Errors are root mean squares, in sunspots."""

    generated: int
    generated_bits_differ: int  # from outputs that the caller fed back
    digits: int
    digits_right: int
    horizon_years: int
    horizon_error: float
    horizon_mean_error: float  # of always saying the mean of the years before
    online_years: int
    online_error: float
    online_persistence_error: float  # of always saying the year before

    @property
    def held(self) -> bool:
        read = self.digits_right >= ACCURACY_MIN * self.digits
        better = self.horizon_error < self.horizon_mean_error and self.online_error < self.online_persistence_error
        return self.generated_bits_differ == 0 and read and better

    def rows(self) -> list[tuple[str, str]]:
        horizon = f"{self.horizon_years} years at once, error {self.horizon_error:.1f}"
        online = f"{self.online_years} years one by one, error {self.online_error:.1f}"
        fed = f"{self.generated_bits_differ} bits differ from feeding back by hand"
        return [
            ("one to many", f"one year in, {self.generated} out; {fed}"),
            ("many to one", f"8 rows in, one answer: {self.digits_right} of {self.digits} digits right"),
            ("many, then many", f"{horizon}; of their mean before {self.horizon_mean_error:.1f}"),
            ("many to many", f"{online}; of the year before {self.online_persistence_error:.1f}"),
        ]


async def tell(screen: Screen, pace_s: float, models: Path | None = None) -> Told:
    """Runs all four. Raises LocalServerError or EngramError if they cannot be told to the end."""
    begun = time.monotonic()
    series = _sunspots()
    with stage(screen, [DIGITS, SUNSPOTS], models, FEW_SESSIONS) as on:
        async with engram.AsyncClient(on.address) as client:
            generated, differ = await _one_to_many(screen, client, series)
            await asyncio.sleep(4 * pace_s)
            right = await _many_to_one(screen, client)
            await asyncio.sleep(4 * pace_s)
            horizon = await _after_waiting(screen, client, series)
            await asyncio.sleep(4 * pace_s)
            online = await _online(screen, client, series, pace_s)
    waited, first = series.place(_WAIT_UNTIL) + 1, series.place(_ONLINE_FROM)
    came, after = series.numbers[first:, 0], series.numbers[waited:, 0]
    outcome = VariantsOutcome(
        generated=len(generated), generated_bits_differ=differ, digits=_DIGITS, digits_right=right,
        horizon_years=len(horizon), horizon_error=_error(horizon, after),
        horizon_mean_error=_error(series.numbers[:waited].mean(), after),
        online_years=len(online), online_error=_error(online, came),
        online_persistence_error=_error(series.numbers[first - 1 : -1, 0], came),
        seconds=time.monotonic() - begun,
    )  # fmt: skip
    return Told(outcome, _pictures(series, generated, horizon, online))


async def _one_to_many(screen: Screen, client: engram.AsyncClient, series: Sunspots) -> tuple[Floats, int]:
    """One input, then the model's own outputs as inputs; the same again by hand. Outputs [k] and bits that differ."""
    screen.say("\none to many: one year goes in, and the model runs on, on its own output (step, generate)")
    first = series.numbers[series.place(_ONLINE_FROM - 1)]
    one, other = await client.open(SUNSPOTS, "demo-one"), await client.open(SUNSPOTS, "demo-hand")
    outputs = np.concatenate([[await one.step(first)], await one.generate(2 * _CYCLE - 1)])
    by_hand = [await other.step(first)]
    while len(by_hand) < len(outputs):
        by_hand.append(await other.step(by_hand[-1]))
    differ = bits_that_differ(outputs, np.stack(by_hand))
    top = float(series.numbers.max())
    screen.picture([f"in {spark(first, top)}  out {spark(outputs[:, 0], top)}"], f"{len(outputs)} outputs of one input")
    return outputs[:, 0], differ


async def _many_to_one(screen: Screen, client: engram.AsyncClient) -> int:
    """Digits: seven rows whose outputs nobody wants, then the last, whose output says what it was. How many are right."""
    screen.say("\nmany to one: a digit's rows go in, and one answer comes out (prefill, step)")
    digits = heldout_digits()
    images, labels, rows = digits.images[:_DIGITS], digits.labels[:_DIGITS], digits.rows[:_DIGITS]
    sessions = await client.open_many(DIGITS, [f"demo-digit-{number}" for number in range(_DIGITS)])
    await asyncio.gather(*(one.prefill(x[:-1]) for one, x in zip(sessions, rows, strict=True)))
    answers = np.array(await client.step_many(sessions, rows[:, -1])).argmax(1)
    panels = [
        (f"a {answer}", framed(pixels(2 * image.astype(int) - _HALF_BRIGHT)))
        for image, answer in zip(images[:6], answers, strict=False)
    ]
    right = int((answers == labels).sum())
    screen.picture(beside(panels), f"{right} of {_DIGITS} digits read right")
    return right


async def _after_waiting(screen: Screen, client: engram.AsyncClient, series: Sunspots) -> Floats:
    """The history to a year, then the years after it at once. Forecasts [k]: the last input's output is the first of them."""
    screen.say(
        f"\nmany to many after waiting: the years to {_WAIT_UNTIL} go in, then those after them are forecast (prefill, generate)"
    )
    waited = series.place(_WAIT_UNTIL) + 1
    session = await client.open(SUNSPOTS, "demo-history")
    await session.prefill(series.numbers[: waited - 1])
    first = await session.step(series.numbers[waited - 1])
    outputs = np.concatenate([[first], await session.generate(len(series.years) - waited - 1)])[:, 0]
    _compare(screen, series, _WAIT_UNTIL - 2 * _CYCLE, _WAIT_UNTIL + 1, outputs)
    return outputs


async def _online(screen: Screen, client: engram.AsyncClient, series: Sunspots, pace_s: float) -> Floats:
    """Year by year: each goes in when it is over, and the next one's forecast comes out. Forecasts [n] from _ONLINE_FROM on."""
    screen.say("\nmany to many online: each year goes in as it ends, and the next one's forecast comes out (stream)")
    first = series.place(_ONLINE_FROM)
    session = await client.open(SUNSPOTS, "demo-online")
    await session.prefill(series.numbers[: first - 1])
    outputs: list[float] = []
    async for y in session.stream(series.numbers[first - 1 : -1], ahead=1):
        outputs.append(float(y[0]))
        over = len(outputs) == len(series.years) - first
        _compare(screen, series, _ONLINE_FROM, _ONLINE_FROM, np.array(outputs, np.float32), passing=not over)
        await asyncio.sleep(pace_s)
    return np.array(outputs, np.float32)


def _compare(screen: Screen, series: Sunspots, since: int, first: int, outputs: Floats, passing: bool = False) -> None:
    """What came from a year on, and under it the forecasts, which begin with `first`; a column a year."""
    top, last = float(series.numbers.max()), first + len(outputs) - 1
    came = series.numbers[series.place(since) : series.place(last) + 1, 0]
    forecasts = np.concatenate([np.full(first - since, np.nan, np.float32), outputs])
    lines = [f"    came  {spark(came, top)}", f"forecast  {spark(forecasts, top)}"]
    screen.picture(lines, f"{since} to {last}; {last}: forecast {outputs[-1]:.0f}, came {came[-1]:.0f}", passing)


def _pictures(series: Sunspots, generated: Floats, horizon: Floats, online: Floats) -> Pictures:
    years, numbers, first = series.years, series.numbers[:, 0], series.place(_ONLINE_FROM)
    waited = years > _WAIT_UNTIL
    one = years[first : first + len(generated)]
    return {
        "one-to-many": lambda: forecast(
            years[first - 1 :],
            numbers[first - 1 :],
            [(f"out, after {_ONLINE_FROM - 1} alone", one, generated)],
            "one to many",
        ),
        "after-waiting": lambda: forecast(
            years[first:],
            numbers[first:],
            [(f"forecast in {_WAIT_UNTIL}", years[waited], horizon)],
            "many to many after waiting",
        ),
        "online": lambda: forecast(
            years[first:], numbers[first:], [("forecast a year before", years[first:], online)], "many to many online"
        ),
    }


def _sunspots() -> Sunspots:
    from engram_models.training.tables import Columns, located, read_csv

    table = read_csv(located(SUNSPOTS, Path(__file__).parent), Columns(("sunspots",), time="year"))
    return Sunspots(np.array(table.times[0], np.int64), table.values[0].astype(np.float32))


def _error(forecasts: Floats | np.floating, came: Floats) -> float:
    return float(np.sqrt(np.mean((forecasts - came) ** 2)))
