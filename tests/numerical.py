"""Gradients beside central differences, all of them in one call: torch's gradcheck calls a cell twice for every number it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEP = 1e-6
ATOL = 1e-8
_AT_ONCE = 256  # numbers that are moved in one call


def assert_gradients(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
    """Of every result of `run` by every number of every input, in float64."""
    assert all(tensor.dtype == torch.float64 for tensor in inputs)
    analytic = torch.autograd.functional.jacobian(run, tuple(inputs))
    for place, given in enumerate(inputs):

        def moved(step: Tensor, place: int = place, given: Tensor = given) -> tuple[Tensor, ...]:
            return run(*inputs[:place], given + step, *inputs[place + 1 :])

        steps = torch.eye(given.numel(), dtype=torch.float64).reshape(-1, *given.shape) * STEP
        with torch.no_grad():
            several = torch.func.vmap(moved, chunk_size=_AT_ONCE)
            differences = [(up - down) / (2 * STEP) for up, down in zip(several(steps), several(-steps), strict=True)]
        for result, (row, difference) in enumerate(zip(analytic, differences, strict=True)):
            expected = difference.reshape(given.numel(), -1).T
            got = row[place].reshape(expected.shape)
            worst = float((got - expected).abs().max())
            assert worst <= ATOL, f"result {result} by input {place}: {worst:.1e} from the differences"
