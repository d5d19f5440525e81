"""How rows are put together for a graph that is to give each of them the same bits, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batching:
    """How many rows are given to a graph at once: a multiple of `floor`, or where there is none, `tile` each time."""

    floor: int | None = 1
    tile: int = 1

    def cut(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, padded rows) of each call that together cover `rows`."""
        if self.floor is not None:
            yield 0, rows, -(-rows // self.floor) * self.floor
            return
        for start in range(0, rows, self.tile):
            yield start, min(start + self.tile, rows), self.tile

    @property
    def text(self) -> str:
        if self.floor == 1:
            return "any number of rows at once: a row has the same bits in each"
        if self.floor is not None:
            return (
                f"any number of rows at once, filled up to a multiple of {self.floor}: a row has the same bits in each"
            )
        return (
            "one by one"
            if self.tile == 1
            else f"always {self.tile} rows at once, filled up: a row has the same bits in each"
        )


ALONE = Batching(None, 1)
