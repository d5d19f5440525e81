"""Runs a graph with other dimensions than its file says, to see which are the batch. Runs in the sandbox; asked by axes.py.

A dimension is the batch if the graph runs with three rows along it, every output then has three rows somewhere, and each row is
what it is alone. A dimension that is time fails one of these.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engram_models.importing import sandbox
from engram_models.importing.edit import BATCH, relabel
from engram_models.importing.errors import shown

ROWS = 3
_NEAR = 2e-3  # of the largest number of a tensor: other rows' influence is larger, other kernels' rounding is not
_NEAR_HALF = 3e-2
_ERROR_MAX = 200
_BFLOAT16 = 16  # of onnx's numbers of types
Array = np.ndarray[Any, np.dtype[Any]]

STATIC, LEAKS, ALONE, FAILS = "static", "leaks", "alone", "fails"  # what may be found, beside ROWS_FREE
FREE = "free"


def search(
    folder: Path, plans: Sequence[Mapping[str, Sequence[int]]], dtypes: Mapping[str, str],
    dynamic: Mapping[str, Sequence[int]], valued: Sequence[str], all_of_them: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each plan gave, up to the first that is good. A plan has dimensions for every input, -1 where the batch would be.

    dynamic: which dimensions have no size in the file. folder: model.onnx, and values.npz with one row, or the whole, of the inputs
    `valued`, which are not to be random.
    """
    found: list[dict[str, Any]] = []
    data = (folder / "model.onnx").read_bytes()
    with np.load(folder / "values.npz") as file:
        values = {name: file[f"a{place}"] for place, name in enumerate(valued)}
    for number, plan in enumerate(plans):
        sandbox.report(f"tries batch axes {number + 1} of {len(plans)}")
        found.append(_try(data, plan, dtypes, dynamic, values))
        if found[-1]["found"] == FREE and not all_of_them:
            break
    return found


def _try(
    data: bytes,
    plan: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str],
    dynamic: Mapping[str, Sequence[int]],
    values: Mapping[str, Array],
) -> dict[str, Any]:
    known = {name: [BATCH if dim == -1 else dim for dim in dims] for name, dims in plan.items()}
    session, is_open, why = None, False, ""
    for is_open in (False, True):
        try:
            session = _load(data, opened(known, dynamic) if is_open else known)
            break
        except Exception as error:  # ONNX Runtime's errors have no common root
            why = why or _words(error)
            if not any(dynamic.values()):
                break
    if session is None:
        return {"found": FAILS, "why": why}
    return {**_run_all(session, plan, dtypes, values), "open": is_open}


def opened(
    known: Mapping[str, Sequence[int | str]], dynamic: Mapping[str, Sequence[int]]
) -> dict[str, list[int | str]]:
    """Sizes that only we know are left out: a branch for another sample rate may not even load with them."""
    return {
        name: [
            f"{name}_{place}" if place in dynamic.get(name, ()) and dim != BATCH else dim
            for place, dim in enumerate(dims)
        ]
        for name, dims in known.items()
    }


def _load(data: bytes, dims: Mapping[str, Sequence[int | str]]) -> Any:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    model = onnx.ModelProto.FromString(data)
    relabel(model, dims)
    return InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run_all(
    session: Any, plan: Mapping[str, Sequence[int]], dtypes: Mapping[str, str], values: Mapping[str, Array]
) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    random = np.random.default_rng(7)
    feeds = {name: _feed(name, dims, dtypes[name], values, random) for name, dims in plan.items()}
    axes = {name: list(dims).index(-1) for name, dims in plan.items() if -1 in dims}
    alone: list[list[Array]] = []
    try:
        for row in range(ROWS):
            alone.append(_run(session, _rows(feeds, axes, slice(row, row + 1))))
    except Exception as error:
        return {"found": FAILS, "why": _words(error)}
    one = {name: list(value.shape) for name, value in zip(names, alone[0], strict=True)}
    if not axes:
        return {"found": STATIC, "shapes": one, "axes": {}}
    try:
        together, two = _run(session, feeds), _run(session, _rows(feeds, axes, slice(0, 2)))
    except Exception as error:
        return {"found": ALONE, "why": _words(error), "shapes": one, "axes": {}}
    shapes = [list(map(np.shape, found)) for found in (alone[0], two, together)]
    out_axes = {name: _axis(*each) for name, *each in zip(names, *shapes, strict=True)}
    result = {"shapes": one, "axes": out_axes}
    for place, name in enumerate(names):
        axis = out_axes[name]
        if axis is None:
            continue
        for row in range(ROWS):
            if not _near(np.take(together[place], [row], axis), alone[row][place]):
                return {
                    **result,
                    "found": LEAKS,
                    "why": f"{shown(name)} of a row depends on the other rows of its batch",
                }
    return {**result, "found": FREE}


