"""What every cell must keep to be served, each as a function that raises CellError. For our own cells (tests) and for others'
(`engram models check --cell`): the same code.

A check gets a cell in evaluation mode and leaves it as it was.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engram_models.bundle import BundleError
from engram_models.cell import Cell, State, torch_dtype
from engram_models.cell_bundles import cell_floor, load_cell, write_bundle
from engram_models.spec import ROLES, TensorSpec

STEPS = 12
ROWS = 6
FLOOR_BATCH_MAX = 64
_POISONED_STEPS = 4
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_DOUBLE_TOLERANCE = 1e-3
_LARGE = 1e4


class CellError(Exception):
    """What a cell does that no served cell may do, and what to do about it."""


def check_all(cell: Cell) -> Iterator[tuple[str, str]]:
    """Every check by its name, with what is wrong: "" where nothing is."""
    for name, check in CHECKS.items():
        try:
            check(cell)
        except CellError as fault:
            yield name, str(fault)
        except Exception as error:  # of a stranger's code
            yield name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            yield name, ""


def names_and_config(cell: Cell) -> None:
    """State tensors have names of their own and roles; the config is plain values, as a manifest holds them."""
    names = [spec.name for spec in cell.state_schema]
    for name in names:
        _require(_NAME.fullmatch(name) is not None, f"the state {name!r} has no name of letters, digits and _")
    for spec in cell.state_schema:
        _require(bool(spec.role), f"the state {spec.name} has no role: {', '.join(filter(None, ROLES))}")
    _require(len(set(names)) == len(names), f"two states are called the same: {', '.join(names)}")
    try:
        again = json.loads(json.dumps(cell.config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CellError(f"its config is not of plain values (numbers, strings, lists): {error}") from None
    _require(again == _listed(cell.config), "its config is not of plain values: JSON gives back another one")


def made_again_from_config(cell: Cell) -> None:
    """from_config(config) has the same schema and takes the same weights, and then gives the same bits."""
    other = type(cell).from_config(cell.config).eval()
    _require(other.schema == cell.schema, "from_config(config) makes a cell of another schema")
    _require(_listed(other.config) == _listed(cell.config), "from_config(config) makes a cell of another config")
    other.load_state_dict(cell.state_dict())
    with torch.inference_mode():
        _equal(_run(cell, _inputs(cell)), _run(other, _inputs(cell)), "with the same weights, the cell from its config")


def initial_state_as_declared(cell: Cell) -> None:
    """[batch, *shape] of the schema's initial values, under the schema's names."""
    for rows in (1, 3):
        state = cell.initial_state(rows)
        _check_state(cell, state, rows)
        for spec, tensor in zip(cell.state_schema, state, strict=True):
            _require(
                bool((tensor == spec.initial).all()),
                f"the initial state {spec.name} is not {spec.initial:g} everywhere",
            )


def step_as_declared(cell: Cell) -> None:
    """Outputs and new states have the shapes, types and names of the schema."""
    with torch.inference_mode():
        for rows in (1, 3):
            y, state = cell(_inputs(cell, rows)[0], cell.initial_state(rows))
            _require(isinstance(y, Tensor), f"the output is a {type(y).__name__}, not a tensor")
            shape = (rows, *cell.output.shape)
            _require(
                tuple(y.shape) == shape, f"the output has the shape {list(y.shape)}; the schema says {list(shape)}"
            )
            _require(
                y.dtype == torch_dtype(cell.output), f"the output is {y.dtype}; the schema says {cell.output.dtype}"
            )
            _check_state(cell, state, rows)


def nothing_changed(cell: Cell) -> None:
    """A step changes neither its arguments nor the cell."""
    x, state = _inputs(cell)[0], _states(cell)
    held = [
        ("its input", x),
        *zip((f"the state {s.name} that it was given" for s in cell.state_schema), state, strict=True),
    ]
    held += [(f"its own {name}", tensor) for name, tensor in cell.state_dict(keep_vars=True).items()]
    before = [tensor.clone() for _, tensor in held]
    with torch.inference_mode():
        cell(x, state)
    for (what, tensor), copied in zip(held, before, strict=True):
        _require(_bits_equal(tensor, copied), f"a step changes {what}: write into copies")


def same_again(cell: Cell) -> None:
    """The same input and state give the same bits: nothing is random, nothing is kept between calls."""
    with torch.inference_mode():
        _equal(_run(cell, _inputs(cell)), _run(cell, _inputs(cell)), "called again with the same, the cell")


def sequence_of_steps(cell: Cell) -> None:
    """`sequence` gives the bits of its steps, one by one."""
    xs = _inputs(cell)
    with torch.inference_mode():
        ys, last = cell.sequence(torch.stack(xs, 1))
        state = cell.initial_state(ROWS)
        for number, x in enumerate(xs):
            y, state = cell(x, state)
            _require(_bits_equal(y, ys[:, number]), f"step {number} gives another output than sequence() does")
    _equal(list(state), list(last), "stepped through a sequence, the cell")


def rows_apart(cell: Cell) -> None:
    """A row's bits do not depend on its neighbours, whatever these are: other numbers, large ones, or none."""
    xs, state = _inputs(cell)[:_POISONED_STEPS], _states(cell)
    with torch.inference_mode():
        expected = _run(cell, xs, state)
        for what, value in (("other", 3.0), ("large", _LARGE), ("NaN", float("nan"))):
            for place in (0, ROWS // 2, ROWS - 1):
                if value != value and not (cell.input.is_float and all(spec.is_float for spec in cell.state_schema)):
                    continue
                changed = [_poisoned(x, place, value) for x in xs]
                states = cell.state_type(*(_poisoned(tensor, place, value) for tensor in state))
                others = [row for row in range(ROWS) if row != place]
                for got, want in zip(_run(cell, changed, states), expected, strict=True):
                    _require(
                        _bits_equal(got[others], want[others]),
                        f"{what} numbers in row {place} change what other rows give: a row must be computed from itself alone",
                    )


def some_batch_floor(cell: Cell) -> None:
    """Batches of multiples of some size give each row the same bits, or its place in a tile of one shape does not matter."""
    floor = cell_floor(cell, FLOOR_BATCH_MAX)
    if floor is None:
        tile = cell_floor(cell, 32, [32])
        _require(tile is not None, "a row's bits depend on its place in the batch: it can only run one by one")


def large_numbers(cell: Cell) -> None:
    """Inputs far out saturate: outputs and states stay finite."""
    x = torch.full((4, *cell.input.shape), _LARGE).to(torch_dtype(cell.input))
    with torch.inference_mode():
        for signed in (x, -x) if cell.input.is_float else (x,):
            y, state = cell(signed, cell.initial_state(4))
            for name, tensor in (("the output", y), *zip((s.name for s in cell.state_schema), state, strict=True)):
                _require(bool(torch.isfinite(tensor).all()), f"inputs of {_LARGE:g} make {name} infinite or NaN")


def double_precision(cell: Cell) -> None:
    """In float64 the cell runs, stays in float64, and gives what it gives in float32."""
    wide = copy.deepcopy(cell).double()
    if not all(spec.dtype == "float32" for spec in (cell.input, cell.output)):
        return
    x = _inputs(cell)[0]
    with torch.inference_mode():
        y, _ = cell(x, cell.initial_state(ROWS))
        precise, state = wide(x.double(), wide.initial_state(ROWS, dtype=torch.float64))
    _require(
        precise.dtype == torch.float64, f"in float64 the output is {precise.dtype}: make tensors of the input's dtype"
    )
    for spec, tensor in zip(cell.state_schema, state, strict=True):
        wanted = torch.float64 if spec.dtype == "float32" else torch_dtype(spec)
        _require(tensor.dtype == wanted, f"in float64 the state {spec.name} is {tensor.dtype}")
    far = (precise - y.double()).abs().max().item() if y.numel() else 0.0
    allowed = _DOUBLE_TOLERANCE * max(1.0, y.abs().max().item() if y.numel() else 0.0)
    _require(far <= allowed, f"in float64 the output is {far:.2g} away from the one in float32")


def bundle_and_back(cell: Cell) -> None:
    """Written as a bundle and loaded, it gives the same bits."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            other = load_cell(write_bundle(Path(directory), "cell", "1", cell))
        except BundleError as error:
            raise CellError(f"its bundle cannot be written or loaded: {str(error).rpartition('/1: ')[2]}") from None
    with torch.inference_mode():
        _equal(_run(cell, _inputs(cell)), _run(other, _inputs(cell)), "loaded from its bundle, the cell")


CHECKS: dict[str, Callable[[Cell], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        names_and_config, made_again_from_config, initial_state_as_declared, step_as_declared, nothing_changed, same_again,
        sequence_of_steps, rows_apart, some_batch_floor, large_numbers, double_precision, bundle_and_back,
    )
}  # fmt: skip


def _inputs(cell: Cell, rows: int = ROWS) -> list[Tensor]:
    """STEPS inputs [rows, *shape], always the same."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return [cell.inputs_like(_random(cell.input, rows, generator)) for _ in range(STEPS)]


def _states(cell: Cell) -> State:
    generator = torch.Generator().manual_seed(6)
    state: State = cell.state_type(*(_random(spec, ROWS, generator) for spec in cell.state_schema))
    return state


def _random(spec: TensorSpec, rows: int, generator: torch.Generator) -> Tensor:
    shape = (rows, *spec.shape)
    if spec.is_float:
        return torch.randn(shape, generator=generator).to(torch_dtype(spec))
    return torch.randint(0, 2, shape, generator=generator).to(torch_dtype(spec))


def _run(cell: Cell, xs: list[Tensor], state: State | None = None) -> list[Tensor]:
    """Outputs and states after every step."""
    state = cell.initial_state(len(xs[0])) if state is None else cell.state_type(*(tensor.clone() for tensor in state))
    seen: list[Tensor] = []
    for x in xs:
        y, state = cell(x.clone(), state)
        seen += [y.clone(), *(tensor.clone() for tensor in state)]
    return seen


def _poisoned(tensor: Tensor, row: int, value: float) -> Tensor:
    changed = tensor.clone()
    if tensor.is_floating_point():
        changed[row] = value
    else:
        changed[row] = 1 - changed[row].clamp(0, 1) if tensor.dtype != torch.bool else ~changed[row]
    return changed


def _check_state(cell: Cell, state: State, rows: int) -> None:
    names = tuple(spec.name for spec in cell.state_schema)
    fields = getattr(state, "_fields", None)
    _require(
        fields == names,
        f"the state is no {type(cell).__name__}.state_type({', '.join(names)}): make it with self.state_type(...)",
    )
    for spec, tensor in zip(cell.state_schema, state, strict=True):
        shape = (rows, *spec.shape)
        _require(
            tuple(tensor.shape) == shape,
            f"the state {spec.name} has the shape {list(tensor.shape)}; the schema says {list(shape)}",
        )
        _require(
            tensor.dtype == torch_dtype(spec), f"the state {spec.name} is {tensor.dtype}; the schema says {spec.dtype}"
        )


def _equal(one: list[Tensor], other: list[Tensor], who: str) -> None:
    if len(one) != len(other) or not all(map(_bits_equal, one, other)):
        raise CellError(f"{who} gives other bits")


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals itself."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(((one == other) | ((one != one) & (other != other))).all())
    )


def _listed(value: object) -> object:
    """Tuples as the lists that a manifest makes of them."""
    if isinstance(value, tuple | list):
        return [_listed(one) for one in value]
    if hasattr(value, "items"):
        return {key: _listed(one) for key, one in value.items()}
    return value


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise CellError(fault)
