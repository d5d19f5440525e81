"""`engram sessions`: what sessions a server has, and what can be done with one by its id."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engram._commands.connection import add_address, client_of, explained
from engram._json import json_text

if TYPE_CHECKING:
    from engram import Client, SessionInfo

_BLOCK = 500  # rows of a listing whose columns are aligned

HELP = "list, show, fork, close, export, import and move sessions"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    for name, (text, arguments) in _ACTIONS.items():
        action = actions.add_parser(name, help=text)
        for flags, options in arguments:
            action.add_argument(*flags, **options)
        action.add_argument("--json", action="store_true", help="for programs")
        add_address(action)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: from 0 on")
    return number


_ID: tuple[tuple[str, ...], dict[str, Any]] = (("session",), {"metavar": "SESSION"})
_ACTIONS: dict[str, tuple[str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "list": (
        "all sessions",
        [
            (("--model",), {"metavar": "M", "default": "", "help": "only of this model"}),
            (("--limit",), {"metavar": "N", "type": _count, "default": 0, "help": "at most so many; 0: all"}),
        ],
    ),
    "show": ("one session", [_ID]),
    "state": ("a session's state tensors", [_ID]),
    "fork": (
        "a new session that stands where this one stands",
        [_ID, (("new",), {"metavar": "NEW", "nargs": "?", "help": "its id; none: the server makes one"})],
    ),
    "close": ("end sessions and delete their records", [(("session",), {"metavar": "SESSION", "nargs": "+"})]),
    "export": (
        "write a session to a file",
        [_ID, (("file",), {"metavar": "FILE", "nargs": "?", "default": "-", "help": "- (default): stdout"})],
    ),
    "import": (
        "read a session from a file",
        [
            (("file",), {"metavar": "FILE", "nargs": "?", "default": "-", "help": "- (default): stdin"}),
            (("--session",), {"metavar": "ID", "help": "its id; none: the one it had"}),
        ],
    ),
    "move": ("move a session to another version of its model", [_ID, (("version",), {"metavar": "VERSION"})]),
}


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    return explained("sessions", lambda: _act(args))


def _act(args: argparse.Namespace) -> int:
    try:
        with client_of(args) as client:
            _DO[args.action](client, args)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"engram sessions: {args.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _list(client: Client, args: argparse.Namespace) -> None:
    """As they come: there may be a million."""
    found = itertools.islice(client.sessions.list(args.model), args.limit or None)
    if args.json:
        print("[", end="")
        for number, info in enumerate(found):
            print(", " * (number > 0) + json_text(_plain(info)), end="")
        print("]")
        return
    rows = (
        [info.id, info.model, info.version, str(info.seq), info.residency, _when(info.committed), _when(info.expires)]
        for info in found
    )
    block = [["SESSION", "MODEL", "VERSION", "STEP", "WHERE", "LAST STEP", "EXPIRES"], *itertools.islice(rows, _BLOCK)]
    widths: list[int] = []
    while block:
        widths = _print_table(block, widths)
        block = list(itertools.islice(rows, _BLOCK))


def _show(client: Client, args: argparse.Namespace) -> None:
    _print_info(client.sessions.get(args.session), args.json)


def _state(client: Client, args: argparse.Namespace) -> None:
    state = client.sessions.state(args.session)
    if args.json:
        print(json_text({name: values.tolist() for name, values in state.items()}))
        return
    table = [["TENSOR", "DTYPE", "SHAPE", "MIN", "MAX"]]
    for name, values in state.items():
        ends = [f"{values.min():g}", f"{values.max():g}"] if values.size else ["", ""]
        table.append([name, str(values.dtype), "x".join(map(str, values.shape)) or "scalar", *ends])
    _print_table(table)


def _fork(client: Client, args: argparse.Namespace) -> None:
    _print_info(client.sessions.fork(args.session, args.new), args.json)


def _close(client: Client, args: argparse.Namespace) -> None:
    for session in args.session:
        client.sessions.close(session)
    print(json_text({"closed": args.session}) if args.json else f"closed {', '.join(args.session)}")


def _export(client: Client, args: argparse.Namespace) -> None:
    data = client.sessions.export(args.session)
    if args.file == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    pathlib.Path(args.file).write_bytes(data)
    print(json_text({"file": args.file, "bytes": len(data)}) if args.json else f"{args.file}: {len(data)} bytes")


def _import(client: Client, args: argparse.Namespace) -> None:
    data = sys.stdin.buffer.read() if args.file == "-" else pathlib.Path(args.file).read_bytes()
    _print_info(client.sessions.import_(data, args.session), args.json)


def _move(client: Client, args: argparse.Namespace) -> None:
    _print_info(client.sessions.move(args.session, args.version), args.json)


_DO = {
    "list": _list,
    "show": _show,
    "state": _state,
    "fork": _fork,
    "close": _close,
    "export": _export,
    "import": _import,
    "move": _move,
}


def _plain(info: SessionInfo) -> dict[str, Any]:
    values = dataclasses.asdict(info)
    return {key: value.isoformat() if isinstance(value, datetime.datetime) else value for key, value in values.items()}


def _print_info(info: SessionInfo, as_json: bool) -> None:
    plain = _plain(info)
    if as_json:
        print(json_text(plain))
        return
    for key, value in plain.items():
        print(f"{key.replace('_', ' '):17} {'' if value is None else value}")


def _print_table(rows: list[list[str]], least: Sequence[int] = ()) -> list[int]:
    """Returns the columns' widths, for rows that follow."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [max(pair) for pair in itertools.zip_longest(widths, least, fillvalue=0)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return widths


def _when(time: datetime.datetime | None) -> str:
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
