"""`engram stream MODEL`: inputs as lines on stdin, one output line for each, as it arrives.

A line is CSV or JSON ([1, 2] or {"x": [1, 2]}); its output line has the same form. Ends with 0 at the end of the input or
when nobody reads the output any more, with 130 on Ctrl-C, with 1 on a bad line: what stood before it has been answered.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engram._commands.connection import add_address, client_of, explained

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    formats: list[bool] = []
    failure: list[str] = []
    with client_of(args) as client:
        session = client.open(name, args.session, version=version, durability=args.durability)
        shape, dtype = session.model.input.shape, session.model.input.dtype
        seq = session.seq
        try:
            for output in session.stream(_inputs(shape, dtype, formats, failure), timeout=None):
                seq += 1
                sys.stdout.write(_line(output, formats.pop(0), args.json, seq))
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


def _inputs(shape: tuple[int, ...], dtype: str, formats: list[bool], failure: list[str]) -> Iterator[NDArray[Any]]:
    """Inputs as their lines arrive, up to the first bad line. Notes which lines were JSON."""
    number = 0
    for line in _lines():
        number += 1
        text = line.strip()
        if not text:
            continue
        try:
            value, is_json = _parse(text.decode(), shape, dtype)
        except ValueError as error:
            failure.append(f"line {number}: {error}")
            return
        formats.append(is_json)
        yield value


def _lines() -> Iterator[bytes]:
    """Lines of stdin as soon as they are there. Not through sys.stdin, whose lock Python wants when it ends, while the
    thread that reads may be waiting with it for a line that never comes."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parse(text: str, shape: tuple[int, ...], dtype: str) -> tuple[NDArray[Any], bool]:
    """A line's input, and whether it was JSON. Raises ValueError."""
    import numpy as np

    is_json = text[0] in "[{"
    try:
        values = _json_values(text) if is_json else [float(part) for part in text.split(",")]
        array = np.array(values, np.float64)
    except (ValueError, TypeError) as error:
        kind = "JSON" if is_json else "CSV"
        raise ValueError(f"not {kind} numbers: {str(error).splitlines()[0]}") from error
    size = int(np.prod(shape))
    if array.size != size:
        raise ValueError(f"{array.size} values, but the model takes {size} ({dtype}{list(shape)})")
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity")
    return _as_input(array.reshape(shape), dtype), is_json


def _json_values(text: str) -> Any:
    value = json.loads(text)
    if isinstance(value, dict):
        if len(value) == 1:
            return next(iter(value.values()))
        for key in ("x", "input", "inputs"):
            if key in value:
                return value[key]
        raise ValueError('an object needs the key "x" or "input"')
    return value


def _as_input(array: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    import numpy as np

    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    if kind.kind in "iub" and not (array == array.astype(kind)).all():
        raise ValueError(f"the model takes {dtype}, but not every value is one")
    return array.astype(kind)


def _line(output: NDArray[Any], is_json: bool, tagged: bool, seq: int) -> str:
    values = output.tolist()
    if tagged:
        return json.dumps({"seq": seq, "output": values}) + "\n"
    if is_json:
        return json.dumps(values) + "\n"
    # The shortest text that reads back as the same float32.
    return ",".join(str(value) for value in output.reshape(-1)) + "\n"
