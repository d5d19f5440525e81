"""A user's own data: sequences of numbers from a CSV or NPZ file. Read by the tasks "forecast" and "classify"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from engram_models.training.csv_rows import Row, read_rows
from engram_models.training.errors import TrainingError
from engram_models.training.times import fault

Array = NDArray[np.float64]
_DATA = Path(__file__).parents[1] / "data"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_MISSING = re.compile(r"[+-]?(nan|inf|infinity)|n/?a|#n/a|null|none|nil|missing|[?.-]+", re.IGNORECASE)
_SEPARATED = re.compile(r"[+-]?\d[\d.,' \u00a0\u2009\u202f_]*", re.ASCII)
_UNNAMED = re.compile(r"|Unnamed: \d+")  # the second is what pandas calls the first
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Sequences, in the order in which the file first names them."""

    path: Path
    names: tuple[str, ...]  # of the columns
    values: tuple[Array, ...]  # float64 [time, columns] each, finite
    ids: tuple[str, ...]
    labels: tuple[str, ...]  # of the sequences; empty where none were asked for
    times: tuple[tuple[str, ...], ...]  # of the rows, likewise


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a CSV file are what. `values` empty: all others. `sequence` empty: the rows are one sequence."""

    values: tuple[str, ...] = ()
    sequence: str = ""
    label: str = ""
    time: str = ""


def located(file: str, directory: Path) -> Path:
    """The path of a recipe's `file`: relative to the recipe's directory, or the name of data that come with the package."""
    path, shipped = directory / file, _DATA / f"{file}.csv"
    return shipped if file == shipped.stem and shipped.exists() and not path.exists() else path


def read_csv(path: Path, columns: Columns) -> Table:
    """The first row names the columns. Raises TrainingError with line and column."""
    names, rows = read_rows(path)
    _header(path, names, columns)
    special = [name for name in (columns.sequence, columns.label, columns.time) if name]
    chosen = columns.values or tuple(name for name in names if name not in special)
    for name in (*chosen, *special):
        if name not in names:
            raise TrainingError(f"{path}: there is no column {name!r}; there are: {', '.join(names)}")
    if not chosen or not rows:
        raise TrainingError(f"{path}: there are no {'columns of numbers' if rows else 'rows under the header'}")
    groups = _groups(path, rows, columns.sequence, names)
    places = [(name, names.index(name)) for name in chosen]
    values = tuple(
        np.array([[_number(path, line, name, cells[at]) for name, at in places] for line, cells in group])
        for group in groups.values()
    )
    for at, name in enumerate(chosen if not columns.values else ()):
        _refuse_index(path, name, (sequence[:, at] for sequence in values))
    labels = tuple(
        _label(path, group, columns.label, names.index(columns.label)) for group in groups.values() if columns.label
    )
    times = tuple(
        _times(path, group, columns.time, names.index(columns.time)) for group in groups.values() if columns.time
    )
    return Table(path, tuple(chosen), values, tuple(groups), labels, times)


def read_npz(path: Path, labelled: bool) -> Table:
    """`X` [n, time, columns]; without labels also [time, columns] or [time], with them `y` [n] and also X [n, time].

    Columns are named "0", "1", ... Raises TrainingError.
    """
    arrays = _arrays(path, ("X", "y") if labelled else ("X",))
    X = _three_axes(path, arrays["X"], labelled)
    bad = ~(np.abs(X) <= _LARGEST)
    if bad.any():
        place = [int(at) for at in np.argwhere(bad)[0]]
        what = "models compute in float32" if np.isfinite(X[tuple(place)]) else "fill or remove what is missing"
        raise TrainingError(
            f"{path}: X has {X[tuple(place)]} in sequence {place[0]}, row {place[1]}, column {place[2]} (counted from 0); {what}"
        )
    labels = _npz_labels(path, arrays["y"], len(X)) if labelled else ()
    names = tuple(str(number) for number in range(X.shape[2]))
    return Table(path, names, tuple(X), tuple(str(number) for number in range(len(X))), labels, ())


def _header(path: Path, names: list[str], columns: Columns) -> None:
    if all(_NUMBER.fullmatch(name) for name in names):
        raise TrainingError(f"{path}: the first row must name the columns; it holds numbers: {', '.join(names)}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise TrainingError(f"{path}: the header names the column {twice[0]!r} twice")
    if twice := [name for name in columns.values if columns.values.count(name) > 1]:
        raise TrainingError(f"{path}: `columns` names {twice[0]!r} twice")
    for number, name in enumerate(names, 1):
        if not columns.values and _UNNAMED.fullmatch(name):
            shown = f" ({name!r})" if name else ""
            raise TrainingError(
                f"{path}: column {number} of the header has no name{shown}; an index is no data: remove it, or let `columns` name "
                "those that are to be used"
            )


def _refuse_index(path: Path, name: str, values: Iterable[Array]) -> None:
    """A column that is called an index and counts the rows would be learnt as if it were data."""
    column = np.concatenate(list(values))
    if name.lower() == "index" and len(column) > 2 and column[0] in (0, 1) and (np.diff(column) == 1).all():
        raise TrainingError(
            f"{path}: column {name!r} counts the rows; remove it, name it as `time`, or let `columns` name those to be used"
        )


def _groups(path: Path, rows: Iterable[Row], name: str, names: Sequence[str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    at = names.index(name) if name else -1
    for row in rows:
        key = row.cells[at].strip() if name else ""
        if name and not key:
            raise TrainingError(f"{path}: line {row.line}, column {name!r} is empty; every row needs its sequence")
        groups.setdefault(key, []).append(row)
    return groups


def _number(path: Path, line: int, name: str, text: str) -> float:
    text = text.strip()
    where = f"{path}: line {line}, column {name!r}"
    if _NUMBER.fullmatch(text):
        if abs(number := float(text)) <= _LARGEST:
            return number
        raise TrainingError(f"{where} is {text}, beyond the range of float32, in which models compute")
    if not text:
        raise TrainingError(f"{where} is empty; fill or remove what is missing")
    if _MISSING.fullmatch(text):
        raise TrainingError(f"{where} is {text}; fill or remove what is missing")
    if _SEPARATED.fullmatch(text):
        raise TrainingError(
            f"{where}: {text!r} is not a number; write a point before decimals, and thousands without marks"
        )
    raise TrainingError(f"{where}: {text!r} is not a number; `columns` may name those that are to be used")


def _label(path: Path, group: Sequence[Row], name: str, at: int) -> str:
    first = group[0][1][at].strip()
    for line, cells in group:
        if cells[at].strip() != first or not first:
            found = f"{cells[at].strip()!r} after {first!r}" if first else "no label"
            raise TrainingError(f"{path}: line {line}, column {name!r}: {found}; a sequence has one label")
    return first


def _times(path: Path, group: Sequence[Row], name: str, at: int) -> tuple[str, ...]:
    """As they stand; they must rise."""
    times = tuple(row.cells[at].strip() for row in group)
    if "" in times:
        raise TrainingError(
            f"{path}: line {group[times.index('')].line}, column {name!r} is empty; every row needs its time"
        )
    if found := fault(times):
        raise TrainingError(f"{path}: line {group[found[0]].line}, column {name!r}: {found[1]}")
    return times


def _arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    if path.exists() and not path.is_file():
        raise TrainingError(f"{path}: not a regular file")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in names if name not in file]:
                raise TrainingError(f"{path}: there is no array {missing[0]!r}; there are: {', '.join(file)}")
            return {name: file[name] for name in names}
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from error
    except (ValueError, BadZipFile, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not an NPZ file of plain arrays: {error}") from error


def _npz_labels(path: Path, y: NDArray[Any], count: int) -> tuple[str, ...]:
    if y.shape != (count,):
        raise TrainingError(f"{path}: y is {list(y.shape)}, one label for each of {count} sequences is needed")
    labels = tuple(str(label) for label in (np.char.decode(y) if y.dtype.kind == "S" else y))
    for number, label in enumerate(labels):
        if not label.strip() or label.lower() in ("nan", "nat"):
            raise TrainingError(f"{path}: y has no label for sequence {number} (counted from 0), but {label!r}")
    return labels


def _three_axes(path: Path, X: NDArray[Any], labelled: bool) -> Array:
    if X.ndim not in ((2, 3) if labelled else (1, 2, 3)) or not (
        np.issubdtype(X.dtype, np.number) and X.dtype.kind != "c"
    ):
        raise TrainingError(f"{path}: X is {X.dtype} {list(X.shape)}; numbers of shape [n, time, columns] are needed")
    if not X.size:
        raise TrainingError(f"{path}: X is empty, {list(X.shape)}")
    if X.ndim < 3:
        X = X[:, :, None] if labelled else X.reshape(1, len(X), -1)
    return np.asarray(X, np.float64)
