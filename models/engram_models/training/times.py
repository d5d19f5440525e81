"""Times of rows: read as far as their order needs it. For tables.py, which has rows in the order of time.

What is read: numbers of any length, ISO 8601 with or without an offset and to any fraction of a second, times of day (a.m. and p.m.
too), and dates written day first or month first, whichever makes them rise. Other text (2020Q1) is compared as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_CLOCK = (
    r"(?P<hour>\d{1,4}):(?P<minute>\d\d)(:(?P<second>\d\d)([.,](?P<fraction>\d+))?)?( ?(?P<half>[AaPp])\.?[Mm]\.?)?"
)
_ZONE = r" ?(?P<zone>Z|z|UTC|[+-]\d\d(:?\d\d)?)"
_ISO = r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})([-/.](?P<day>\d{1,2}))?"
_OTHER = r"(?P<{}>\d{{1,2}})(?P<mark>[-/.])(?P<{}>\d{{1,2}})(?P=mark)(?P<year>\d{{4}}|\d\d)"

Read = Callable[[str], Any]
"""A text as something that can be ordered, None where it is not of that kind."""


def fault(times: Sequence[str]) -> tuple[int, str] | None:
    """The first time that does not follow the one before it, and why; None where they rise."""
    readings = [(kind, read) for kind, read in _READINGS if read(times[0]) is not None]
    faults = [_fault(times, kind, read) for kind, read in readings or [("", str)]]
    found = [one for one in faults if one is not None]
    return max(found) if len(found) == len(faults) else None


def _fault(times: Sequence[str], kind: str, read: Read) -> tuple[int, str] | None:
    before = read(times[0])
    for number in range(1, len(times)):
        now = read(times[number])
        if now is None:
            return number, f"{times[number]} is not {kind}, as {times[0]} is"
        if not before < now:
            return number, f"{times[number]} after {times[number - 1]}; {_advice(times[number], kind)}"
        before = now
    return None


def _advice(time: str, kind: str) -> str:
    if not kind:
        return (
            f"{time!r} is not a time that is understood (numbers, 2020-01-31T08:00:00Z, 8:30, 31/01/2020), and other text "
            "must rise in the order of the alphabet"
        )
    advice = "rows must be in the order of time, and a file of several sequences needs a `sequence` column"
    if kind == _LOCAL:
        return f"{advice}; where a clock was set back, times need the time zone's offset (+01:00)"
    return advice


def _number(text: str) -> Decimal | None:
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def _of(pattern: str) -> Read:
    """Reads what fits a pattern: (seconds since the year 1, less the offset; the fraction's digits)."""
    compiled = re.compile(pattern, re.ASCII)

    def read(text: str) -> tuple[int, str] | None:
        found = compiled.fullmatch(text)
        if found is None:
            return None
        part = found.groupdict()
        try:
            days = _days(part)
        except ValueError:  # there is no such day
            return None
        hour, minute, second = (int(part.get(name) or 0) for name in ("hour", "minute", "second"))
        if minute > 59 or second > 60 or ("year" in part and hour > 24):
            return None
        if part.get("half"):
            if not 1 <= hour <= 12:
                return None
            hour = hour % 12 + (12 if part["half"] in "Pp" else 0)
        seconds = ((days * 24 + hour) * 60 + minute) * 60 + second - _offset(part.get("zone") or "Z")
        return seconds, (part.get("fraction") or "").rstrip("0")

    return read


def _days(part: dict[str, str | None]) -> int:
    if not part.get("year"):
        return 0
    year = part["year"] or ""
    century = 0 if len(year) == 4 else 2000 if int(year) < 69 else 1900  # as POSIX has it
    return date(century + int(year), int(part["month"] or 1), int(part.get("day") or 1)).toordinal()


def _offset(zone: str) -> int:
    """Seconds east of UTC."""
    if zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return (int(digits[:2]) * 60 + int(digits[2:])) * (-60 if zone[0] == "-" else 60)


_LOCAL = "a date or time without an offset"
_READINGS: tuple[tuple[str, Read], ...] = (
    ("a number", _number),
    ("a time with an offset", _of(f"{_ISO}[T ]{_CLOCK}{_ZONE}")),
    (_LOCAL, _of(f"{_ISO}([T ]{_CLOCK})?")),
    ("a time of day", _of(_CLOCK)),
    ("a date, day first", _of(f"{_OTHER.format('day', 'month')}([T ]{_CLOCK})?")),
    ("a date, month first", _of(f"{_OTHER.format('month', 'day')}([T ]{_CLOCK})?")),
)
