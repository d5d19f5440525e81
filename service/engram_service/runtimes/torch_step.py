"""One step of slots of an arena in torch: gather the states, run the cell, write the new states back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engram_models.cell import Cell

Step = Callable[..., tuple[Tensor, ...]]
"""(index int64 [n], inputs [n, *input shape], columns...) -> (outputs, new states...), which are in the columns then."""


def step_of(cell: Cell, states: int) -> Step:
    """The cell's step over columns: `states` state tensors, and the last outputs where there is one more."""
    cell.requires_grad_(False)

    def step(index: Tensor, value: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        state = cell.state_type(*(column.index_select(0, index) for column in columns[:states]))
        output, after = cell(value, state)
        news = (*after, output) if len(columns) > states else after
        for column, new in zip(columns, news, strict=True):
            column.index_copy_(0, index, new)
        return (output, *after)

    return step


def chosen_inputs(last: Tensor | None, index: Tensor, value: Tensor, feedback: Tensor) -> Tensor:
    """The inputs, or for rows set in `feedback` (bool [n]) the last output of their slot."""
    if last is None:
        return value
    mask = feedback.view(-1, *[1] * (value.dim() - 1))
    return torch.where(mask, last.index_select(0, index).view_as(value), value)
