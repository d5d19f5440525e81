"""Which dimension of each tensor is the batch, and what sizes the others have. Called by the import, after roles.py.

By flags, by the names of dimensions, and by running the graph (axis_trial.py), which also shows whether what they say is so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engram_models.importing import axis_trial, sandbox
from engram_models.importing.errors import ImportRefused, shown
from engram_models.importing.flags import Flags
from engram_models.importing.interface import Dim, dim_words, unnamed
from engram_models.importing.names import is_batch_dim, is_time_dim, stem
from engram_models.importing.proposal import Array, Line, Proposal

PLANS_MAX = 32
SECONDS = 100.0
Axes = dict[str, int | None]
Plan = dict[str, list[int]]


class Missing(Exception):
    """A dimension that has no size yet."""

    def __init__(self, line: Line, dims: list[int]) -> None:
        super().__init__()
        self.line, self.dims = line, dims


def settle(
    model: onnx.ModelProto,
    proposal: Proposal,
    flags: Flags,
    values: Mapping[str, Array],
    progress: Callable[[str], None] | None = None,
) -> None:
    """Fills in `axis`, `full` and `shape` of every line, and how the graph may be batched; or adds doubts.

    values: what constants and some initial states are, each without the batch. Raises ImportRefused for a graph that does not run.
    """
    lines = [line for line in proposal.lines if line.in_graph]
    for line in lines:
        if line.dims is None:
            raise ImportRefused(
                f"the file does not say how many dimensions {shown(line.tensor)} has; export it with shapes"
            )
    batch = _batch_symbol(lines, flags)
    sizes = _sizes(proposal, flags, batch, model)
    choices = {line.tensor: _choices(line, batch, flags) for line in lines}
    plans, missing = _plans(lines, choices, flags, sizes)
    if not plans and missing is not None:
        proposal.doubts.append(_ask_size(missing))
        return
    bare = next(
        (line for line in lines if choices[line.tensor] == [None] and line.role in ("input", "recurrent")), None
    )
    bare = bare or next((line for line in lines if choices[line.tensor] == [None] and line.role == "window"), None)
    if bare is None:
        found = _search(model, [plan for _, plan in plans], lines, values, _several(lines, choices), progress)
        good = [
            n
            for n, one in enumerate(found)
            if one["found"] == axis_trial.FREE and not _unbatched(one, lines, plans[n][0], proposal)
        ]
        if good and not _rivals(proposal, [plans[n][0] for n in good], lines):
            axes, plan = plans[good[0]]
            _fill(proposal, lines, axes, plan, found[good[0]], choices, batch)
            proposal.relabelled = any(_at(line) == 1 for line in lines)
            return
        if good:
            return
        leaking = next(
            (
                n
                for n, one in enumerate(found)
                if one["found"] == axis_trial.LEAKS and not _unbatched(one, lines, plans[n][0], proposal)
            ),
            None,
        )
        if leaking is not None and all(_said(line, plans[leaking][0], batch, flags) for line in lines):
            axes, plan = plans[leaking]
            proposal.batch, proposal.why = "one-by-one", f"outputs may depend on the batch: {found[leaking]['why']}"
            _fill(proposal, lines, axes, plan, found[leaking], choices, batch)
            return
        first = found[0]
        proposal.why = (
            _unbatched(first, lines, plans[0][0], proposal)
            or f"it does not run with more than one row: {first.get('why', '')}"
        )
    else:
        whole = all(choices[line.tensor] == [None] for line in lines)
        proposal.why = "it has no batch axis" if whole else f"{shown(bare.tensor)} has no batch axis"
    _alone(model, proposal, lines, choices, flags, sizes, batch, values, progress)


def _batch_symbol(lines: Sequence[Line], flags: Flags) -> str:
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


def _choices(line: Line, batch: str, flags: Flags) -> list[int | None]:
    """What may be the batch axis of a tensor, the likeliest first; [None] where nothing may."""
    dims = line.dims or ()
    if line.tensor in flags.axes:
        axis = flags.axes[line.tensor]
        if axis is not None and axis >= len(dims):
            raise ImportRefused(
                f"--batch-axis {line.tensor}={axis}: it has {len(dims)} dimensions, and the first one is 0"
            )
        if axis is not None and isinstance(dims[axis], int) and dims[axis] != 1:
            raise ImportRefused(
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


def _plans(
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
    plans, missing = [], None
    for picks in ordered:
        axes = {
            line.tensor: option[pick]
            for group, option, pick in zip(groups, options, picks, strict=True)
            for line in group
        }
        try:
            plans.append((axes, {line.tensor: _full(line, axes[line.tensor], flags, sizes) for line in lines}))
        except Missing as error:
            missing = missing or error
    return plans, missing


def _full(line: Line, axis: int | None, flags: Flags, sizes: Mapping[str, int]) -> list[int]:
    """The graph's dimensions of a tensor, -1 for the batch. Raises Missing, and ImportRefused for a --shape that cannot be."""
    dims = line.dims or ()
    told: list[int | None] = [None] * len(dims)
    if line.tensor in flags.shapes:
        shape = list(flags.shapes[line.tensor])
        if line.context and not line.is_state and shape:
            shape[-1] += line.context
        if axis is not None and len(shape) == len(dims) - 1:
            shape.insert(axis, 1)
        if len(shape) != len(dims):
            raise ImportRefused(
                f"--shape {line.tensor}={'x'.join(map(str, flags.shapes[line.tensor]))}: it has {len(dims)} dimensions"
                + (" with the batch" if axis is not None else "")
            )
        told = list(shape)
    full, open_dims = [], []
    for place, dim in enumerate(dims):
        size = dim if isinstance(dim, int) else sizes.get(dim)
        if line.role == "window" and place == len(dims) - 1:
            if isinstance(dim, int) and dim != line.context:
                raise ImportRefused(
                    f"--context {line.tensor}={line.output}:{line.context}: its last dimension is {dim}"
                )
            size = line.context
        if place == axis:
            full.append(-1)
            continue
        if told[place] is not None:
            if isinstance(dim, int) and dim != told[place]:
                raise ImportRefused(
                    f"--shape: dimension {place} of {shown(line.tensor)} is {dim} in the file, and not {told[place]}"
                )
            size = told[place]
        if size is None:
            open_dims.append(place)
        full.append(size or 0)
    if open_dims:
        raise Missing(line, open_dims)
    return full


