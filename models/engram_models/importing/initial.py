"""Initial values of states, values of constants: from flags, an .npz, the graph's defaults, metadata, else zero. For the import."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.flags import Flags
from engram_models.importing.names import stem, words
from engram_models.importing.proposal import Array, Line, Proposal
from engram_models.spec import NP_DTYPES

_INITIAL = {"init", "initial", "initials", "inits", "initialstate", "default", "defaults", "start"}
_EMPTY_WORDS = {"value", "values", "state", "states", "data", "tensor", "of", "for", "the"}


def gather(model: onnx.ModelProto, proposal: Proposal, flags: Flags, given: Mapping[str, Array]) -> dict[str, Array]:
    """What is known of states before their shapes are: a value as it is written, by tensor. Adds doubts; raises ImportRefusedError.

    given: the arrays of --initial. Tensors that are not in the result start with zeros.
    """
    states = {line.tensor: line for line in proposal.states}
    for name in given:
        if name not in states:
            raise ImportRefusedError(
                f"--initial: the array {shown(name)} is no state; states are {', '.join(map(shown, states)) or 'none'}"
            )
    defaults = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in states}
    found: dict[str, Array] = {}
    for name, line in states.items():
        if name in flags.constants:
            found[name] = _typed(_array(flags.constants[name]), line, f"--constant {name}")
            line.initial_words = "--constant"
        elif name in given:
            found[name] = _typed(given[name], line, f"--initial: the array {shown(name)}")
            line.initial_words = "--initial"
        elif name in defaults:
            found[name] = numpy_helper.to_array(defaults[name])
            line.initial_words = "the graph's default"
    _from_metadata(model, [line for line in states.values() if line.tensor not in found], proposal, found)
    return found


def fill(proposal: Proposal, found: Mapping[str, Array]) -> None:
    """Gives every state its initial value, now that shapes are known. Raises ImportRefusedError where one does not fit."""
    for line in proposal.states:
        if line.tensor not in found:
            line.initial, line.initial_words = 0.0, "zero"
            continue
        array = found[line.tensor]
        shape, full = line.shape, tuple(1 if size == -1 else size for size in line.full)
        if (
            array.shape not in (shape, full)
            and array.size != 1
            and not (array.ndim == 1 and array.size == np.prod(shape))
        ):
            raise ImportRefusedError(
                f"the initial value of {shown(line.tensor)} ({line.initial_words}) has the shape "
                f"{'x'.join(map(str, array.shape)) or 'of one number'}; "
                f"a session's state has {'x'.join(map(str, shape)) or 'one number'}"
            )
        value = np.broadcast_to(array.reshape(()), shape) if array.size == 1 else array.reshape(shape)
        if line.dtype in ("float16", "float32", "float64") and not np.isfinite(value).all():
            raise ImportRefusedError(
                f"the initial value of {shown(line.tensor)} ({line.initial_words}) has NaN or infinity"
            )
        line.initial = _uniform(value, line)


def _array(value: Any) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):  # lists of several lengths
        return np.asarray(None)


def _uniform(value: Array, line: Line) -> float | Array:
    """One number, where that is the same."""
    if (
        value.size
        and line.dtype != "bfloat16"
        and (value == value.flat[0]).all()
        and float(value.flat[0]) == value.flat[0]
    ):
        number = float(value.flat[0])
        if abs(number) < 1 << 53 and not (number == 0 and np.signbit(value).any()):
            return number
    return np.ascontiguousarray(value)


def _typed(array: Array, line: Line, what: str) -> Array:
    """As the tensor's type, if that changes no number but by rounding."""
    if array.dtype.kind not in "fiub":
        raise ImportRefusedError(f"{what}: numbers are wanted; lists in it must have equal lengths")
    if line.dtype == "bfloat16":
        if array.dtype == np.uint16:
            return array
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    dtype = NP_DTYPES[line.dtype]
    with np.errstate(all="ignore"):
        typed = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(typed, array):
        raise ImportRefusedError(f"{what}: {_short(array)} cannot be {line.dtype}")
    return typed


def _short(array: Array) -> str:
    return str(array.reshape(-1)[0]) if array.size else "nothing"


def _from_metadata(model: onnx.ModelProto, states: Sequence[Line], proposal: Proposal, found: dict[str, Array]) -> None:
    """Keys that are named for the initial value of a state: a JSON list, numbers with commas or spaces, or base64 of bytes."""
    changing = [line for line in states if line.role in ("recurrent", "counter")]
    for entry in model.metadata_props:
        said = words(entry.key)
        if not _INITIAL & set(said):
            continue
        matching = _named(tuple(word for word in said if word not in _INITIAL), changing)
        if len(matching) != 1:
            if any(_may_be(entry.value, line) for line in changing):
                proposal.doubts.append(
                    f"the metadata entry {shown(entry.key)} seems to be an initial value, and names no state: "
                    f"--initial FILE.npz with {', '.join(shown(line.tensor) for line in changing)} in it"
                )
            else:
                proposal.notes.append(f"the metadata entry {shown(entry.key)} is not used: it names no state")
            continue
        line = matching[0]
        array = _numbers(entry.value, line)
        if array is None:
            proposal.doubts.append(
                f"the metadata entry {shown(entry.key)} seems to have the initial value of {shown(line.tensor)} "
                "and cannot be read: --initial FILE.npz"
            )
        else:
            found[line.tensor] = _typed(array, line, f"the metadata entry {shown(entry.key)}")
            line.initial_words = f"metadata {entry.key[:40]}"


def _named(rest: tuple[str, ...], changing: Sequence[Line]) -> list[Line]:
    """Which states a key means, without the words that say initial."""
    keys = {rest, tuple(word for word in rest if word not in _EMPTY_WORDS)}
    found = [line for line in changing if keys & {words(line.tensor), stem(line.tensor)}]
    return list(changing) if not found and len(changing) == 1 and not set(rest) - _EMPTY_WORDS else found


def _may_be(text: str, line: Line) -> bool:
    """Whether it is a list of as many numbers as the state may have."""
    array = _numbers(text, line)
    if array is None or array.size < 2:
        return False
    size = int(np.prod([dim for dim in line.dims or () if isinstance(dim, int)]))
    return array.size % size == 0


def _numbers(text: str, line: Line) -> Array | None:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    try:
        if value is not None:
            array = np.asarray(value)
        else:
            array = np.asarray([float(word) for word in text.replace(",", " ").split()])
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0)
    if array.size and array.dtype.kind in "fiub":
        return array
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), NP_DTYPES[line.dtype]) if text else None
    except (binascii.Error, ValueError):
        return None