def _feed(
    name: str, dims: Sequence[int], dtype: str, values: Mapping[str, Array], random: np.random.Generator
) -> Array:
    shape = [ROWS if dim == -1 else dim for dim in dims]
    if name in values and _goes_in(values[name], dims):
        value = values[name]
        row = [dim for dim in dims if dim != -1]
        if value.size == np.prod(row):
            value = value.reshape([1 if dim == -1 else dim for dim in dims])
        return np.array(np.broadcast_to(value, shape), order="C")
    if dtype == "bfloat16":
        return np.asarray(np.asarray(random.standard_normal(shape) * 0.5, np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        )
    if dtype.startswith("float"):
        return np.asarray(random.standard_normal(shape) * 0.5).astype(dtype)
    return np.asarray(random.integers(0, 2, shape)).astype(dtype)


def _goes_in(value: Array, dims: Sequence[int]) -> bool:
    """What does not is refused later, in words."""
    row = [dim for dim in dims if dim != -1]
    return value.size in (1, np.prod(row))


def _rows(feeds: Mapping[str, Array], axes: Mapping[str, int], which: slice) -> dict[str, Array]:
    cut = dict(feeds)
    for name, axis in axes.items():
        cut[name] = np.asarray(feeds[name][(slice(None),) * axis + (which,)], order="C")
    return cut


def _run(session: Any, feeds: Mapping[str, Array]) -> list[Array]:
    """bfloat16 goes in and comes out as its bits."""
    from onnxruntime import OrtValue

    kinds = {given.name: given.type for given in session.get_inputs()}
    given = {
        name: OrtValue.ortvalue_from_numpy_with_onnx_type(value, _BFLOAT16)
        if kinds[name] == "tensor(bfloat16)"
        else OrtValue.ortvalue_from_numpy(value)
        for name, value in feeds.items()
        if name in kinds
    }
    return [_array(value) for value in session.run_with_ort_values(None, given)]


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    bits = np.frombuffer(raw, np.uint16).reshape(value.shape())
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16)  # compared as numbers of little precision


def _axis(one: Sequence[int], two: Sequence[int], three: Sequence[int]) -> int | None:
    """Where there are as many as rows."""
    if not len(one) == len(two) == len(three):
        return None
    differing = [place for place, sizes in enumerate(zip(one, two, three, strict=True)) if len(set(sizes)) > 1]
    if len(differing) != 1:
        return None
    place = differing[0]
    return place if (one[place], two[place], three[place]) == (1, 2, 3) else None


def _near(a: Array, b: Array) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    if not a.size:
        return True
    near = _NEAR_HALF if a.dtype.itemsize == 2 else _NEAR
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    finite = np.abs(wide_b[np.isfinite(wide_b)])
    scale = float(finite.max()) if finite.size else 1.0
    return bool(np.allclose(wide_a, wide_b, rtol=near, atol=near * min(max(scale, 1e-6), 1e30), equal_nan=True))


def _words(error: Exception) -> str:
    """What ONNX Runtime says, without its own sources' names."""
    text = " ".join(str(error).split())
    node = re.search(r"Name:'([^']*)'", text)
    text = text.rpartition("Status Message: ")[2]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    if text.startswith("/"):
        text = text.partition(" was false. ")[2] or text.rpartition(") ")[2] or text
    place = f"node {shown(node.group(1))}: " if node and node.group(1) else ""
    return f"{place}{text[:_ERROR_MAX]}"
