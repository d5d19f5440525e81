"""Which dimensions may be the batch and what sizes the others have, by flags and by what the file says. Pure; for axes.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import Any

import onnx

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.flags import Flags
from engram_models.importing.interface import dim_words, unnamed
from engram_models.importing.names import is_batch_dim, is_time_dim, stem
from engram_models.importing.proposal import Line, Proposal

PLANS_MAX = 32
Axes = dict[str, int | None]
Plan = dict[str, list[int]]


class Missing(Exception):
    """A dimension that has no size yet."""

    def __init__(self, line: Line, dims: list[int]) -> None:
        super().__init__()
        self.line, self.dims = line, dims


def batch_symbol(lines: Sequence[Line], flags: Flags) -> str:
    """The name of the batch dimension: one that is named so, or the only one that all tensors of more than one number share."""
    large = [line for line in lines if line.dims]
    flagged = {
        line.dims[axis]
        for line in large
        if line.dims and (axis := flags.axes.get(line.tensor)) is not None and axis < len(line.dims)
    }
    names = {dim for line in large for dim in line.dims or () if isinstance(dim, str) and not unnamed(dim)} - set(
        flags.sizes
    )
    by_flag = sorted(dim for dim in flagged if isinstance(dim, str) and dim in names)
    if by_flag:
        return by_flag[0]
    counts = {
        name: (
            sum(name in (line.dims or ()) for line in large if line.is_state),
            sum(name in (line.dims or ()) for line in large),
        )
        for name in names
    }
    named = sorted((name for name in names if is_batch_dim(name)), key=lambda name: (counts[name], name))
    if named:
        return named[-1]
    main = [line for line in large if line.role in ("input", "recurrent")]
    shared = [name for name in names if not is_time_dim(name) and all(name in (line.dims or ()) for line in main)]
    return shared[0] if len(shared) == 1 else ""


def batch_choices(line: Line, batch: str, flags: Flags) -> list[int | None]:
    """What may be the batch axis of a tensor, the likeliest first; [None] where nothing may."""
    dims = line.dims or ()
    if line.tensor in flags.axes:
        axis = flags.axes[line.tensor]
        if axis is not None and axis >= len(dims):
            raise ImportRefusedError(
                f"--batch-axis {line.tensor}={axis}: it has {len(dims)} dimensions, and the first one is 0"
            )
        if axis is not None and isinstance(dims[axis], int) and dims[axis] != 1:
            raise ImportRefusedError(
                f"--batch-axis {line.tensor}={axis}: that dimension is {dims[axis]} in the file, and not 1 or dynamic"
            )
        return [axis]
    if batch and batch in dims:
        return [dims.index(batch)]
    told = flags.shapes.get(line.tensor, ())
    whole = len(told) == len(dims)
    dynamic = [
        n for n, dim in enumerate(dims) if isinstance(dim, str) and dim not in flags.sizes and not is_time_dim(dim)
    ]
    ones = [n for n, dim in enumerate(dims) if dim == 1]
    if line.is_state and len(dims) == 3 and ones[:2] == [0, 1]:
        ones[:2] = [1, 0]  # layers, batch, width
    found: list[int | None] = [n for n in [*dynamic, *ones] if not whole or told[n] == 1]
    if line.role in ("constant", "counter") and all(dim == 1 for dim in dims):
        return [None, *found] if batch else [*found, None]
    return found or [None]


def plans_of(
    lines: Sequence[Line], choices: Mapping[str, list[int | None]], flags: Flags, sizes: Mapping[str, int]
) -> tuple[list[tuple[Axes, Plan]], Missing | None]:
    """Axes for all tensors, with the dimensions that they give: tensors of one kind in several layers have the same axis."""
    kinds: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        ones = tuple(n for n, dim in enumerate(line.dims or ()) if dim == 1)
        key = (
            line.is_state,
            stem(line.tensor) if line.is_state else line.tensor,
            len(line.dims or ()),
            ones,
            tuple(choices[line.tensor]),
        )
        kinds.setdefault(key, []).append(line)
    groups = list(kinds.values())
    options = [choices[group[0].tensor] for group in groups]
    ordered = sorted(islice(product(*(range(len(one)) for one in options)), 4096), key=sum)[:PLANS_MAX]
    plans, missing, misfit = [], None, None
    for picks in ordered:
        axes = {
            line.tensor: option[pick]
            for group, option, pick in zip(groups, options, picks, strict=True)
            for line in group
        }
        try:
            plans.append((axes, {line.tensor: full_dims(line, axes[line.tensor], flags, sizes) for line in lines}))
        except Missing as error:
            missing = missing or error
        except ImportRefusedError as error:  # what --shape says does not go with the batch there
            misfit = misfit or error
    if misfit and not plans and not missing:
        raise misfit
    return plans, missing


def full_dims(line: Line, axis: int | None, flags: Flags, sizes: Mapping[str, int]) -> list[int]:
    """The graph's dimensions of a tensor, -1 for the batch. Raises Missing, and ImportRefusedError for a --shape that cannot be."""
    dims = line.dims or ()
    told: list[int | None] = [None] * len(dims)
    if line.tensor in flags.shapes:
        shape = list(flags.shapes[line.tensor])
        if line.context and not line.is_state and shape:
            shape[-1] += line.context
        if axis is not None and len(shape) == len(dims) - 1:
            shape.insert(axis, 1)
        if len(shape) != len(dims):
            raise ImportRefusedError(
                f"--shape {line.tensor}={'x'.join(map(str, flags.shapes[line.tensor]))}: it has {len(dims)} dimensions"
                + (" with the batch" if axis is not None else "")
            )
        told = list(shape)
    full, open_dims = [], []
    for place, dim in enumerate(dims):
        size = dim if isinstance(dim, int) else sizes.get(dim)
        if line.role == "window" and place == len(dims) - 1:
            if isinstance(dim, int) and dim != line.context:
                raise ImportRefusedError(
                    f"--context {line.tensor}={line.output}:{line.context}: its last dimension is {dim}"
                )
            size = line.context
        if place == axis:
            full.append(-1)
            continue
        if told[place] is not None:
            if isinstance(dim, int) and dim != told[place]:
                raise ImportRefusedError(
                    f"--shape: dimension {place} of {shown(line.tensor)} is {dim} in the file, and not {told[place]}"
                )
            size = told[place]
        if size is None:
            open_dims.append(place)
        full.append(size or 0)
    if open_dims:
        raise Missing(line, open_dims)
    return full


