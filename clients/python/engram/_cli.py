"""`engram`: finds the subcommands of all packages through the entry-point group `engram.commands`, and runs one.

A subcommand is a module with HELP, configure(parser) and run(args) -> exit code: 0 done, 1 failed, 2 wrong use. Ctrl-C ends
a command with 130, as shells expect; a closed pipe downstream ends it quietly with 0.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import ModuleType

from engram._version import __version__

_GROUP = "engram.commands"
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    _escape()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            print(f"engram: the argument {argument!r} is not text in the terminal's encoding (UTF-8?)", file=sys.stderr)
            return 2
    commands = {entry.name: entry.value for entry in entry_points(group=_GROUP)}
    chosen = next((argument for argument in arguments if not argument.startswith("-")), "")
    if chosen not in commands:
        parser = _parser({name: _help(path) for name, path in commands.items()})[0]
        parser.parse_args(arguments)
        parser.print_help()
        return 2
    # Only the command that is wanted is imported.
    module = _load(commands[chosen])
    if module is None:
        return 1
    parser, parsers = _parser({chosen: module.HELP})
    module.configure(parsers[chosen])
    return _run(module, parser.parse_args(arguments))


def _escape() -> None:
    """A terminal that lacks a letter gets an escape for it, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser(helps: dict[str, str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="engram", description="Recurrent models served as living sessions.")
    parser.add_argument("--version", action="version", version=f"engram {__version__}")
    group = parser.add_subparsers(metavar="COMMAND", dest="command")
    return parser, {name: group.add_parser(name, help=helps[name]) for name in sorted(helps)}


def _help(path: str) -> str:
    """A command's HELP, read from its source: to import it would load its whole package, torch with it."""
    package, _, rest = path.partition(".")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        source = pathlib.Path(folder, *rest.split(".")).with_suffix(".py")
        if not source.is_file():
            continue
        for node in ast.parse(source.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
                return str(ast.literal_eval(node.value))
    return ""


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
