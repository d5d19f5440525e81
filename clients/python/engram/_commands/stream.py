"""`engram stream MODEL`: inputs as lines on stdin, one output line for each, as it arrives.

A line is CSV, tab-separated or JSON ([1, 2] or {"x": [1, 2]}); its output line has the same form. Blank lines are passed over.
Ends with 0 at the end of the input or when nobody reads the output any more, with 130 on Ctrl-C, with 1 on a bad line: what
stood before it has been answered. An output that is not finite is `null` in JSON, and `nan` or `inf` elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engram._commands.connection import add_address, client_of, explained
from engram._commands.text import TextError, numbered, row_of, stdin_blocks
from engram._json import json_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HUGE = 2**1023  # beyond what a float can be asked for

HELP = "CSV or JSON lines on stdin, one output line for each, as it arrives"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="name of the model, or NAME/VERSION")
    parser.add_argument(
        "--session", metavar="ID", default=None, help="carry this session on; none: a new one that is closed at the end"
    )
    parser.add_argument("--durability", choices=("step", "interval"), default=None, help="none: the server's default")
    parser.add_argument("--json", action="store_true", help='every output line as {"seq": N, "output": [...]}')
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    return explained("stream", lambda: _stream(args))


def _stream(args: argparse.Namespace) -> int:
    name, _, version = args.model.partition("/")
    forms: list[str] = []
    failure: list[str] = []
    with client_of(args) as client:
        session = client.open(name, args.session, version=version, durability=args.durability)
        shape, dtype = session.model.input.shape, session.model.input.dtype
        seq = session.seq
        try:
            for output in session.stream(_inputs(shape, dtype, forms, failure), timeout=None):
                seq += 1
                sys.stdout.write(_line(output, forms.pop(0), args.json, seq))
                sys.stdout.flush()
        except KeyboardInterrupt:
            session.detach(timeout=2.0)
            return 130
        if args.session is None:
            session.close()
    if failure:
        print(f"engram stream: {failure[0]}", file=sys.stderr)
        return 1
    return 0


def _inputs(shape: tuple[int, ...], dtype: str, forms: list[str], failure: list[str]) -> Iterator[NDArray[Any]]:
    """Inputs as their lines arrive, up to the first bad line. Notes the form of each: what stands between its numbers, or
    "json"."""
    try:
        for number, text in numbered(stdin_blocks()):
            try:
                value, form = _parse(text, shape, dtype)
            except TextError as error:
                raise TextError(f"line {number}, {error}") from error
            except ValueError as error:
                raise TextError(f"line {number}: {error}") from error
            forms.append(form)
            yield value
    except TextError as error:
        failure.append(str(error))


def _parse(text: str, shape: tuple[int, ...], dtype: str) -> tuple[NDArray[Any], str]:
    """A line's input, and its form. Raises ValueError."""
    import numpy as np

    text = text.strip(" ")
    is_json = text[0] in "[{"
    values = _flat(_json_values(text)) if is_json else row_of(text)
    size = int(np.prod(shape))
    if len(values) != size:
        raise ValueError(f"{len(values)} values, but the model takes {size} ({dtype}{list(shape)})")
    return _as_input(values, dtype).reshape(shape), "json" if is_json else "\t" if "\t" in text else ","


def _json_values(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise TextError(f"column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError:
        raise ValueError("not JSON numbers: too many brackets") from None
    if isinstance(value, dict):
        if len(value) == 1:
            return next(iter(value.values()))
        for key in ("x", "input", "inputs"):
            if key in value:
                return value[key]
        raise ValueError('an object needs the key "x" or "input"')
    return value


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number that JSON or a model takes")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _flat(values: Any) -> list[float | int]:
    """The numbers of lists in lists of equal lengths, row by row."""
    import numpy as np

    try:
        array = np.array(values, object)
    except ValueError as error:
        raise ValueError("not JSON numbers: rows of unequal length") from error
    found = array.reshape(-1).tolist()
    for place, value in enumerate(found, 1):
        if isinstance(value, list):
            raise ValueError("not JSON numbers: rows of unequal length")
        if not isinstance(value, int | float):
            raise TextError(f"column {place}: {json_text(value)[:40]} is not a JSON number")
    return found


def _as_input(values: list[float | int], dtype: str) -> NDArray[Any]:
    import numpy as np

    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    if kind.kind == "f":
        with np.errstate(over="ignore"):
            array = np.array([float(value) if abs(value) < _HUGE else np.inf for value in values]).astype(kind)
        fits = np.isfinite(array)
    else:
        low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        fits = np.array([value == value // 1 and low <= value <= high for value in values], np.bool_)
        array = np.array([int(value) if fit else 0 for value, fit in zip(values, fits, strict=True)], kind)
    if not fits.all():
        place = int(np.argmin(fits))
        raise TextError(f"column {place + 1}: the model takes {dtype}, which {values[place]} is not")
    return array


def _line(output: NDArray[Any], form: str, tagged: bool, seq: int) -> str:
    values = output.tolist()
    if tagged:
        return json_text({"seq": seq, "output": values}) + "\n"
    if form == "json":
        return json_text(values) + "\n"
    # The shortest text that reads back as the same float32.
    return form.join(str(value) for value in output.reshape(-1)) + "\n"
