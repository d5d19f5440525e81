"""The command line. Subcommands are modules with HELP, configure(parser) and run(args) -> exit code, found through the
entry-point group `engram.commands`: the packages add theirs, and nothing here imports them before they are asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from engram._version import __version__

_GROUP = "engram.commands"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand. 0 done, 1 failed, 2 wrong use."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    found = {entry.name: entry for entry in entry_points(group=_GROUP)}
    parser = argparse.ArgumentParser(prog="engram", description="Recurrent models served as living sessions.")
    parser.add_argument("--version", action="version", version=f"engram {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in given if not word.startswith("-")), None)
    try:
        for name in sorted(found):
            # Only the command that runs is configured; the others give their one line of help.
            command = commands.add_parser(name, help=_help(found[name]) if asked is None else None)
            if name == asked:
                found[name].load().configure(command)
        args = parser.parse_args(given)
        return int(found[args.command].load().run(args))
    except ModuleNotFoundError as error:
        print(f"engram: {error.name} is not installed; run: pip install 'engram[server]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; a second error on the way out would say nothing new.
        sys.stderr.close()
        return 0


def _help(entry: EntryPoint) -> str:
    try:
        return str(entry.load().HELP)
    except ModuleNotFoundError as error:
        return f"(needs {error.name}: pip install 'engram[server]')"
