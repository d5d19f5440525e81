"""Copy and repeat copy: a sequence of random bits is shown, and has to be given back once it is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_models.cell import Cell
from engram_models.ntm import NTM
from engram_models.training.bptt import Batch
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Copy:
    """Graves et al. 2014, section 4.1: `bits` random bits a step for 1 to `length` steps, a delimiter, then silence.

    Inputs: the bits and the delimiter's channel; outputs: the bits, asked for after the delimiter. All sequences of a batch are
    equally long. Thorough tests also copy sequences of `long` steps, far beyond those trained on.
    """

    bits: int = 8
    length: int = 20
    long: int = 120
    test_rows: int = 1000

    def __post_init__(self) -> None:
        if min(self.bits, self.length, self.long) < 1:
            raise ValueError("bits, length and long must be at least 1")

    @property
    def input_size(self) -> int:
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        source = generator(seed, number)
        return self.draw(rows, int(torch.randint(1, self.length + 1, (), generator=source)), source)

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        """Bit errors in a sequence, over all trained lengths alike; the share of long copies without any."""
        each = max(1, (self.test_rows if thorough else self.test_rows // 5) // self.length)
        errors = [self.errors(cell, each, length, seed) for length in range(1, self.length + 1)]
        found = {"bit_errors": torch.cat(errors).double().mean().item()}
        if thorough:
            rows = max(1, self.test_rows // 10)
            for length in sorted({self.length, 2 * self.length, self.long}):
                wrong = self.errors(cell, rows, length, seed)
                found[f"exact_at_{length}"] = (wrong == 0).double().mean().item()
                found[f"bit_errors_at_{length}"] = wrong.double().mean().item()
            found["long_exact"] = found[f"exact_at_{self.long}"]
        return found

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        shown = self.draw(1, self.length, generator(seed, 0, purpose=2))
        return memory_pictures(cell, shown, f"copying {self.length} vectors of {self.bits} bits")

    def errors(self, cell: Cell, rows: int, length: int, seed: int) -> Tensor:
        """Wrong bits in each of `rows` fresh sequences, int64 [rows]."""
        test = self.draw(rows, length, generator(seed, length, purpose=1))
        return wrong_bits(cell, test)

    def draw(self, rows: int, length: int, source: torch.Generator) -> Batch:
        shown = torch.randint(0, 2, (rows, length, self.bits), generator=source).float()
        inputs = torch.zeros(rows, 2 * length + 1, self.bits + 1)
        inputs[:, :length, : self.bits], inputs[:, length, self.bits] = shown, 1
        targets, weights = torch.zeros(rows, 2 * length + 1, self.bits), torch.zeros(rows, 2 * length + 1)
        targets[:, length + 1 :], weights[:, length + 1 :] = shown, 1
        return Batch(inputs, targets, weights)


@dataclass(frozen=True)
class RepeatCopy:
    """Graves et al. 2014, section 4.2: a copy is asked for several times, and an end marker after the last.

    After the sequence one input holds the number of repeats, scaled to mean 0 and variance 1 over 1 to `repeats`. Outputs:
    the bits, and the end marker's channel. Thorough tests go beyond the length and beyond the repeats that were trained.
    Over the first `grow` batches the greatest number of repeats rises from 1 to `repeats`: how to begin again can be learnt
    only where one copy ends right.
    """

    bits: int = 8
    length: int = 10
    repeats: int = 10
    long: int = 20
    more: int = 20
    grow: int = 0
    test_rows: int = 300

    def __post_init__(self) -> None:
        if min(self.bits, self.length) < 1 or self.repeats < 2 or self.grow < 0:
            raise ValueError("bits and length must be at least 1, repeats at least 2, grow at least 0")

    @property
    def input_size(self) -> int:
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits + 1

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        grown = 1 + number * self.repeats // self.grow if self.grow else self.repeats
        return self._any(rows, min(self.repeats, grown), generator(seed, number))

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        tested = range(1, (50 if thorough else 10) + 1)
        errors = [wrong_bits(cell, self._any(8, self.repeats, generator(seed, -number))) for number in tested]
        found = {"bit_errors": torch.cat(errors).double().mean().item()}
        if thorough:
            within, long, more = (
                self._exact(cell, length, repeats, seed)
                for length, repeats in (
                    (self.length, self.repeats),
                    (self.long, self.repeats),
                    (self.length, self.more),
                )
            )
            found |= {"exact": within[0], "exact_longer": long[0], "exact_more_repeats": more[0]}
            found |= {
                "bits_right_longer": long[1],
                "bits_right_more_repeats": more[1],
                "ends_right_more_repeats": more[2],
            }
        return found

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        shown = self.draw(1, self.length, 4, generator(seed, 0, purpose=2))
        return memory_pictures(cell, shown, f"{self.length} vectors of {self.bits} bits, four times")

    def _any(self, rows: int, repeats: int, source: torch.Generator) -> Batch:
        """Sequences of some length and number of repeats, up to those given."""
        length = int(torch.randint(1, self.length + 1, (), generator=source))
        return self.draw(rows, length, int(torch.randint(1, repeats + 1, (), generator=source)), source)

    def draw(self, rows: int, length: int, repeats: int, source: torch.Generator) -> Batch:
        shown = torch.randint(0, 2, (rows, length, self.bits), generator=source).float()
        time, spread = length + 1 + repeats * length + 1, ((self.repeats**2 - 1) / 12) ** 0.5
        inputs = torch.zeros(rows, time, self.bits + 1)
        inputs[:, :length, : self.bits] = shown
        inputs[:, length, self.bits] = (repeats - (self.repeats + 1) / 2) / spread
        targets, weights = torch.zeros(rows, time, self.bits + 1), torch.zeros(rows, time)
        targets[:, length + 1 : -1, : self.bits] = shown.repeat(1, repeats, 1)
        targets[:, -1, self.bits] = 1
        weights[:, length + 1 :] = 1
        return Batch(inputs, targets, weights)

    def _exact(self, cell: Cell, length: int, repeats: int, seed: int) -> tuple[float, float, float]:
        """Shares of sequences without an error, of bits that are right, and of end markers that are all right."""
        test = self.draw(self.test_rows // 3, length, repeats, generator(seed, length * 1000 + repeats, purpose=1))
        right = answers(cell, test) == test.targets.bool()
        asked = right[:, length + 1 :]
        ends = asked[..., self.bits].all(1)
        return tuple(one.double().mean().item() for one in (asked.flatten(1).all(1), asked[..., : self.bits], ends))  # type: ignore[return-value]


def answers(cell: Cell, batch: Batch) -> Tensor:
    """The cell's outputs as bits, bool like the targets."""
    with torch.inference_mode():
        return cell.sequence(batch.inputs)[0] > 0.5


def wrong_bits(cell: Cell, batch: Batch) -> Tensor:
    """How many bits of the steps that count are wrong in each sequence, int64 [rows]."""
    wrong = (answers(cell, batch) != batch.targets.bool()) & (batch.weights > 0).unsqueeze(2)
    return wrong.flatten(1).sum(1)


def memory_pictures(cell: Cell, shown: Batch, title: str) -> Mapping[str, Callable[[], Figure]]:
    """What a Turing machine does with one sequence; nothing for other cells."""
    from engram_models.training.pictures import memory

    return {"memory": lambda: memory(cell, shown, title)} if isinstance(cell, NTM) else {}
