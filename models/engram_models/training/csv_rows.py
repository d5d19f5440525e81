"""The rows of a CSV file as cells, each with its line; what other programs write, or an error that names the line. For tables.py.

Commas, semicolons or tabs separate the cells, as the header has them. A row is one line: a quote that is left open would
otherwise swallow the rows behind it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engram_models.training.errors import TrainingError

ROWS_MAX = 10_000_000
_SEPARATORS = ",\t;"


class Row(NamedTuple):
    """One row below the header."""

    line: int  # in the file, from 1
    cells: list[str]


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """The names in the header, without spaces around, and the rows below it, each as long. Raises TrainingError.

    Lines that begin with # are left out; blank ones too, before the header and after the last row.
    """
    if path.exists() and not path.is_file():
        raise TrainingError(f"{path}: not a regular file")
    names: list[str] = []
    rows: list[Row] = []
    separator, blank = ",", 0
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        if not line.strip():
            blank = blank or (number if rows else 0)
            continue
        if blank:
            raise TrainingError(
                f"{path}: line {blank} is blank; fill or remove what is missing, rows are taken as consecutive"
            )
        if not names:
            separator = _separator(line)
            names = [cell.strip() for cell in _cells(path, number, line, separator)]
            continue
        cells = _cells(path, number, line, separator)
        if len(cells) != len(names):
            raise TrainingError(f"{path}: line {number} has {len(cells)} cells, the header names {len(names)}")
        rows.append(Row(number, cells))
        if len(rows) > ROWS_MAX:
            raise TrainingError(f"{path}: more than {ROWS_MAX:,} rows")
    if not names:
        raise TrainingError(f"{path}: the file is empty; its first row must name the columns")
    return names, rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """With their numbers, from 1. Lines end as on Windows, Unix or an old Mac."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                _check_text(path, number, line)
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error


def _check_text(path: Path, number: int, line: str) -> None:
    if "\0" in line:
        raise TrainingError(f"{path}: line {number} has a NUL byte; UTF-16 and binary files are not CSV in UTF-8")
    if line.isascii():
        return
    try:
        line.encode()
    except UnicodeEncodeError as error:
        at = len(line[: error.start].encode("utf-8", "surrogateescape"))
        byte = ord(line[error.start]) - 0xDC00
        kind = "UTF-16" if number == 1 and at == 0 and byte in (0xFE, 0xFF) else "latin-1, perhaps"
        raise TrainingError(
            f"{path}: not CSV in UTF-8: line {number}, byte {at + 1} (0x{byte:02x}) is not text in UTF-8 ({kind}); "
            "save the file as UTF-8"
        ) from error


def _separator(header: str) -> str:
    """The first of the separators that splits the header; quoted names may hold the others."""
    for separator in _SEPARATORS:
        try:
            if len(next(csv.reader((header,), delimiter=separator, strict=True))) > 1:
                return separator
        except csv.Error:
            continue  # a quote that ends before another separator
    return ","


def _cells(path: Path, number: int, line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader((line,), delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        what = "a quote is left open" if "unexpected end" in str(error) else f"not CSV: {error}"
        raise TrainingError(f"{path}: line {number}: {what}") from error
