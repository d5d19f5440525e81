"""Writes a graph anew in the bundles' normal form (bundle.py), as its proposal has it. The import proves the result.

The nodes of the file stay as they are. Before them come those that bring inputs and states from batch first to where the graph
wants them, after them those that bring outputs back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engram_models.bundle import TENSOR_NAME
from engram_models.importing.edit import BATCH, graphs, names_in, relabel, rename
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.interface import DTYPES
from engram_models.importing.proposal import Array, Line, Proposal
from engram_models.spec import Schema, TensorSpec

_TYPES = {name: number for number, name in DTYPES.items()}
_END = (1 << 31) - 1
Change = tuple[str, list[int]]  # Transpose or Reshape, and its numbers
_IR_MIN = 4  # before it, every weight had to be an input


@dataclass(frozen=True)
class NormalForm:
    graph: bytes
    schema: Schema
    initials: dict[str, Array]  # of states whose initial value is not one number, by the schema's names
    names: dict[str, str]  # the graph's name of a tensor: the schema's


def write(model: onnx.ModelProto, proposal: Proposal) -> NormalForm:
    """Changes the model. Raises ImportRefusedError where a window does not fit."""
    names = _schema_names(proposal)
    specs = {id(line): _spec(line, names[id(line)], proposal) for line in proposal.lines}
    schema = Schema(
        tuple(specs[id(line)] for line in proposal.of_role("input")),
        tuple(specs[id(line)] for line in proposal.of_role("output")),
        tuple(specs[id(line)] for line in proposal.states),
    )
    relabel(model, {line.tensor: line.full for line in proposal.lines if line.in_graph})
    model.ir_version = max(model.ir_version, _IR_MIN)
    writer = _Writer(
        model,
        proposal,
        {id(line): name for line, name in zip(proposal.lines, _graph_names(model, proposal, names), strict=True)},
    )
    writer.write()
    versions = {entry.domain: entry.version for entry in model.opset_import}  # each once
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
    del model.metadata_props[:]
    model.doc_string = ""
    for one in graphs(model.graph):
        del one.metadata_props[:]
        one.doc_string = ""
        for node in one.node:  # an exporter writes its owner's paths and lines of source here
            del node.metadata_props[:]
            node.doc_string = ""
    initials = {names[id(line)]: line.initial for line in proposal.states if isinstance(line.initial, np.ndarray)}
    try:
        onnx.checker.check_model(model)
        graph = model.SerializeToString()
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ImportRefusedError(f"the graph is not valid ONNX: {' '.join(str(error).split())[:200]}") from error
    return NormalForm(graph, schema, initials, {line.tensor: names[id(line)] for line in proposal.lines})


def _schema_names(proposal: Proposal) -> dict[int, str]:
    """Names that bundles take, each once among inputs and states, and once among outputs."""
    names: dict[int, str] = {}
    for group in ([line for line in proposal.lines if line.role != "output"], proposal.of_role("output")):
        taken: set[str] = {line.tensor for line in group if TENSOR_NAME.fullmatch(line.tensor)}
        for line in group:
            if TENSOR_NAME.fullmatch(line.tensor):
                names[id(line)] = line.tensor
                continue
            name = re.sub(r"[^A-Za-z0-9_./:-]", "_", line.tensor)[:100] or "_"
            name = name if TENSOR_NAME.fullmatch(name) else f"_{name}"
            names[id(line)] = name = _unused(name, taken)
            taken.add(name)
    return names


def _unused(name: str, taken: Iterable[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _graph_names(model: onnx.ModelProto, proposal: Proposal, names: dict[int, str]) -> list[str]:
    """Of each line in the new graph: the schema's, unless a graph within it has a tensor of that name."""
    inside: set[str] = set()
    for one in list(graphs(model.graph))[1:]:
        inside |= names_in(one)
    taken = set(inside)
    found = []
    for line in proposal.lines:
        name = _unused(names[id(line)], taken)
        taken.add(name)
        found.append(name)
    return found


def _spec(line: Line, name: str, proposal: Proposal) -> TensorSpec:
    if not line.is_state:
        return TensorSpec(name, line.dtype, line.shape)
    initial = line.initial if isinstance(line.initial, float) else 0.0
    return TensorSpec(name, line.dtype, line.shape, line.role, initial, _shared(line, proposal))


