"""What a story of the demo ends with: figures, whether all that was promised held, and pictures. `engram demo` prints them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Outcome(ABC):
    """What was shown, as figures. Its fields are the summary that `--json` prints."""

    seconds: float

    @property
    @abstractmethod
    def held(self) -> bool:
        """Everything the story promises."""

    @abstractmethod
    def rows(self) -> list[tuple[str, str]]:
        """The figures for people: names and what they were."""

    def summary(self) -> str:
        lines = [*self.rows(), ("took", f"{self.seconds:.1f} s"), ("everything held", "yes" if self.held else "NO")]
        width = max(18, *(len(name) for name, _ in lines))
        return "\n".join(["", *(f"{name:>{width}}  {text}" for name, text in lines)])


@dataclass(frozen=True)
class Told:
    """A story that came to its end. `pictures` are drawn when they are asked for: matplotlib need not be there."""

    outcome: Outcome
    pictures: Mapping[str, Callable[[], Figure]]
