"""What is tried of a graph in normal form before it is served: whether a row is the same in every company. Runs in the sandbox.

Every row is taken through a few steps alone. Then rows meet in batches of several sizes and orders, each at a step of its own,
and must give what they gave alone. Then one row is poisoned, and the others must not notice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
from engram_models.importing.calls import RunFailedError, checked_call, initial_rows, loaded
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.numbers import LEVELS, POISONS, Array, as_floats, difference, drawn, poisoned, tolerance
from engram_models.importing.sandbox import report
from engram_models.spec import Schema, TensorSpec

STEPS = CHECK_STEPS + 1  # the recorded vector starts from a state that is not the initial one
SIZES = (1, 2, 3, 4, 8, 16, 17, 32)  # floors of the probe, and what is none
_SECONDS = 10.0  # of a model's single steps: larger batches are left out where they would take longer
_STATE_BYTES_MAX = 1 << 29
_DRAWS = 3
_QUANTISING = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")


class Dependent(Exception):
    """Rows depend on each other: why, in words."""


@dataclass
class Findings:
    """What the trials have shown so far."""

    largest: float = 0.0
    calls: int = 0
    rows: int = 0
    sizes: list[int] = field(default_factory=list)
    finite: bool = True
    notes: list[str] = field(default_factory=list)


class Trials:
    """Rows of one graph, what they gave alone, and the trials of what they give together."""

    def __init__(
        self, graph: bytes, schema: Schema, initial: Mapping[str, Array], examples: Mapping[str, Array]
    ) -> None:
        """Raises ImportRefusedError where ONNX Runtime does not take the graph, or it does not run even alone."""
        self._graph, self._step = graph, loaded(graph, schema)
        self._schema, self._examples = schema, examples
        self._initial = [initial_rows(spec, initial, 1) for spec in schema.state]
        self._quantising = next((op for op in _QUANTISING if op.encode() in graph), "")
        self._generator = np.random.default_rng(18)
        self._outcomes: tuple[TensorSpec, ...] = (*schema.outputs, *schema.state)
        self.findings = Findings()
        self._level, seconds = self._runnable_level()
        in_time = int(_SECONDS / STEPS / max(seconds, 1e-9))
        in_memory = _STATE_BYTES_MAX // (STEPS + 1) // (schema.state_nbytes + 1)
        self.findings.rows = max(min(SIZES[-1], in_time, in_memory), CHECK_ROWS)
        self.inputs = [self._drawn(self.findings.rows, step) for step in range(STEPS)]
        self.states, self.outputs = self._alone()

    def run_alone(self) -> None:
        """Order of calls, numbers, whether states move. Raises ImportRefusedError where calls are not the same twice."""
        report("each row alone, again in another order")
        self._check_order()
        self._look_at_numbers()

    def run_together(self) -> None:
        """Batches of all sizes, mixed orders, poison. Raises Dependent."""
        for name, value in POISONS.items():
            report(f"a row of {name} beside others")
            self._poison(name, value)
        sizes = [size for size in SIZES if size <= self.findings.rows]
        for size in sizes:
            report(f"batches of {size} against each row alone")
            for draw in range(_DRAWS):
                self._compare(size, draw)
            self.findings.sizes.append(size)

    def recorded(self, alone: bool) -> CheckVector:
        """A run of a few rows from their states after the first step, as a bundle is checked: in one batch, or row by row."""
        step = loaded(self._graph, self._schema, one_by_one=True) if alone else self._step
        inputs = [
            np.stack([x[place][:CHECK_ROWS] for x in self.inputs[1:]]) for place in range(len(self._schema.inputs))
        ]
        return CheckVector.record(self._schema, step, inputs, [array[:CHECK_ROWS] for array in self.states[1]])

    def _runnable_level(self) -> tuple[int, float]:
        """Integers may be tokens, lengths or indices: the largest made-up ones with which the graph runs; and a step's seconds."""
        why = ""
        for level in LEVELS:
            self._level = level
            try:
                states: Sequence[Array] = self._initial
                started = time.perf_counter()
                for step in range(STEPS):
                    _, states = self._call(self._drawn(1, step), states)
                return level, (time.perf_counter() - started) / STEPS
            except RunFailedError as error:
                why = str(error)
        raise ImportRefusedError(
            f"the model does not run on inputs made up for it: {why}; give inputs of a real run with --verify, or look at "
            "--constant, --batch-axis and --initial"
        )

    def _drawn(self, rows: int, step: int) -> list[Array]:
        return drawn(self._schema.inputs, rows, self._level, self._generator, self._examples, step)

    def _alone(self) -> tuple[list[list[Array]], list[list[Array]]]:
        """States before each step and after the last, and outputs of each step: [rows, *shape] each."""
        rows = range(self.findings.rows)
        states = [[np.repeat(one, len(rows), 0) for one in self._initial]]
        outputs: list[list[Array]] = []
        for step in range(STEPS):
            report(f"{len(rows)} rows alone, step {step + 1} of {STEPS}")
            found = [self._one(step, row, states[step]) for row in rows]
            wholes = [np.concatenate(several) for several in zip(*found, strict=True)]
            outputs.append(wholes[: len(self._schema.outputs)])
            states.append(wholes[len(self._schema.outputs) :])
        return states, outputs

    def _one(self, step: int, row: int, states: Sequence[Array]) -> list[Array]:
        place = slice(row, row + 1)
        outputs, after = self._call([x[place] for x in self.inputs[step]], [s[place] for s in states])
        return [*outputs, *after]

    def _call(self, inputs: Sequence[Array], states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Raises RunFailedError also where a tensor is not [rows, *shape]."""
        self.findings.calls += 1
        return checked_call(self._step, self._schema, inputs, states)

    def _check_order(self) -> None:
        for step in reversed(range(STEPS)):
            for row in reversed(range(min(self.findings.rows, CHECK_ROWS))):
                again = self._one(step, row, self.states[step])
                for spec, got, wanted in zip(self._outcomes, again, self._expected(step, [row]), strict=True):
                    apart = difference(got, wanted, spec)
                    self.findings.largest = max(self.findings.largest, apart)
                    if apart > tolerance(spec):
                        raise ImportRefusedError(
                            f"{shown(spec.name)} differs by {apart:.2g} when the model is called again with the same inputs and "
                            "states; it is random (a Random or Dropout operator?), or keeps something that is no state"
                        )

    def _look_at_numbers(self) -> None:
        for spec, arrays in zip(self._outcomes, zip(*map(self._everything, range(STEPS)), strict=True), strict=True):
            if spec.is_float and not all(np.isfinite(as_floats(array, spec)).all() for array in arrays):
                self.findings.finite = False
                self.findings.notes.append(f"{shown(spec.name)} is not finite on ordinary inputs")
        for spec, before, after in zip(
            self._schema.state, self.states[0], zip(*self.states[1:], strict=True), strict=True
        ):
            if spec.role != "constant" and all(not difference(one, before, spec) for one in after):
                self.findings.notes.append(
                    f"state {shown(spec.name)} did not change in {STEPS} steps: is it a constant?"
                )

    def _everything(self, step: int) -> list[Array]:
        return [*self.outputs[step], *self.states[step + 1]]

    def _expected(self, step: int, rows: Sequence[int]) -> list[Array]:
        return [array[list(rows)] for array in self._everything(step)]

    def _compare(self, size: int, draw: int) -> None:
        """Rows in random order, each at a step of its own where no shared tensor says that they go in step."""
        rows = self._generator.permutation(self.findings.rows)[:size]
        common = bool(self._schema.shared)
        steps = np.full(size, draw % STEPS) if common else self._generator.integers(0, STEPS, size)
        pairs = list(zip(steps, rows, strict=True))
        inputs = [np.stack([self.inputs[s][place][r] for s, r in pairs]) for place in range(len(self._schema.inputs))]
        states = [np.stack([self.states[s][place][r] for s, r in pairs]) for place in range(len(self._schema.state))]
        got = self._together(inputs, states)
        for place, (spec, array) in enumerate(zip(self._outcomes, got, strict=True)):
            wanted = np.stack([self._everything(s)[place][r] for s, r in pairs])
            apart = difference(array, wanted, spec)
            if apart > tolerance(spec):
                how = f"differs by {apart:.2g} from" if np.isfinite(apart) else "is not"
                raise Dependent(
                    f"{shown(spec.name)} of a row in a batch of {size} {how} what the row gives alone{self._hint()}"
                )
            self.findings.largest = max(self.findings.largest, apart)

    def _together(self, inputs: Sequence[Array], states: Sequence[Array]) -> list[Array]:
        try:
            outputs, after = self._call(inputs, states)
        except RunFailedError as error:
            raise Dependent(f"the graph does not run with {len(inputs[0])} rows: {error}") from None
        return [*outputs, *after]

    def _poison(self, name: str, value: float) -> None:
        specs = (*self._schema.inputs, *self._schema.state)
        given = [array[:3] for array in (*self.inputs[1], *self.states[1])]
        places = [
            place for place, spec in enumerate(specs)
            if spec.is_float and spec.role != "constant" and not spec.shared and spec.size
        ]  # fmt: skip
        wanted = self._halves(given)
        if not places or not (leak := self._leak(given, wanted, specs, places, value)):
            return
        alone = ((specs[place], self._leak(given, wanted, specs, [place], value)) for place in places)
        source, leak = next(((spec, found) for spec, found in alone if found), (specs[places[0]], leak))
        target, apart = leak
        how = f"changes by {apart:.2g}" if np.isfinite(apart) else "changes"
        raise Dependent(
            f"{shown(target.name)} of one row {how} when {shown(source.name)} of another is {name}{self._hint()}"
        )

    def _halves(self, given: Sequence[Array]) -> list[Array]:
        count = len(self._schema.inputs)
        return self._together(given[:count], given[count:])

    def _leak(
        self,
        given: Sequence[Array],
        wanted: Sequence[Array],
        specs: Sequence[TensorSpec],
        places: Sequence[int],
        value: float,
    ) -> tuple[TensorSpec, float] | None:
        """The tensor of another row that changes most when the second row's tensors at `places` are `value`, and by how much."""
        bad = [poisoned(array, specs[place], value) if place in places else array for place, array in enumerate(given)]
        worst = None
        for spec, got, want in zip(self._outcomes, self._halves(bad), wanted, strict=True):
            apart = difference(got[::2], want[::2], spec)
            if apart > tolerance(spec) and (worst is None or apart > worst[1]):
                worst = spec, apart
            elif apart <= tolerance(spec):
                self.findings.largest = max(self.findings.largest, apart)
        return worst

    def _hint(self) -> str:
        return f" ({self._quantising} takes its scale from the whole batch)" if self._quantising else ""