def _shared(line: Line, proposal: Proposal) -> bool:
    return line.is_state and line.axis is None and not proposal.static


@dataclass
class _Writer:
    model: onnx.ModelProto
    proposal: Proposal
    named: dict[int, str]  # of lines, in the new graph
    before: list[NodeProto] = field(default_factory=list)
    after: list[NodeProto] = field(default_factory=list)

    def write(self) -> None:
        graph = self.model.graph
        self.opset = next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        self.used = names_in(graph) | set(self.named.values())
        lines = self.proposal.lines
        windows = {line.of: line for line in lines if line.of}
        renamed: dict[str, str] = {}
        for line in lines:
            if line.in_graph:
                renamed[line.tensor] = self._input(line, windows.get(line.tensor))
        made = {value.name for value in graph.output} - set(renamed) - {tensor.name for tensor in graph.initializer}
        targets = self._targets()
        for output, wanted in targets.items():
            if output in renamed:
                continue  # an input that is given back
            if output not in made:
                renamed[output] = self._fresh(f"{output}.weight")
                continue
            direct = len(wanted) == 1 and wanted[0][1] is None
            renamed[output] = wanted[0][0] if direct else self._fresh(f"{output}.graph")
        # Names of ours that the file has for something else.
        ours = set(self.named.values()) | {name for wanted in targets.values() for name, _ in wanted}
        for name in names_in(graph) & ours - renamed.keys():
            renamed[name] = self._fresh(name)
        for output, wanted in targets.items():
            source = renamed.get(output, output)
            for target, change in wanted:
                if source != target:
                    self._give(source, target, change)
        self._feedbacks(renamed)
        rename(graph, renamed)
        nodes = [*self.before, *graph.node, *self.after]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        self._declare(renamed)

    def _input(self, line: Line, window: Line | None) -> str:
        """The inner name of an input, with the nodes that make it of the new graph's input."""
        name = self.named[id(line)]
        if window is not None:
            joined = self._fresh(f"{name}.joined")
            kept = self.named[id(window)]
            axis = len(line.shape)
            self.before.append(helper.make_node("Concat", [kept, name], [joined], axis=axis))
            self._last(joined, self._next(window), axis, window.context)
            name = joined
        change = self._arranged(line)
        if change is None:
            return name
        inner = self._fresh(f"{name}.graph")
        self.before.append(self._changed(name, inner, change))
        return inner

    def _arranged(self, line: Line) -> Change | None:
        """From batch first to where the graph has the batch; None: it is there."""
        if self.proposal.static:
            return None if line.axis == 0 else ("Reshape", list(line.full))
        if line.axis in (0, None):
            return None
        axis = line.axis or 0
        return "Transpose", [0 if n == axis else n + 1 if n < axis else n for n in range(len(line.full))]

    def _targets(self) -> dict[str, list[tuple[str, Change | None]]]:
        """By output of the file: what it becomes in the new graph, and how (None: as it is)."""
        targets: dict[str, list[tuple[str, Change | None]]] = {}
        for line in self.proposal.of_role("output"):
            targets.setdefault(line.tensor, []).append((self.named[id(line)], self._how(line.tensor)))
        for line in self.proposal.of_role("recurrent", "counter"):
            targets.setdefault(line.output, []).append((self._next(line), self._how(line.output)))
        return targets

    def _next(self, line: Line) -> str:
        name = self.named.get(-id(line))
        if name is None:
            name = self.named[-id(line)] = self._fresh(f"next_{self.named[id(line)]}", ours=True)
        return name

    def _how(self, output: str) -> Change | None:
        axis, shape = self.proposal.taken[output]
        if axis == 0 or (axis is None and not self.proposal.static):
            return None
        if self.proposal.static:
            return "Reshape", [1, *(size for place, size in enumerate(shape) if place != axis)]
        assert axis is not None
        return "Transpose", [axis, *(place for place in range(len(shape)) if place != axis)]

    def _give(self, source: str, target: str, change: Change | None) -> None:
        if change is None:
            self.after.append(helper.make_node("Identity", [source], [target]))
        else:
            self.after.append(self._changed(source, target, change))

    def _changed(self, source: str, target: str, change: Change) -> NodeProto:
        kind, numbers = change
        if kind == "Reshape":
            return self._reshape(source, target, numbers)
        return helper.make_node("Transpose", [source], [target], perm=numbers)

    def _feedbacks(self, renamed: dict[str, str]) -> None:
        """Windows of past outputs: the last numbers of what was kept and what the step gives."""
        for line in self.proposal.of_role("window"):
            if line.of:
                continue
            axis, full = self.proposal.taken[line.output]
            row = tuple(size for place, size in enumerate(full) if place != axis)
            if len(row) + 1 == len(line.shape):
                row = (*row, 1)
            if row[:-1] != line.shape[:-1] or not row:
                raise ImportRefusedError(
                    f"--context {line.tensor}={line.output}:{line.context}: {shown(line.output)} gives "
                    f"{'x'.join(map(str, row)) or 'one number'}, "
                    f"which does not go into {'x'.join(map(str, line.shape))}"
                )
            source = renamed.get(line.output, line.output)
            if (how := self._how(line.output)) is not None:
                given = self._fresh(f"{line.output}.first")
                self._give(source, given, how)
                source = given
            rows = self._fresh(f"{line.output}.rows")
            self.after.append(self._reshape(source, rows, (1 if self.proposal.static else -1, *row)))
            joined = self._fresh(f"{line.tensor}.joined")
            self.after.append(helper.make_node("Concat", [self.named[id(line)], rows], [joined], axis=len(row)))
            self._last(joined, self._next(line), len(row), line.context)

    def _last(self, source: str, target: str, axis: int, size: int) -> None:
        """The last `size` numbers along an axis."""
        if self.opset < 10:
            node = helper.make_node("Slice", [source], [target], starts=[-size], ends=[_END], axes=[axis])
        else:
            numbers = [
                self._constant(f"{target}.{word}", [value])
                for word, value in (("start", -size), ("end", _END), ("axis", axis))
            ]
            node = helper.make_node("Slice", [source, *numbers], [target])
        self.after.append(node)

    def _reshape(self, source: str, target: str, shape: Sequence[int]) -> NodeProto:
        return helper.make_node("Reshape", [source, self._constant(f"{target}.shape", shape)], [target])

    def _constant(self, name: str, numbers: Sequence[int]) -> str:
        name = self._fresh(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def _fresh(self, name: str, ours: bool = False) -> str:
        """A name that nothing has; or with `ours`, that no graph within has, for what is in the way is renamed."""
        found = _unused(name, self.named.values() if ours else self.used)
        self.used.add(found)
        return found

    def _declare(self, renamed: dict[str, str]) -> None:
        """The new graph's inputs and outputs, in the schema's order."""
        graph = self.model.graph
        proposal = self.proposal
        first = 1 if proposal.static else BATCH
        states = proposal.states
        del graph.input[:]
        del graph.output[:]
        for line in [*proposal.of_role("input"), *states]:
            graph.input.append(self._value(self.named[id(line)], line, first))
        for line in proposal.of_role("output"):
            graph.output.append(self._value(self.named[id(line)], line, first))
        for line in states:
            if line.role != "constant":
                graph.output.append(self._value(self._next(line), line, first))

    def _value(self, name: str, line: Line, first: int | str) -> onnx.ValueInfoProto:
        shape: list[int | str] = [*line.shape] if _shared(line, self.proposal) else [first, *line.shape]
        if self.proposal.open:
            shape = self._opened(name, line, shape)
        return helper.make_tensor_value_info(name, _TYPES.get(line.dtype, TensorProto.FLOAT), shape)

    def _opened(self, name: str, line: Line, shape: list[int | str]) -> list[int | str]:
        """Without the sizes that the file does not say either."""
        dims = [dim for place, dim in enumerate(line.dims or ()) if place != line.axis]
        if line.of:
            return shape
        if line.role == "output":
            return [*shape[:1], *(f"{name}_{place}" for place in range(1, len(shape)))] if shape else []
        start = len(shape) - len(dims)
        return [
            f"{name}_{place}" if place >= start and isinstance(dims[place - start], str) else size
            for place, size in enumerate(shape)
        ]
