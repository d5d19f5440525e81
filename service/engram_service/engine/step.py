"""One step of slots of an arena in torch: gather the states, run the cell, write the new states back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engram_service.engine.arena import Arena

Step = Callable[..., tuple[Tensor, ...]]
"""(index int64 [n], inputs [n, *input shape], columns...) -> (outputs, new states...), which are in the columns then."""


def columns(arena: Arena) -> list[Tensor]:
    """What a step reads and writes: the state's tensors, and the last outputs where the model can feed on them."""
    return [*arena.state, *([] if arena.last is None else [arena.last])]


def step_of(arena: Arena) -> Step:
    """The step of the arena's cell; it touches no other columns than those that it is given."""
    cell, states = arena.bundle.cell.requires_grad_(False), len(arena.state)

    def step(index: Tensor, value: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        state = cell.state_type(*(column.index_select(0, index) for column in columns[:states]))
        output, after = cell(value, state)
        news = (*after, output) if len(columns) > states else after
        for column, new in zip(columns, news, strict=True):
            column.index_copy_(0, index, new)
        return (output, *after)

    return step


def chosen_inputs(arena: Arena, index: Tensor, value: Tensor, feedback: Tensor) -> Tensor:
    """The inputs, or for rows set in `feedback` (bool [n]) the last output of their slot."""
    if arena.last is None:
        return value
    mask = feedback.view(-1, *[1] * (value.dim() - 1))
    return torch.where(mask, arena.last.index_select(0, index).view_as(value), value)
