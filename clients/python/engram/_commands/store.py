"""`engram store SESSION [FILE]`: patterns into a session's memory.

FILE, or stdin: lines of "label<tab or comma>bits", or of bits alone (0110..., or numbers with commas between: 0 and 1, or -1
and +1); or an .npz with `patterns` [n, N] and, perhaps, `labels` [n]. All patterns are stored or none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engram._commands.connection import add_address, client_of, explained
from engram._commands.patterns import read_lines, read_npz
from engram._commands.text import file_blocks
from engram._json import json_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engram import Client

HELP = "store patterns in a session's memory"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("session", metavar="SESSION")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="label<tab>bits a line, CSV or .npz; - (default): stdin"
    )
    parser.add_argument("--model", metavar="M", default="", help="creates the session, of this model, if there is none")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    try:
        labels, patterns = _read(args.file)
    except OSError as error:
        print(f"engram store: {args.file}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"engram store: {'stdin' if args.file == '-' else args.file}: {error}", file=sys.stderr)
        return 1
    return explained("store", lambda: _store(args, labels, patterns))


def _read(file: str) -> tuple[list[str] | None, NDArray[np.int8]]:
    if file.endswith(".npz"):
        with Path(file).open("rb") as opened:
            return read_npz(opened)
    return read_lines(file_blocks(file))


def _store(args: argparse.Namespace, labels: list[str] | None, patterns: NDArray[np.int8]) -> int:
    with client_of(args) as client:
        if args.model:
            _ensure(client, args.session, args.model)
        stored = client.sessions.store(args.session, patterns, labels)
    if args.json:
        print(
            json_text({"labels": stored.labels, "count": stored.count, "load": stored.load, "warning": stored.warning})
        )
        return 0
    print(f"stored {len(stored.labels)}; {stored.count} patterns in all, load {stored.load:.3g}")
    if stored.warning:
        print(f"engram store: warning: {stored.warning}", file=sys.stderr)
    return 0


def _ensure(client: Client, session: str, model: str) -> None:
    """Creates the session if there is none; who has it open is not disturbed."""
    from engram import NotFoundError

    name, _, version = model.partition("/")
    try:
        client.sessions.get(session)
    except NotFoundError:
        client.open(name, session, version=version).detach()
