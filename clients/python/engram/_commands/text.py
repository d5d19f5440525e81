"""Text that other programs wrote: lines of bytes, and rows of numbers in them. Used by `engram stream`, `store` and `recall`.

Lines are UTF-8, with or without a byte order mark, and end as on any system. A row is numbers with commas or tabs between.
A number is written as JSON writes one; a plus, `.5` and `5.` go too. All else is refused with its line and column, for it
could be read in two ways: 1_3, thousands separators, decimal commas, digits of other scripts, `nan`.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_WORDS = {"nan", "inf", "infinity", "na", "n/a", "null", "none"}
_SHOWN = 20
_DIGITS = 40  # more than any integer type has


class TextError(ValueError):
    """What a person can mend: says the line, and the column where there is one."""


def stdin_blocks() -> Iterator[bytes]:
    """What comes on stdin, as soon as it is there. Not through sys.stdin, whose lock Python wants when it ends, while a thread
    that reads may be waiting with it for a line that never comes."""
    while data := os.read(0, 1 << 16):
        yield data


def file_blocks(file: str) -> Iterator[bytes]:
    """A file's bytes; - is stdin. Raises OSError."""
    if file == "-":
        yield from stdin_blocks()
        return
    with Path(file).open("rb") as opened:
        while data := opened.read(1 << 16):
            yield data


def numbered(blocks: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, as they arrive, and their numbers from 1. Raises TextError."""
    number, rest = 0, b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if text := _decoded(number, line):
                yield number, text
    if rest and (text := _decoded(number + 1, rest)):
        yield number + 1, text


def _decoded(number: int, line: bytes) -> str:
    if number == 1:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise TextError("line 1: this is UTF-16; convert it to UTF-8")
        line = line.removeprefix(codecs.BOM_UTF8)
    line = line.rstrip(b"\r")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        byte = line[error.start]
        raise TextError(
            f"line {number}, column {column}: byte 0x{byte:02X} is not UTF-8; convert the text (from latin-1, perhaps)"
        ) from error
    if "\r" in text or "\0" in text:
        where = text.index("\r" if "\r" in text else "\0") + 1
        what = "a carriage return within the line; end lines with a newline" if "\r" in text else "a NUL; is this text?"
        raise TextError(f"line {number}, column {where}: {what}")
    return text.strip(" \t") and text


def row_of(text: str) -> list[float | int]:
    """The numbers of a line; whole ones as int, of any length. Raises TextError with the column, from 1."""
    return [_number(part, column, text) for column, part in enumerate(cells_of(text), 1)]


def cells_of(text: str) -> list[str]:
    """What stands between the tabs or commas of a line."""
    return [part.strip(" ") for part in text.split("\t" if "\t" in text else ",")]


def is_word(part: str) -> bool:
    """Whether it may be a name; words for missing numbers are none."""
    return (part[:1].isalpha() or part[:1] in ("_", "/")) and part.lower() not in _WORDS


def _number(part: str, column: int, text: str) -> float | int:
    if _WHOLE.fullmatch(part):
        return int(part) if len(part) <= _DIGITS else float(part)
    if _NUMBER.fullmatch(part):
        return float(part)
    shown = repr(part if len(part) <= _SHOWN else part[:_SHOWN] + "...")
    raise TextError(f"column {column}: {_why(part, shown, text)}")


def _why(part: str, shown: str, text: str) -> str:
    if not part:
        return "there is no number; a missing value has to be filled in, or its row left out"
    if part.lower().lstrip("+-") in _WORDS:
        return f"{shown} is no number that a model takes; fill it in, or leave the row out"
    if ";" in part:
        return f"{shown} has a semicolon; put commas or tabs between numbers, and points before decimals"
    if "," in part:
        return f"{shown} has a comma within a number; write a point before decimals, and nothing between thousands"
    if part[0] in "\"'":
        return f"{shown} is quoted; write plain numbers"
    if "_" in part or "'" in part or " " in part or "\u00a0" in part:
        return f"{shown} is not one number; put commas or tabs between numbers, and nothing within one"
    if any(letter.isalpha() for letter in part):
        return f"{shown} is not a number; leave out a line of names"
    return f"{shown} is not a number"
