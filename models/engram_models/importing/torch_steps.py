"""Writes a torch program as an ONNX graph, its batch axes dynamic, and compares the two. Runs in conversion.py."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.torch_axes import Axes, batch_axes, grown_axis, resized
from engram_models.importing.torch_programs import Program, first_line, path_name

OPSET = 18
TOLERANCE = 1e-4  # of the largest number of a result, where that is above 1
_ROWS = (3, 5)  # batches that the graph is compared in


def write_graph(program: Program, told: Mapping[str, int], output: Path) -> list[str]:
    """Gives what the user should know. Raises ImportRefusedError."""
    for name in told:
        if name in program.names and not 0 <= told[name] < program.examples[program.names.index(name)].dim():
            raise ImportRefusedError(f"--batch-axis {name}={told[name]}: it has no such axis")
    torch.set_num_threads(1)  # this process forks
    with torch.no_grad():
        first = _call(program, program.examples)
        _check_pure(program, first)
        names = _result_names(program, first)
        notices: list[str] = []
        axes = batch_axes(program, told, first)
        if axes is None:
            notices.append(
                "its batch size is fixed, or its batch axes were not found: give an example of 2 or 3 rows, or --batch-axis NAME=K"
            )
            examples, dynamic = program.examples, {}
        else:
            examples = resized(program.examples, axes, _ROWS[0])
            dynamic = _dynamic(program, names, axes, first, _call(program, examples))
        _export(program, examples, names, dynamic, output)
        notices += _compare(program, axes, output)
    return notices


def _call(program: Program, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    try:
        return tuple(program.step(*(tensor.clone() for tensor in tensors)))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(program.names, tensors, strict=True))
        raise ImportRefusedError(f"{program.source}: does not run on {shapes}: {first_line(error)}") from None


def _check_pure(program: Program, first: tuple[Tensor, ...]) -> None:
    """The same inputs give the same results, and the module is what it was."""
    before = {name: buffer.clone() for name, buffer in program.step.named_buffers()}
    second = _call(program, program.examples)
    changed = [name for name, buffer in program.step.named_buffers() if not _alike(buffer, before[name])]
    if changed:
        raise ImportRefusedError(
            f"{program.source}: forward changes its own {', '.join(shown(n.removeprefix('inner.')) for n in changed[:4])}; "
            "a session's state must be an argument of forward and one of its results"
        )
    if not all(map(_alike, first, second)):
        raise ImportRefusedError(
            f"{program.source}: gives other results when it is called again: it keeps a state in itself, or draws random numbers; "
            "a session's state must be an argument of forward and one of its results"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def _result_names(program: Program, results: Sequence[Tensor]) -> list[str]:
    """`next_h` is what a result of the name, shape and type of the input `h` is called."""
    structure = program.step.structure
    names = [path_name(path) for path in structure]
    if program.results is not None and len(program.results) == len(results) and not any(map(_is_key, structure)):
        bare = [re.sub(r"\d+$", "", name) for name in program.results]  # h0 is how TorchScript writes an h set anew
        names = [short if short in program.names else name for short, name in zip(bare, program.results, strict=True)]
        names = ["" if names.count(name) > 1 else name for name in names]
    inputs = dict(zip(program.names, program.examples, strict=True))
    named: list[str] = []
    for place, (name, result) in enumerate(zip(names, results, strict=True)):
        given = inputs.get(name)
        if given is not None and (given.shape, given.dtype) == (result.shape, result.dtype):
            name = f"next_{name}"
        elif given is not None or not name or name[0].isdigit():
            name = "output" if len(results) == 1 else f"output_{place}"
        while name in named or name in inputs:
            name += "_"
        named.append(name)
    return named


def _is_key(path: tuple[Any, ...]) -> bool:
    """Whether a dict or a named tuple says what a result is called."""
    return any(isinstance(getattr(key, "key", getattr(key, "name", None)), str) for key in path)


def _dynamic(
    program: Program, names: list[str], axes: Axes, first: tuple[Tensor, ...], more: tuple[Tensor, ...]
) -> dict[str, dict[int, str]]:
    inputs = {name: {axis: "batch"} for name, axis in zip(program.names, axes, strict=True) if axis is not None}
    grown = {name: grown_axis(small, large) for name, small, large in zip(names, first, more, strict=True)}
    return inputs | {name: {axis: "batch"} for name, axis in grown.items() if axis is not None}


def _export(
    program: Program, examples: list[Tensor], names: list[str], dynamic: dict[str, dict[int, str]], output: Path
) -> None:
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.onnx.export(
                *_exported(program, examples), str(output), dynamo=False, opset_version=OPSET, input_names=program.names,
                output_names=names, dynamic_axes=dynamic,
            )  # fmt: skip
    except Exception as error:
        raise ImportRefusedError(f"{program.source}: torch.onnx cannot write it: {first_line(error)}") from None
    if any("Python boolean" in str(warning.message) for warning in warned):
        _check_branches(program, examples)


def _exported(program: Program, examples: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    """What torch.onnx is given. A scripted module keeps its branches and loops; it lays nested arguments flat as we do."""
    inner = program.step.inner
    if not isinstance(inner, torch.jit.ScriptModule):
        return program.step, tuple(examples)
    args, kwargs = program.step.arguments(examples)
    if kwargs:
        raise ImportRefusedError(
            f"{program.source}: give the shape of every parameter of forward before {shown(next(iter(kwargs)))}"
        )
    return inner, args


def _check_branches(program: Program, examples: list[Tensor]) -> None:
    """What was recorded took one way at each branch of Python: that is right where sizes decide, and wrong where numbers do."""
    try:
        torch.export.export(program.step, tuple(examples), strict=False)
    except Exception as error:
        if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
            raise ImportRefusedError(
                f"{program.source}: its Python branches on the values of tensors, which no recording follows; use torch.where, "
                "or import what torch.jit.script makes of it"
            ) from None


def _compare(program: Program, axes: Axes | None, output: Path) -> list[str]:
    """The graph against the module, on the examples and on other numbers."""
    if any(tensor.dtype == torch.bfloat16 for tensor in program.examples):
        return ["bfloat16: the graph was not compared with the module"]
    try:
        import onnxruntime
    except ImportError:
        return ["without onnxruntime the graph was not compared with the module"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = onnxruntime.InferenceSession(str(output), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ImportRefusedError(
            f"{program.source}: ONNX Runtime does not load what torch.onnx wrote: {first_line(error)}"
        ) from None
    taken = {tensor.name for tensor in session.get_inputs()}
    for rows in _ROWS:
        examples = program.examples if axes is None else resized(program.examples, axes, rows)
        for inputs in (examples, *(_noise(examples, size) for size in (1.0, 4.0))):
            try:
                expected = program.step(*(tensor.clone() for tensor in inputs))
            except Exception:
                if inputs is examples:
                    raise
                continue  # a module may refuse numbers that are none of its own
            feeds = {name: t.numpy() for name, t in zip(program.names, inputs, strict=True) if name in taken}
            _check_results(program, session, session.run(None, feeds), expected)
    return []


def _noise(examples: list[Tensor], size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(t.shape, generator=generator) * size).to(t.dtype) if t.is_floating_point() else t for t in examples
    ]


def _check_results(program: Program, session: Any, got: list[Any], expected: tuple[Tensor, ...]) -> None:
    for result, found, wanted in zip(session.get_outputs(), got, expected, strict=True):
        ours, theirs = torch.as_tensor(found).double(), wanted.double()
        largest = theirs.nan_to_num().abs().max().item() if theirs.numel() else 0.0
        allowed = max(1.0, largest) * (TOLERANCE if wanted.dtype != torch.float16 else 100 * TOLERANCE)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=allowed, equal_nan=True):
            away = f"shape {list(ours.shape)}, not {list(theirs.shape)}" if ours.shape != theirs.shape else (
                f"{(ours - theirs).abs().max().item():.2g} away"
            )  # fmt: skip
            raise ImportRefusedError(
                f"{program.source}: the graph that torch.onnx wrote differs from the module in {shown(result.name)} ({away}); "
                "its Python does something that a recording cannot follow"
            )
