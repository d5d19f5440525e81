"""A user's own data: sequences of numbers from a CSV or NPZ file. Read by the tasks "forecast" and "classify"."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from engram_models.training.experiment import TrainingError

Array = NDArray[np.float64]
_DATA = Path(__file__).parents[1] / "data"
_ROWS_MAX = 10_000_000


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


_Row = tuple[int, list[str]]  # its line in the file, its cells


def located(file: str, directory: Path) -> Path:
    """The path of a recipe's `file`: relative to the recipe's directory, or the name of data that come with the package."""
    path, shipped = directory / file, _DATA / f"{file}.csv"
    return shipped if file == shipped.stem and shipped.exists() and not path.exists() else path


def read_csv(path: Path, columns: Columns) -> Table:
    """The first row names the columns; lines that begin with # are left out. Raises TrainingError with line and column."""
    names, rows = _cells(path)
    special = [name for name in (columns.sequence, columns.label, columns.time) if name]
    chosen = columns.values or tuple(name for name in names if name not in special)
    for name in (*chosen, *special):
        if name not in names:
            raise TrainingError(f"{path}: there is no column {name!r}; there are: {', '.join(names)}")
    if not chosen or not rows:
        raise TrainingError(f"{path}: there are no {'columns of numbers' if rows else 'rows under the header'}")
    groups = _groups(rows, names.index(columns.sequence) if columns.sequence else None)
    places = [(name, names.index(name)) for name in chosen]
    values = tuple(
        np.array([[_number(path, line, name, cells[at]) for name, at in places] for line, cells in group])
        for group in groups.values()
    )
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
    if not np.isfinite(X).all():
        place = [int(at) for at in np.argwhere(~np.isfinite(X))[0]]
        raise TrainingError(
            f"{path}: X has {X[tuple(place)]} in sequence {place[0]}, row {place[1]}, column {place[2]} (counted from 0); "
            "fill or remove what is missing"
        )
    labels = tuple(str(label) for label in arrays["y"]) if labelled else ()
    if labelled and (arrays["y"].ndim != 1 or len(labels) != len(X)):
        raise TrainingError(
            f"{path}: y is {list(arrays['y'].shape)}, one label for each of {len(X)} sequences is needed"
        )
    names = tuple(str(number) for number in range(X.shape[2]))
    return Table(path, names, tuple(X), tuple(str(number) for number in range(len(X))), labels, ())


def _cells(path: Path) -> tuple[list[str], list[_Row]]:
    """The header and the rows below it, each as long as the header."""
    names: list[str] = []
    rows: list[_Row] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if not any(cells) or cells[0].startswith("#"):
                    continue
                if not names:
                    names = _header(path, [cell.strip() for cell in cells])
                    continue
                if len(cells) != len(names):
                    raise TrainingError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells, the header names {len(names)}"
                    )
                rows.append((reader.line_num, cells))
                if len(rows) > _ROWS_MAX:
                    raise TrainingError(f"{path}: more than {_ROWS_MAX:,} rows")
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"{path}: not CSV in UTF-8: {error}") from error
    if not names:
        raise TrainingError(f"{path}: the file is empty; its first row must name the columns")
    return names, rows


def _header(path: Path, names: list[str]) -> list[str]:
    if all(_is_number(name) for name in names):
        raise TrainingError(f"{path}: the first row must name the columns; it holds numbers: {', '.join(names)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise TrainingError(f"{path}: the header names the column {twice[0]!r} twice")
    return names


def _groups(rows: Iterable[_Row], at: int | None) -> dict[str, list[_Row]]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault("" if at is None else row[1][at].strip(), []).append(row)
    return groups


def _number(path: Path, line: int, name: str, text: str) -> float:
    where = f"{path}: line {line}, column {name!r}"
    if not text.strip():
        raise TrainingError(f"{where} is empty; fill or remove what is missing")
    if not _is_number(text):
        raise TrainingError(f"{where}: {text!r} is not a number; `columns` may name those that are to be used")
    number = float(text)
    if not math.isfinite(number):
        raise TrainingError(f"{where} is {text.strip()}; fill or remove what is missing")
    return number


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # which Python takes for a part of a number


def _label(path: Path, group: Sequence[_Row], name: str, at: int) -> str:
    first = group[0][1][at].strip()
    for line, cells in group:
        if cells[at].strip() != first or not first:
            found = f"{cells[at].strip()!r} after {first!r}" if first else "no label"
            raise TrainingError(f"{path}: line {line}, column {name!r}: {found}; a sequence has one label")
    return first


def _times(path: Path, group: Sequence[_Row], name: str, at: int) -> tuple[str, ...]:
    """As they stand; they must rise, as numbers if they all are, else as text (dates like 1984-03-01)."""
    times = [cells[at].strip() for _, cells in group]
    order: Sequence[Any] = [float(time) for time in times] if all(map(_is_number, times)) else times
    for number in range(1, len(order)):
        if not order[number - 1] < order[number]:
            raise TrainingError(
                f"{path}: line {group[number][0]}, column {name!r}: {times[number]} after {times[number - 1]}; rows must be in "
                "the order of time, and a file of several sequences needs a `sequence` column"
            )
    return tuple(times)


def _arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in names if name not in file]:
                raise TrainingError(f"{path}: there is no array {missing[0]!r}; there are: {', '.join(file)}")
            return {name: file[name] for name in names}
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from error
    except (ValueError, BadZipFile, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not an NPZ file of plain arrays: {error}") from error


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