def known_sizes(proposal: Proposal, flags: Flags, batch: str, model: onnx.ModelProto) -> dict[str, int]:
    """Of dynamic dimensions that are known: by --shape, or because a state goes out with a size."""
    sizes = dict(flags.sizes)
    outputs = {value.name: value for value in model.graph.output}
    for line in proposal.lines:
        if not line.is_state or line.output not in outputs or line.role == "window" or line.dims is None:
            continue
        taken = outputs[line.output].type.tensor_type.shape.dim
        for dim, out in zip(line.dims, taken, strict=False):
            if isinstance(dim, str) and dim != batch and out.dim_value > 0 and (not unnamed(dim) or out.dim_value != 1):
                sizes.setdefault(dim, out.dim_value)
    for line in proposal.lines:
        told = flags.shapes.get(line.tensor, ())
        if line.dims is None or len(told) < len(line.dims) - 1:
            continue
        known = (
            [dim for dim in line.dims if dim != batch]
            if len(told) == len(line.dims) - 1 and batch in line.dims
            else line.dims
        )
        if len(known) == len(told):
            for place, (dim, size) in enumerate(zip(known, told, strict=True)):
                if isinstance(dim, str) and not unnamed(dim) and dim != batch:
                    sizes.setdefault(dim, size + (line.context if place == len(told) - 1 and not line.is_state else 0))
    return sizes


def ask_size(missing: Missing) -> str:
    line, dims = missing.line, missing.line.dims or ()
    names = ", ".join(
        f"{place} ({dims[place]!r})" if not unnamed(dims[place]) else str(place) for place in missing.dims
    )
    named = [dim for place in missing.dims if not unnamed(dim := dims[place])]
    example = "x".join(
        str(dim) if isinstance(dim, int) else "SIZE"
        for place, dim in enumerate(dims)
        if place in missing.dims or (isinstance(dim, int) and dim != 1)
    )
    flag = f"--shape {line.tensor}={example or 'SIZE'} (what one step has, without the batch" + (
        " and without the context)" if line.context else ")"
    )
    if named:
        flag += f", or --shape {named[0]}=SIZE"
    return (
        f"{shown(line.tensor)} ({line.dtype} {'x'.join(map(dim_words, dims))}) has no size in dimension {names}: {flag}"
    )


def dynamic_places(line: Line) -> list[int]:
    return [place for place, dim in enumerate(line.dims or ()) if isinstance(dim, str)]
