"""Lines of text as inputs of a model, and outputs as lines. `engram stream` reads stdin and prints through this.

    {"obs": [1, 2], "gap": 0.1}     JSON, by name; where the model has one input, it may have any name, or stand alone: [1, 2]
    obs.0,obs.1,gap                 the first line of CSV may name the columns, in any order; a scalar has its input's name
    1,2,0.1                         bare rows have all numbers as the model declares them

A line that does not fit is refused with a TextError or ValueError that says where.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engram._commands.text import TextError, cells_of, is_word, row_of
from engram._commands.values import flat, json_value, tensor_of
from engram._json import json_text

if TYPE_CHECKING:
    from engram import TensorSpec

_NAMED = 6  # columns in a message

JSON = "json"  # the form of a line; of another it is what stands between its numbers


class Rows:
    """Reads lines for a model's inputs. Remembers the columns that the first line names."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self._size = sum(spec.size for spec in specs)
        self._names = list(itertools.chain.from_iterable(map(_columns, specs)))
        self._order: list[int] | None = None  # of each number of a row: its column, from 0
        self._begun = False

    def read(self, text: str) -> tuple[Any, str] | None:
        """A line's input, an array or a dict of them, and its form; None for a line of names."""
        begun, self._begun = self._begun, True
        text = text.strip(" ")
        if text[0] in "[{":
            return self._of_json(json_value(text)), JSON
        form = "\t" if "\t" in text else ","
        try:
            values = row_of(text)
        except TextError:
            cells = [cell.strip("\"'") for cell in cells_of(text)]
            if begun or not (is_word(cells[0]) or set(cells) & set(self._names)):
                raise
            self._order = self._named(cells)
            return None
        columns = list(range(self._size)) if self._order is None else self._order
        self._check(len(values))
        return self._packed([values[column] for column in columns], columns), form

    def _of_json(self, value: Any) -> Any:
        if isinstance(value, dict):
            names = [spec.name for spec in self._specs]
            if len(names) > 1:
                return self._by_name(value, names)
            value = _only(value, names[0])
        values = flat(value)
        self._check(len(values))
        return self._packed(values, range(len(values)))

    def _by_name(self, value: dict[str, Any], names: list[str]) -> Any:
        missing = [name for name in names if name not in value]
        unknown = [name for name in value if name not in names]
        if missing or unknown:
            what = f"no {_shown(missing)}" if missing else f"{_shown(unknown)} is no input"
            raise ValueError(f"{what}; the model takes {_shown(names)}")
        given: dict[str, Any] = {}
        for spec in self._specs:
            try:
                values = flat(value[spec.name])
                if len(values) != spec.size:
                    raise ValueError(f"{len(values)} values, but the model takes {spec.size} ({spec})")
                given[spec.name] = tensor_of(values, spec, range(spec.size))
            except TextError as error:
                raise TextError(f"{json_text(spec.name)}, {error}") from error
            except ValueError as error:
                raise ValueError(f"{json_text(spec.name)}: {error}") from error
        return given

    def _packed(self, values: Sequence[float | int], columns: Sequence[int]) -> Any:
        given: dict[str, Any] = {}
        start = 0
        for spec in self._specs:
            stop = start + spec.size
            given[spec.name] = tensor_of(values[start:stop], spec, columns[start:stop])
            start = stop
        return given if len(self._specs) > 1 else given[self._specs[0].name]

    def _named(self, cells: list[str]) -> list[int]:
        """Which column has each number of a row. Raises TextError."""
        places = {name: place for place, name in enumerate(self._names)}
        start = 0
        for spec in self._specs:
            if spec.size == 1:
                places[spec.name] = start
            start += spec.size
        order: dict[int, int] = {}
        for column, cell in enumerate(cells):
            if cell not in places:
                raise TextError(
                    f"column {column + 1}: {cell[:40]!r} is no input of the model; it takes {_shown(self._names)}"
                )
            if places[cell] in order:
                raise TextError(f"column {column + 1}: {cell[:40]!r} is there twice")
            order[places[cell]] = column
        missing = [name for place, name in enumerate(self._names) if place not in order]
        if missing:
            raise ValueError(f"no column {_shown(missing)}")
        return [order[place] for place in range(self._size)]

    def _check(self, count: int) -> None:
        if count != self._size:
            inputs = ", ".join(f"{spec.name} {spec}" for spec in self._specs)
            what = inputs if len(self._specs) > 1 else str(self._specs[0])
            raise ValueError(f"{count} values, but the model takes {self._size} ({what})")


def line_of(output: Any, form: str, seq: int | None = None, time: float | None = None) -> str:
    """An output as a line in the form of its input; JSON where it is a dict. seq, time: said before it."""
    several = isinstance(output, dict)
    if form != JSON and not several and seq is None:
        if output.dtype.kind == "b":
            output = output.astype("uint8")
        # The shortest text that reads back as the same number.
        values = [str(value) for value in output.reshape(-1)]
        return form.join(values if time is None else [f"{time:.3f}", *values]) + "\n"
    plain = {name: value.tolist() for name, value in output.items()} if several else output.tolist()
    marks = {} if seq is None else {"seq": seq}
    if time is not None:
        marks["time"] = round(time, 6)  # type: ignore[assignment]
    return json_text({**marks, "output": plain} if marks else plain) + "\n"


def _columns(spec: TensorSpec) -> list[str]:
    if not spec.shape:
        return [spec.name]
    return [".".join([spec.name, *map(str, index)]) for index in itertools.product(*map(range, spec.shape))]


def _only(value: dict[str, Any], name: str) -> Any:
    """The one input of an object."""
    if len(value) == 1:
        return next(iter(value.values()))
    for key in (name, "x", "input", "inputs"):
        if key in value:
            return value[key]
    raise ValueError(f'an object needs the key {json_text(name)}, "x" or "input"')


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
