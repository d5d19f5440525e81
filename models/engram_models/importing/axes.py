"""The batch axis of each tensor and its shape as served. Called by the import, after roles.py.

choices.py says what may be; axis_trial.py runs the graph and shows what is. Where rows cannot share a call, they go one by one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engram_models.importing import axis_trial, sandbox
from engram_models.importing.choices import (
    Axes,
    Missing,
    Plan,
    ask_size,
    batch_choices,
    batch_symbol,
    dynamic_places,
    full_dims,
    known_sizes,
    plans_of,
)
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.flags import Flags
from engram_models.importing.interface import Dim, dim_words
from engram_models.importing.proposal import Array, Line, Proposal

SECONDS = 100.0


@dataclass
class _Case:
    """What is being settled."""

    model: onnx.ModelProto
    proposal: Proposal
    lines: list[Line]  # of the graph's inputs
    flags: Flags
    values: Mapping[str, Array]
    progress: Callable[[str], None] | None
    batch: str  # the name of the batch dimension, or ""
    sizes: dict[str, int]
    choices: dict[str, list[int | None]]


def settle(
    model: onnx.ModelProto,
    proposal: Proposal,
    flags: Flags,
    values: Mapping[str, Array],
    progress: Callable[[str], None] | None = None,
) -> None:
    """Fills in `axis`, `full` and `shape` of every line, and how the graph may be batched; or adds doubts.

    values: what constants and some initial states are, each without the batch. With doubts already, nothing is run, and only
    sizes are asked for. Raises ImportRefusedError for a graph that does not run.
    """
    lines = [line for line in proposal.lines if line.in_graph]
    for line in lines:
        if line.dims is None:
            raise ImportRefusedError(
                f"the file does not say how many dimensions {shown(line.tensor)} has; export it with shapes"
            )
    batch = batch_symbol(lines, flags)
    case = _Case(
        model, proposal, lines, flags, values, progress, batch, known_sizes(proposal, flags, batch, model),
        {line.tensor: batch_choices(line, batch, flags) for line in lines},
    )  # fmt: skip
    plans, missing = plans_of(lines, case.choices, flags, case.sizes)
    if not plans and missing is not None:
        proposal.doubts.append(ask_size(missing))
    if proposal.doubts:
        return
    bare = [
        line for line in lines if case.choices[line.tensor] == [None] and line.role in ("input", "recurrent", "window")
    ]
    if bare:
        whole = all(case.choices[line.tensor] == [None] for line in lines)
        first = min(bare, key=lambda line: line.role == "window")
        proposal.why = "it has no batch axis" if whole else f"{shown(first.tensor)} has no batch axis"
        if not batch and (rows := _rows_of_all(lines)):
            proposal.notes.append(
                f"every input and state has a dimension of {rows}, and a session has all {rows}: if that is the batch, export "
                "the model with a free one (dynamic_shapes of torch.onnx.export), or with a batch of 1"
            )
        _alone(case)
    else:
        _together(case, plans)


def _together(case: _Case, plans: Sequence[tuple[Axes, Plan]]) -> None:
    """Runs the plans with several rows and takes the one that works; else one row at a time, as the file has it."""
    proposal, lines = case.proposal, case.lines
    found = _search(case, [plan for _, plan in plans], _several(lines, case.choices))
    rest = plans[len(found) :]
    if rest and _unbatched(found[-1], lines, plans[len(found) - 1][0], proposal):  # rows that broadcasting multiplies
        found += _search(case, [plan for _, plan in rest], True)
    whys = [_unbatched(one, lines, axes, proposal) for one, (axes, _) in zip(found, plans, strict=False)]
    good = [n for n, one in enumerate(found) if one["found"] == axis_trial.FREE and not whys[n]]
    if good:
        if not _rivals(proposal, [plans[n][0] for n in good], lines):
            _fill(case, *plans[good[0]], found[good[0]])
        return
    for n, one in enumerate(found):
        if one["found"] == axis_trial.LEAKS and not whys[n] and _is_batch(case, plans[n][0]):
            proposal.why = f"outputs may depend on the batch: {one['why']}"
            _fill(case, *plans[n], one)
            return
    proposal.why = whys[0] or f"it does not run with more than one row: {found[0].get('why', '')}"
    _alone(case)


def _rows_of_all(lines: Sequence[Line]) -> int:
    """The first size above 1 that all inputs and states of more than one number have, or 0."""
    dims = [line.dims for line in lines if line.dims and len(line.dims) > 1]
    common = (
        [dim for dim in dims[0] if isinstance(dim, int) and dim > 1 and all(dim in each for each in dims)]
        if dims
        else []
    )
    return common[0] if common else 0


def _several(lines: Sequence[Line], choices: Mapping[str, list[int | None]]) -> bool:
    """Whether two dynamic dimensions of one tensor may be the batch: then all plans are tried, for two that work are a doubt."""
    return any(
        sum(axis is not None and isinstance((line.dims or ())[axis], str) for axis in choices[line.tensor]) > 1
        for line in lines
    )


def _search(case: _Case, plans: Sequence[Plan], every: bool) -> list[dict[str, Any]]:
    """What axis_trial.py finds, in the sandbox: of each plan, or of those up to the first that is good."""
    data = case.model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="engram-import-") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(data)
        valued = sorted(case.values)
        # Under names of our own: those of a stranger may be paths.
        np.savez(folder / "values.npz", **{f"a{place}": case.values[key] for place, key in enumerate(valued)})  # type: ignore[arg-type]
        arguments = {
            "plans": list(plans), "valued": valued, "all_of_them": every,
            "dtypes": {line.tensor: line.dtype for line in case.lines},
            "dynamic": {line.tensor: dynamic_places(line) for line in case.lines},
        }  # fmt: skip
        memory = sandbox.memory_limit(len(data))
        found: list[dict[str, Any]] = sandbox.run(
            "engram_models.importing.axis_trial:search", folder, arguments, memory, SECONDS, case.progress
        )
    return found


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
                f"{shown(line.tensor)} ({line.dtype} {'x'.join(map(dim_words, dims))}) runs with the batch in "
                f"dimension {axes[0]} and in {axes[1]}: "
                f"--batch-axis {line.tensor}={axes[0]} or ={axes[1]}"
            )
            return True
    return False


def _is_batch(case: _Case, axes: Axes) -> bool:
    """Whether rows that depend on each other are a batch all the same: the file or the user says so, or every state grows with it.

    Time along the same dimension would make rows depend on each other too, but no state has as many rows as there is time.
    """
    for line in case.lines:
        axis = axes[line.tensor]
        if axis is None or line.tensor in case.flags.axes:
            continue
        dim = (line.dims or ())[axis]
        if dim not in (1, case.batch) and not _states_grow(case, axes):
            return False
    return True


def _states_grow(case: _Case, axes: Axes) -> bool:
    states = [line for line in case.lines if line.role == "recurrent"]
    return all((axis := axes[line.tensor]) is not None and isinstance((line.dims or ())[axis], str) for line in states)


def _at(line: Line) -> Dim | None:
    return None if line.axis is None else (line.dims or ())[line.axis]


def _fill(case: _Case, axes: Axes, plan: Plan, one: Mapping[str, Any]) -> None:
    for line in case.lines:
        _set(line, axes[line.tensor], plan[line.tensor])
        line.how.append(_how_axis(line, case.batch))
    case.proposal.open = one["open"]
    if any(_at(line) == 1 for line in case.lines):
        case.proposal.notes.append("the file has a batch of 1; relabelled: it runs with any number of rows")
    _fill_outputs(case.proposal, one["shapes"], one["axes"])


def _set(line: Line, axis: int | None, full: Sequence[int]) -> None:
    line.axis, line.full = axis, tuple(full)
    line.shape = tuple(size for place, size in enumerate(full) if place != axis)


def _how_axis(line: Line, batch: str) -> str:
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
                raise ImportRefusedError(
                    f"the state {shown(line.tensor)} goes in as {_by(line.shape)} and comes out as {_by(row)}: a state keeps its "
                    "size; export the model with a cache of fixed size, or name another pair with --state"
                )
        elif line.of:
            _set_window(line, by_name[line.of])


def _set_window(window: Line, line: Line) -> None:
    """The last numbers of an input, and what is left of the input for a step to give."""
    if not line.shape or line.shape[-1] <= window.context or line.axis == len(line.full) - 1:
        raise ImportRefusedError(
            f"--context {line.tensor}={window.context}: the last dimension of what the graph takes is "
            f"{line.shape[-1] if line.shape else 'the batch'}, with the context in it; nothing would be left for a step"
        )
    window.shape = (*line.shape[:-1], window.context)
    window.axis = 0 if line.axis is not None else None
    line.shape = (*line.shape[:-1], line.shape[-1] - window.context)


def _alone(case: _Case) -> None:
    """One row at a time, with the batch of 1 that the file has, or with none."""
    proposal, lines, batch = case.proposal, case.lines, case.batch
    proposal.static = True
    states = [line for line in lines if line.role == "recurrent"]
    without = [shown(line.tensor) for line in states if batch not in (line.dims or ())]
    if batch and 0 < len(without) < len(states):
        having = next(line.tensor for line in states if batch in (line.dims or ()))
        proposal.doubts.append(
            f"the state {without[0]} has no batch axis, and {shown(having)} has {batch!r}: sessions cannot share a call. "
            f"--shape {batch}=1 serves them one by one; to batch them, export {without[0]} with a batch axis"
        )
        return
    if batch and without:
        proposal.doubts.append(
            f"the dimension {batch!r} is no batch of sessions, for states do not have it ({proposal.why}): say how many a step has "
            f"along it with --shape {batch}=SIZE, such as --shape {batch}=1"
        )
        return
    axes: Axes = {}
    plan: Plan = {}
    for line in lines:
        dims = line.dims or ()
        fixed = [axis for axis in case.choices[line.tensor] if axis is not None and dims[axis] in (1, batch)]
        flagged = case.flags.axes.get(line.tensor)
        axes[line.tensor] = flagged if flagged is not None else fixed[0] if fixed else None
        try:
            full = full_dims(line, axes[line.tensor], case.flags, case.sizes)
        except Missing as error:
            proposal.doubts.append(f"{ask_size(error)}. It is not the batch: {proposal.why}")
            return
        plan[line.tensor] = [1 if size == -1 else size for size in full]
    found = _search(case, [plan], False)[0]
    if found["found"] != axis_trial.STATIC:
        raise ImportRefusedError(f"it does not run: {found['why']}")
    proposal.open = found["open"]
    rows = all(axes[line.tensor] is not None for line in lines if line.role == "input")
    out_axes = {
        line.tensor: _out_axis(line, found["shapes"][line.tensor], batch, rows, case.flags)
        for line in proposal.of_role("output")
    }
    for line in lines:
        _set(line, axes[line.tensor], plan[line.tensor])
        line.how.append(f"dimension {_at(line)!r}" if line.axis is not None else "no batch axis")
        if line.output and line.axis is not None and line.role != "window":
            out_axes[line.output] = line.axis
    _fill_outputs(proposal, found["shapes"], out_axes)


def _out_axis(line: Line, shape: Sequence[int], batch: str, rows: bool, flags: Flags) -> int | None:
    if line.tensor in flags.axes:
        return flags.axes[line.tensor]
    if line.dims and batch and batch in line.dims:
        return line.dims.index(batch)
    return 0 if rows and shape and shape[0] == 1 else None


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
