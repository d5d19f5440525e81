"""The ratios that `make bench-connections` is judged by, computed from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Mapping[tuple[str, str], Mapping[str, Any]]  # (row, contestant) -> figures
CLOSED = ("1", "64", "256", "1,024", "4,096")
GATEWAY, PACED, TLS, IDLE = "1,024 over 8 streams", "10,000 at 1 Hz", "1,024 TLS", "10,000 idle"
UNARY = ("1 unary", "64 unary")
FALLBACK = {"python step": "older step", "python interval": "older interval"}


@dataclass(frozen=True)
class Goal:
    """value None: one of its figures was not measured, or is of a run that was not sound."""

    what: str
    row: str
    value: float | None
    bound: float
    least: bool  # whether the bound is the least or the most that the value may be

    @property
    def met(self) -> str:
        if self.value is None:
            return "not measured, or not sound"
        good = self.value >= self.bound if self.least else self.value <= self.bound
        if good:
            return "yes"
        if not self.bound:
            return "NO"
        return f"NO, {abs(self.value / self.bound - 1):.0%} {'below' if self.least else 'above'}"

    def cells(self) -> list[str]:
        value = "-" if self.value is None else f"{self.value:.2f}"
        return [self.what, self.row, value, f"{'≥' if self.least else '≤'} {self.bound:g}", self.met]


def goals(rows: Rows) -> Iterator[Goal]:
    def ratio(row: str, one: str, other: str, figure: str = "steps_per_s", beside: str = "") -> float | None:
        both = [rows.get((place, peer), {}) for place, peer in ((row, one), (beside or row, other))]
        found = [figures.get(figure) for figures in both if figures.get("sound")]
        return found[0] / found[1] if len(found) == 2 and found[0] is not None and found[1] else None

    for client in ("", "C++ "):
        for row in CLOSED:
            value = ratio(row, f"{client}step", f"{client}prototype durable")
            yield Goal(f"{client}step / {client}prototype durable", row, value, 0.8, True)
    for row, bound in (("64", 1.25), ("1,024", 1.4)):
        yield Goal("step / mosec torch, volatile", row, ratio(row, "step", "mosec torch"), bound, True)
    for figure in ("p50_ms", "p99_ms"):
        value = ratio("1", "step", "prototype durable", figure)
        yield Goal(f"{figure.split('_')[0]} of step / of prototype durable", "1", value, 1.4, False)
    for row in CLOSED:
        yield Goal("interval / prototype volatile", row, ratio(row, "interval", "prototype volatile"), 0.8, True)
    for row in UNARY:
        value = ratio(row, "step", "step", beside=row.split()[0])
        yield Goal("unary Step / stream", row, value, 0.6, True)
    for one, other in (("step", "prototype durable"), ("interval", "prototype volatile")):
        yield Goal(f"{one} / {other}", GATEWAY, ratio(GATEWAY, one, other), 0.8, True)
    yield Goal("p99 / p99 of one connection", PACED, ratio(PACED, "step", "step", "p99_ms", "1"), 5, False)
    for row in (PACED, "4,096"):
        yield Goal("connections lost or refused", row, rows.get((row, "step"), {}).get("failures"), 0, False)
    yield Goal("TLS / plain", TLS, ratio(TLS, "step", "step", beside="1,024"), 0.8, True)
    yield Goal("KB a connection", IDLE, rows.get((IDLE, "step"), {}).get("kb_each"), 40, False)
    for one, other in FALLBACK.items():
        for row in (*CLOSED, GATEWAY):
            yield Goal(f"{one} / {other}", row, ratio(row, one, other), 1, True)
