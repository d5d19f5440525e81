"""`engram`: finds the subcommands of all packages through the entry-point group `engram.commands`, and runs one.

A subcommand is a module with HELP, configure(parser) and run(args) -> exit code: 0 done, 1 failed, 2 wrong use. Ctrl-C ends
a command with 130, as shells expect; a closed pipe downstream ends it quietly with 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import ModuleType

from engram._version import __version__

_GROUP = "engram.commands"
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {entry.name: entry.value for entry in entry_points(group=_GROUP)}
    parser, parsers = _parser(commands)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), "")
    if chosen in commands:
        # Only the one that is wanted is imported.
        module = _load(commands[chosen])
        if module is None:
            return 1
        module.configure(parsers[chosen])
        args = parser.parse_args(arguments)
        return _run(module, args)
    parser.parse_args(arguments)
    parser.print_help()
    return 2


def _parser(commands: dict[str, str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="engram", description="Recurrent models served as living sessions.")
    parser.add_argument("--version", action="version", version=f"engram {__version__}")
    group = parser.add_subparsers(metavar="COMMAND", dest="command")
    return parser, {name: group.add_parser(name, help=_help(commands[name])) for name in sorted(commands)}


def _help(path: str) -> str:
    try:
        return str(importlib.import_module(path).HELP)
    except ImportError:
        return "(needs pip install 'engram[server]')"


def _load(path: str) -> ModuleType | None:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        _explain(error)
        return None


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    try:
        return int(module.run(args))
    except ImportError as error:
        _explain(error)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _explain(error: ImportError) -> None:
    missing = (error.name or "").partition(".")[0]
    if missing and not missing.startswith("engram"):
        print(f"engram: {missing} is not installed: pip install 'engram[server]'", file=sys.stderr)
    else:
        print(f"engram: {error}", file=sys.stderr)