def _sizes(proposal: Proposal, flags: Flags, batch: str, model: onnx.ModelProto) -> dict[str, int]:
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


def _ask_size(missing: Missing) -> str:
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


def _several(lines: Sequence[Line], choices: Mapping[str, list[int | None]]) -> bool:
    """Whether two dynamic dimensions of one tensor may both be the batch: then all plans are tried, for two that work are a doubt."""
    return any(
        sum(axis is not None and isinstance((line.dims or ())[axis], str) for axis in choices[line.tensor]) > 1
        for line in lines
    )


def _search(
    model: onnx.ModelProto, plans: Sequence[Plan], lines: Sequence[Line], values: Mapping[str, Array], every: bool,
    progress: Callable[[str], None] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    data = model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="engram-import-") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(data)
        valued = sorted(values)
        # Under names of our own: those of a stranger may be paths.
        np.savez(folder / "values.npz", **{f"a{place}": values[key] for place, key in enumerate(valued)})  # type: ignore[arg-type]
        dtypes = {line.tensor: line.dtype for line in lines}
        dynamic = {line.tensor: dynamic_places(line) for line in lines}
        arguments = {"plans": list(plans), "dtypes": dtypes, "dynamic": dynamic, "valued": valued, "all_of_them": every}
        found: list[dict[str, Any]] = sandbox.run(
            "engram_models.importing.axis_trial:search",
            folder,
            arguments,
            sandbox.memory_limit(len(data)),
            SECONDS,
            progress,
        )
    return found


def dynamic_places(line: Line) -> list[int]:
    return [place for place, dim in enumerate(line.dims or ()) if isinstance(dim, str)]


def _unbatched(one: Mapping[str, Any], lines: Sequence[Line], axes: Axes, proposal: Proposal) -> str:
    """Why rows cannot share a call though the graph runs with several, or nothing."""
    if one["found"] not in (axis_trial.FREE, axis_trial.LEAKS):
        return ""
    for line in proposal.of_role("output"):
        if one["axes"].get(line.tensor) is None:
            return f"the output {shown(line.tensor)} has no batch axis"
    for line in lines:
        if line.role in ("recurrent", "counter") and (one["axes"].get(line.output) is None) != (
            axes[line.tensor] is None
        ):
            return f"the state {shown(line.tensor)} has a batch axis on one side only"
        if line.role == "window" and line.output and one["axes"].get(line.output) is None:
            return f"the output {shown(line.output)} has no batch axis"
    return ""


def _rivals(proposal: Proposal, good: Sequence[Axes], lines: Sequence[Line]) -> bool:
    """Two ways to batch that both work, and are not the same bytes, are a doubt."""
    for line in lines:
        dims = line.dims or ()
        axes = sorted({axis for one in good if (axis := one[line.tensor]) is not None and isinstance(dims[axis], str)})
        if len(axes) > 1:
            proposal.doubts.append(
                f"{shown(line.tensor)} ({line.dtype} {'x'.join(map(dim_words, dims))}) runs with the batch in dimension {axes[0]} and in {axes[1]}: "
                f"--batch-axis {line.tensor}={axes[0]} or ={axes[1]}"
            )
            return True
    return False


def _said(line: Line, axes: Axes, batch: str, flags: Flags) -> bool:
    """Whether the file or the user, and not only a guess, has this axis for the batch."""
    axis = axes[line.tensor]
    return axis is None or line.tensor in flags.axes or (line.dims or ())[axis] in (1, batch)


def _at(line: Line) -> Dim | None:
    return None if line.axis is None else (line.dims or ())[line.axis]


