"""What the user said about a file: the flags of `engram models import`, against the names that the graph has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.interface import Interface, unnamed


@dataclass(slots=True)
class Flags:
    """Names are those of the graph."""

    states: dict[str, str] = field(default_factory=dict)  # input: output
    axes: dict[str, int | None] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)  # a number, or lists of them
    contexts: dict[str, int] = field(default_factory=dict)  # of an input's own past
    feedbacks: dict[str, tuple[str, int]] = field(default_factory=dict)  # input: (output, how much of it)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # as served
    sizes: dict[str, int] = field(default_factory=dict)  # of named dimensions
    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)


def parse_flags(
    interface: Interface,
    states: Sequence[str] = (),
    axes: Sequence[str] = (),
    constants: Sequence[str] = (),
    contexts: Sequence[str] = (),
    shapes: Sequence[str] = (),
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Flags:
    """Raises ImportRefusedError, which names the flag and what it could have said."""
    flags = Flags()
    given, taken = [t.name for t in interface.inputs], [t.name for t in interface.outputs]
    for text in states:
        name, output = _pair(text, "--state", given, "IN=OUT")
        flags.states[_new(name, flags.states, "--state")] = _known(output, taken, f"--state {text}", "output")
    if len(set(flags.states.values())) < len(flags.states):
        raise ImportRefusedError("--state: one output is given to two states")
    for text in axes:
        name, value = _pair(text, "--batch-axis", [*given, *taken], "TENSOR=K")
        flags.axes[name] = None if value.lower() == "none" else _whole(value, f"--batch-axis {text}", 0)
    for text in constants:
        name, value = _pair(text, "--constant", given, "TENSOR=VALUE")
        flags.constants[name] = _numbers(value, f"--constant {text}")
    for text in contexts:
        name, value = _pair(text, "--context", given, "TENSOR=K or TENSOR=OUTPUT:K")
        output, colon, size = value.rpartition(":")
        if colon:
            known = _known(output, taken, f"--context {text}", "output")
            flags.feedbacks[name] = (known, _whole(size, f"--context {text}", 1))
        else:
            flags.contexts[name] = _whole(size, f"--context {text}", 1)
    dims = {
        dim
        for t in (*interface.inputs, *interface.outputs)
        for dim in t.dims or ()
        if isinstance(dim, str) and not unnamed(dim)
    }
    for text in shapes:
        name, value = _pair(text, "--shape", [*given, *sorted(dims)], "TENSOR=AxB or DIMENSION=SIZE")
        shape = tuple(_whole(part, f"--shape {text}", 1) for part in value.lower().split("x") if value)
        if name in given:
            flags.shapes[name] = shape
        elif len(shape) == 1:
            flags.sizes[name] = shape[0]
        else:
            raise ImportRefusedError(f"--shape {text}: the dimension {shown(name)} has one size")
    flags.inputs = {_known(name, given, f"--input {name}", "input") for name in inputs}
    flags.outputs = {_known(name, taken, f"--output {name}", "output") for name in outputs}
    return _one_role(flags)


def _one_role(flags: Flags) -> Flags:
    told = {"--state": set(flags.states), "--constant": set(flags.constants), "--input": flags.inputs,
            "--context TENSOR=OUTPUT:K": set(flags.feedbacks)}  # fmt: skip
    seen: dict[str, str] = {}
    for flag, names in told.items():
        for name in names:
            if name in seen:
                raise ImportRefusedError(f"{shown(name)} is named by {seen[name]} and by {flag}; it can be one of them")
            seen[name] = flag
    for name in flags.contexts:
        if seen.get(name, "--input") != "--input":
            raise ImportRefusedError(f"{shown(name)} is named by {seen[name]} and by --context; it can be one of them")
    return flags


def _pair(text: str, flag: str, names: Iterable[str], form: str) -> tuple[str, str]:
    """Cut at the `=` before which there is a known name; names may have `=` in them."""
    known = set(names)
    cuts = [place for place, character in enumerate(text) if character == "="]
    for place in cuts:
        if text[:place] in known:
            return text[:place], text[place + 1 :]
    if not cuts:
        raise ImportRefusedError(f"{flag} {text}: write {flag} {form}")
    _known(text[: cuts[0]], sorted(known), f"{flag} {text}", "tensor")
    raise AssertionError


def _known(name: str, names: Sequence[str], flag: str, kind: str) -> str:
    if name in names:
        return name
    listed = ", ".join(shown(known) for known in list(names)[:12]) + (" ..." if len(names) > 12 else "")
    raise ImportRefusedError(f"{flag}: the graph has no {kind} {shown(name)}; it has {listed or 'none'}")


def _new(name: str, seen: Iterable[str], flag: str) -> str:
    if name in seen:
        raise ImportRefusedError(f"{flag}: {shown(name)} is named twice")
    return name


def _whole(text: str, flag: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text[:12]) < 1 << 31 or len(text) > 12:
        raise ImportRefusedError(f"{flag}: {shown(text)} is not a whole number of at least {least}")
    return int(text)


def _numbers(text: str, flag: str) -> Any:
    """`16000`, `1,2,3`, `[[1, 2]]`, `true`."""
    for written in (text, f"[{text}]"):
        try:
            return json.loads(written)
        except (ValueError, RecursionError):
            pass
    raise ImportRefusedError(f"{flag}: {shown(text)} is not a number or a list of numbers")
