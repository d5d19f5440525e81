"""Which axis of each input of a torch program is the batch: found by running it with more rows. Called by torch_steps.py."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from engram_models.importing.torch_programs import Program

_WAYS_MAX = 64  # of saying which axes are the batch
_LEAST_S, _CALLS = 5.0, 50  # how long one of them may run: so many seconds and so many calls of the module
Axes = list[int | None]


def resized(examples: Sequence[Tensor], axes: Axes, rows: int) -> list[Tensor]:
    """The same examples, their rows repeated until there are so many."""
    return [
        tensor if axis is None else tensor.index_select(axis, torch.arange(rows) % tensor.shape[axis])
        for tensor, axis in zip(examples, axes, strict=True)
    ]


def batch_axes(program: Program, told: Mapping[str, int], first: tuple[Tensor, ...]) -> Axes | None:
    """The axis of each input that is the batch. None where no way of saying it runs as it should."""
    began = time.monotonic()
    program.step(*(tensor.clone() for tensor in program.examples))
    limit_s = _LEAST_S + _CALLS * (time.monotonic() - began)
    for rows in dict.fromkeys(_sizes(program, told)):
        choices = [_choices(program, place, told, rows) for place in range(len(program.names))]
        for axes in itertools.islice(_ways(choices), _WAYS_MAX):
            if any(axis is not None for axis in axes) and _survives(
                partial(_scales, program, axes, first, rows), limit_s
            ):
                return axes
    return None


def _ways(choices: Sequence[Axes]) -> Iterator[Axes]:
    """First those in which all tensors take their first choice, their second and so on: dozens of states are mostly alike."""
    data, *states = choices
    for axis in data:
        for place in range(max(map(len, choices))):
            yield [axis, *(several[min(place, max(0, len(several) - 2))] for several in states)]
    yield from map(list, itertools.product(*choices))


def _sizes(program: Program, told: Mapping[str, int]) -> list[int]:
    """What the batch may be of: as told, else the sizes of the first input that has any, from its first axis on."""
    found = [
        program.examples[program.names.index(name)].shape[axis] for name, axis in told.items() if name in program.names
    ]
    return found or [size for example in program.examples for size in example.shape]


def _choices(program: Program, place: int, told: Mapping[str, int], rows: int) -> Axes:
    name, example = program.names[place], program.examples[place]
    if name in told:
        return [told[name]]
    axes: Axes = [axis for axis, size in enumerate(example.shape) if size == rows]
    if program.dynamic is not None and any(program.dynamic):
        axes = [axis for axis in axes if axis in program.dynamic[place]]
    return [*axes, None]


def _survives(question: Callable[[], bool], limit_s: float) -> bool:
    """Asked in a fork: with sizes that do not fit, operators of torch may write beyond their arrays, and crash or never end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if question() else 1
        finally:
            os._exit(code)
    until = time.monotonic() + limit_s
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)
    return ended[1] == 0


def _scales(program: Program, axes: Axes, first: tuple[Tensor, ...], rows: int) -> bool:
    """Whether a larger batch gives the rows that were there the results that they had, and more of them.

    A count that all rows share stays what it was.
    """
    try:
        more = program.step(*resized(program.examples, axes, rows + 2))
    except Exception:
        return False
    if len(more) != len(first) or all(small.shape == large.shape for small, large in zip(first, more, strict=True)):
        return False
    for small, large in zip(first, more, strict=True):
        if not small.is_floating_point() and torch.equal(small, large):
            continue
        axis = grown_axis(small, large)
        if axis is None or large.shape[axis] != rows + 2:
            return False
        wanted = resized([small], [axis], rows + 2)[0].double()
        if not torch.allclose(large.double(), wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
            return False
    return True


def grown_axis(small: Tensor, large: Tensor) -> int | None:
    """The one axis in which two results differ in size."""
    if small.dim() != large.dim():
        return None
    grown = [axis for axis in range(small.dim()) if small.shape[axis] != large.shape[axis]]
    return grown[0] if len(grown) == 1 else None
