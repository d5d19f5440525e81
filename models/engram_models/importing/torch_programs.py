"""A stranger's torch code as one function of named tensors: .pt2, TorchScript, a module:factory. Runs in conversion.py.

Nested arguments and results (a tuple of states, a dict of outputs) are laid flat, with names that say where they were.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from engram_models.importing.archive import checked_names, torch_sort
from engram_models.importing.arrays import read_arrays
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.returned import script_results, written_results

_TENSORS_MAX = 1024


class Flat(nn.Module):
    """Takes tensors one by one and gives them one by one, whatever `inner` takes and gives."""

    def __init__(self, inner: Any, leaves: list[Any], spec: pytree.TreeSpec, hidden: bool = False) -> None:
        super().__init__()
        if hidden or not isinstance(inner, nn.Module):
            object.__setattr__(self, "inner", inner)  # an exported module refuses eval(), which torch.onnx calls
        else:
            self.inner = inner
        self._leaves, self._spec = leaves, spec
        self.structure: Any = None
        self.eval()  # torch.onnx puts back what it finds, in all that is within

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.arguments(tensors)
        found = self.inner(*args, **kwargs)
        paths, _ = pytree.tree_flatten_with_path(found)
        self.structure = [path for path, leaf in paths if isinstance(leaf, Tensor)]
        return tuple(leaf for _, leaf in paths if isinstance(leaf, Tensor))

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How `inner` is called with these."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


@dataclass
class Program:
    """`step` takes the tensors of `examples`, in the order of their names, and gives a tuple of tensors."""

    source: str
    step: Flat
    names: list[str]
    examples: list[Tensor]
    results: list[str] | None  # names by place; None: the outputs' own structure names them
    dynamic: list[dict[int, str]] | None = None  # .pt2: which axes may have another size; None: not known


def program(request: Mapping[str, Any]) -> Program:
    """Raises ImportRefusedError."""
    source = request["source"]
    if request["sort"] == "factory":
        return _of_factory(request)
    sort = torch_sort(source, checked_names(Path(source)))
    return _of_export(source) if sort == "export" else _of_script(request)


def _of_export(source: str) -> Program:
    try:
        exported = torch.export.load(source)
    except Exception as error:
        raise ImportRefusedError(f"{source}: torch.export.load does not read it: {first_line(error)}") from None
    if exported.example_inputs is None:
        raise ImportRefusedError(f"{source}: has no example inputs; export it again and save it by torch.export.save")
    if changed := sorted(exported.graph_signature.buffers_to_mutate.values()):
        raise ImportRefusedError(_keeps(source, changed))
    module = _traceable(exported.module(check_guards=False))
    args, kwargs = exported.example_inputs
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    values = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"]
    places = {node.name: value for node, value in zip(_placeholders(exported), values, strict=True)}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(places.get(str(name)), Tensor)]
    examples = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(names) != len(examples):
        raise ImportRefusedError(f"{source}: {len(names)} inputs, and {len(examples)} example tensors")
    dynamic = [
        {axis: str(size) for axis, size in enumerate(places[str(name)].shape) if isinstance(size, torch.SymInt)}
        for name in names
    ]
    step = Flat(module, leaves, spec, hidden=True)
    return Program(source, step, [str(name) for name in names], _plain(source, examples), None, dynamic)


def _traceable(module: Any) -> Any:
    """Sizes as tracing can follow them, no assertions about them (the comparison shows what holds), no gradients."""
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks_with_kwargs.clear()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.aten.sym_size.int:
            node.target = torch.Tensor.size
        elif "assert" in str(node.target) and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return module


def _placeholders(exported: Any) -> list[Any]:
    return [node for node in exported.graph.nodes if node.op == "placeholder"]


def _of_script(request: Mapping[str, Any]) -> Program:
    source = request["source"]
    try:
        module = torch.jit.load(source, map_location="cpu").eval()  # type: ignore[no-untyped-call]
        parameters = module.forward.schema.arguments[1:]
    except Exception as error:
        raise ImportRefusedError(f"{source}: torch.jit.load does not read it: {first_line(error)}") from None
    needed = {each.name: not each.has_default_value() for each in parameters}
    for each in parameters:
        if each.type.kind() in ("IntType", "FloatType", "BoolType", "StringType") and not each.has_default_value():
            raise ImportRefusedError(
                f"{source}: forward's {shown(each.name)} is no tensor but {each.type}; import a scripted wrapper that sets it"
            )
    return _of_module(source, module, needed, _arguments(request, needed), script_results(module))


def _of_factory(request: Mapping[str, Any]) -> Program:
    source = request["source"]
    sys.path.insert(0, request["import_path"])
    module_name, _, name = source.partition(":")
    try:
        made: Any = importlib.import_module(module_name)
        for part in name.split("."):
            made = getattr(made, part)
        made = made() if not isinstance(made, nn.Module) else made
    except Exception as error:
        raise ImportRefusedError(f"{source}: {type(error).__name__}: {first_line(error)}") from None
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ImportRefusedError(
            f"{source}: gave a {type(module).__name__}; a factory returns an nn.Module, or (module, example inputs)"
        )
    parameters = inspect.signature(module.forward).parameters.values()
    needed = {
        each.name: each.default is each.empty
        for each in parameters
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    if examples is None:
        examples = _arguments(request, needed)
    elif isinstance(examples, Tensor):
        examples = (examples,)
    if not isinstance(examples, Mapping):
        if len(examples) > len(needed):
            raise ImportRefusedError(f"{source}: {len(examples)} example inputs, and forward takes {', '.join(needed)}")
        examples = dict(zip(needed, examples, strict=False))
    return _of_module(source, module.eval(), needed, dict(examples), written_results(module))


def _of_module(
    source: str, module: Any, needed: dict[str, bool], arguments: dict[str, Any], results: list[str] | None
) -> Program:
    for wrong in [name for name in arguments if name not in needed]:
        raise ImportRefusedError(f"{source}: forward takes {', '.join(needed)}; there is no {shown(wrong)}")
    if missing := [name for name, must in needed.items() if must and name not in arguments]:
        flags = " ".join(f"--shape {name}=2x..." for name in missing)
        raise ImportRefusedError(f"{source}: forward takes {', '.join(needed)}; give the shapes, batch first: {flags}")
    ordered = {name: arguments[name] for name in needed if name in arguments}
    positional = list(needed)[: len(ordered)] == list(ordered)
    call: tuple[tuple[Any, ...], dict[str, Any]] = (tuple(ordered.values()), {}) if positional else ((), ordered)
    named, _ = pytree.tree_flatten_with_path(ordered)
    leaves, spec = pytree.tree_flatten(call)
    names = [path_name(path) for path, leaf in named if isinstance(leaf, Tensor)]
    examples = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not 0 < len(examples) <= _TENSORS_MAX:
        raise ImportRefusedError(f"{source}: {len(examples)} example tensors; give from 1 to {_TENSORS_MAX}")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Program(source, Flat(module, leaves, spec), names, _plain(source, examples), results)


def _plain(source: str, examples: list[Tensor]) -> list[Tensor]:
    if any(example.is_sparse or example.is_complex() for example in examples):
        raise ImportRefusedError(f"{source}: an example input is sparse or complex")
    return [example.detach().cpu().clone() for example in examples]


def _arguments(request: Mapping[str, Any], needed: Mapping[str, bool]) -> dict[str, Any]:
    """Arrays of one call by parameter: from --shape and the .npz. `state_0`, `state_1` are a tuple `state`."""
    found: dict[str, Tensor] = {}
    if request["examples"]:
        given = read_arrays(Path(request["examples"]))
        found = {name: torch.from_numpy(array.copy()) for name, array in given.items() if _parameter(name, needed)}
    torch.manual_seed(7)
    for name, shape in request["shapes"].items():
        dtype = getattr(torch, request["dtypes"].get(name, "float32"), None)
        if not isinstance(dtype, torch.dtype):
            raise ImportRefusedError(f"--shape {name}: {shown(request['dtypes'][name])} is no dtype")
        found[name] = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    arguments: dict[str, Any] = {}
    for name, tensor in sorted(found.items(), key=lambda item: _numbered(item[0])):
        parameter = _parameter(name, needed) or name
        if parameter == name:
            arguments[name] = tensor
        else:
            arguments[parameter] = (*arguments.get(parameter, ()), tensor)
    return arguments


def _parameter(name: str, needed: Mapping[str, bool]) -> str | None:
    if name in needed:
        return name
    head, _, number = name.rpartition("_")
    return head if number.isdigit() and head in needed else None


def _numbered(name: str) -> tuple[str, int]:
    head, _, number = name.rpartition("_")
    return (head, int(number)) if number.isdigit() else (name, -1)


def path_name(path: tuple[Any, ...]) -> str:
    """Keys of a nested structure as one name: `state_0`, `state_h`."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return re.sub(r"\W", "_", "_".join(parts))


def _keeps(source: str, names: list[str]) -> str:
    return (
        f"{source}: forward changes its own {', '.join(map(shown, names[:4]))}; "
        "a session's state must be an argument of forward and one of its results"
    )


def first_line(error: BaseException) -> str:
    """What an error says first; TorchScript's say last what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
