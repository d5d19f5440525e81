"""A cell's step recorded as one graph, so that a whole step is one call that leaves the interpreter's lock alone.

Run from Python, each of a cell's twenty or so operations lets go of the lock and has to win it back, and with other
threads at work that waiting can take longer than the arithmetic. torch.compile would serve as well but
wants a C++ compiler where the server runs; torch's own recorder is deprecated, but does without. Where it is missing, or
does not give the very bits of the cell itself, the cell runs as it is.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor

from engram_models.cell import Cell, torch_dtype
from engram_service.runtimes.torch_step import Step

log = logging.getLogger(__name__)

_PROVING_ROWS = (32, 64, 160, 1024)  # multiples of every floor


def traced(step: Step, cell: Cell, reference: str) -> Step:
    """The step recorded, if that gives the same bits; else the step itself."""
    with torch.inference_mode():
        try:
            recorded = _record(step, _example(cell, _PROVING_ROWS[0]))
        except Exception as error:
            log.info("the step of model %s runs as it is: %s", reference, str(error).partition("\n")[0])
            return step
        if all(_same_bits(step, recorded, _example(cell, rows)) for rows in _PROVING_ROWS):
            return recorded
    log.info("the step of model %s runs as it is: recorded, its bits would differ", reference)
    return step


def _record(step: Step, example: list[Tensor]) -> Step:
    with warnings.catch_warnings():
        # That it is deprecated, and that shapes are taken for constants, which _same_bits looks at.
        warnings.simplefilter("ignore")
        recorded: Step = torch.jit.trace(step, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        # As recorded: fused operations round in other ways. The switch is the calling thread's own.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return recorded(*values)

    return run


def _example(cell: Cell, rows: int) -> list[Tensor]:
    """Random rows on columns of their own: the arena may be in use."""
    generator = torch.Generator().manual_seed(rows)
    specs = [cell.input, *cell.state_schema, *([cell.output] if cell.schema.generates else [])]
    value, *own = (_random(rows, spec.shape, torch_dtype(spec), generator) for spec in specs)
    return [torch.randperm(rows, generator=generator), cell.inputs_like(value), *own]


def _random(rows: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn((rows, *shape), generator=generator).to(dtype)
    return torch.randint(0, 2, (rows, *shape), generator=generator).to(dtype)


def _same_bits(step: Step, recorded: Step, example: list[Tensor]) -> bool:
    """Whether outputs, new states and columns are alike to the bit; a recorded step that fails is not."""
    index, value, *own = example
    others = [column.clone() for column in own]
    try:
        pairs = [*zip(step(index, value, *own), recorded(index, value, *others), strict=True)]
    except (RuntimeError, ValueError):
        return False
    return all(_bits_equal(*pair) for pair in [*pairs, *zip(own, others, strict=True)])


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals itself here, and 0 is not -0."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