def _fill(
    proposal: Proposal, lines: Sequence[Line], axes: Axes, plan: Plan, one: Mapping[str, Any],
    choices: Mapping[str, list[int | None]], batch: str,
) -> None:  # fmt: skip
    for line in lines:
        _set(line, axes[line.tensor], plan[line.tensor])
        line.how.append(_how_axis(line, choices[line.tensor], batch))
    proposal.open = one["open"]
    _fill_outputs(proposal, one["shapes"], one["axes"])


def _set(line: Line, axis: int | None, full: Sequence[int]) -> None:
    line.axis, line.full = axis, tuple(full)
    line.shape = tuple(size for place, size in enumerate(full) if place != axis)


def _how_axis(line: Line, choices: list[int | None], batch: str) -> str:
    if line.axis is None:
        return "no batch axis" if line.dims else ""
    dim = _at(line)
    if dim == batch:
        return f"dimension {dim!r}"
    tried = "ran it with 3 rows there"
    return f"dimension of 1, {tried}" if dim == 1 else tried


def _fill_outputs(proposal: Proposal, shapes: Mapping[str, Sequence[int]], axes: Mapping[str, int | None]) -> None:
    proposal.settled = True
    by_name = {line.tensor: line for line in proposal.lines if line.role != "output"}
    proposal.taken = {name: (axes.get(name), tuple(shape)) for name, shape in shapes.items()}
    for line in proposal.of_role("output"):
        axis = axes.get(line.tensor)
        _set(line, axis, [-1 if place == axis else size for place, size in enumerate(shapes[line.tensor])])
    for line in proposal.states:
        if line.role in ("recurrent", "counter"):
            axis = axes.get(line.output)
            row = tuple(size for place, size in enumerate(shapes[line.output]) if place != axis)
            if row != line.shape:
                raise ImportRefused(
                    f"the state {shown(line.tensor)} goes in as {_by(line.shape)} and comes out as {_by(row)}: a state keeps its size; "
                    "export the model with a cache of fixed size, or name another pair with --state"
                )
        elif line.of:
            _set_window(line, by_name[line.of])


def _set_window(window: Line, line: Line) -> None:
    """The last numbers of an input, and what is left of the input for a step to give."""
    if not line.shape or line.shape[-1] <= window.context or line.axis == len(line.full) - 1:
        raise ImportRefused(
            f"--context {line.tensor}={window.context}: the last dimension of what the graph takes is "
            f"{line.shape[-1] if line.shape else 'the batch'}, with the context in it; nothing would be left for a step"
        )
    window.shape = (*line.shape[:-1], window.context)
    window.axis = 0 if line.axis is not None else None
    line.shape = (*line.shape[:-1], line.shape[-1] - window.context)


def _alone(
    model: onnx.ModelProto, proposal: Proposal, lines: Sequence[Line], choices: Mapping[str, list[int | None]], flags: Flags,
    sizes: Mapping[str, int], batch: str, values: Mapping[str, Array], progress: Callable[[str], None] | None,
) -> None:  # fmt: skip
    """One row at a time, with the batch of 1 that the file has, or with none."""
    proposal.batch, proposal.static = "one-by-one", True
    states = [line for line in lines if line.role == "recurrent"]
    if batch and not all(batch in (line.dims or ()) for line in states):
        proposal.doubts.append(
            f"the dimension {batch!r} is no batch of sessions, for states do not have it ({proposal.why}): say how many a step has "
            f"along it with --shape {batch}=SIZE, such as --shape {batch}=1"
        )
        return
    axes: Axes = {}
    plan: Plan = {}
    for line in lines:
        dims = line.dims or ()
        fixed = [axis for axis in choices[line.tensor] if axis is not None and dims[axis] in (1, batch)]
        flagged = flags.axes.get(line.tensor)
        axes[line.tensor] = flagged if flagged is not None else fixed[0] if fixed else None
        try:
            plan[line.tensor] = _full(line, axes[line.tensor], flags, sizes)
        except Missing as error:
            proposal.doubts.append(f"{_ask_size(error)}. It is not the batch: {proposal.why}")
            return
    static = {name: [1 if size == -1 else size for size in full] for name, full in plan.items()}
    found = _search(model, [static], lines, values, False, progress)[0]
    if found["found"] != axis_trial.STATIC:
        raise ImportRefused(f"it does not run: {found['why']}")
    proposal.open = found["open"]
    some = any(axis is not None for axis in axes.values())
    out_axes = {
        line.tensor: _out_axis(line, found["shapes"][line.tensor], batch, some, flags)
        for line in proposal.of_role("output")
    }
    for line in lines:
        _set(line, axes[line.tensor], static[line.tensor])
        line.full = tuple(static[line.tensor])
        line.how.append(f"dimension {_at(line)!r}" if line.axis is not None else "no batch axis")
        if line.output and line.axis is not None and line.role != "window":
            out_axes[line.output] = line.axis
    _fill_outputs(proposal, found["shapes"], out_axes)


def _out_axis(line: Line, shape: Sequence[int], batch: str, some: bool, flags: Flags) -> int | None:
    if line.tensor in flags.axes:
        return flags.axes[line.tensor]
    if line.dims and batch and batch in line.dims:
        return line.dims.index(batch)
    return 0 if some and shape and shape[0] == 1 else None


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
