"""`engram forget SESSION LABEL...`: patterns out of a session's memory; all of those that are named, or none."""

from __future__ import annotations

import argparse
import sys

from engram._commands.connection import add_address, client_of, explained
from engram._json import json_text

HELP = "forget patterns of a session's memory"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("session", metavar="SESSION")
    parser.add_argument("labels", metavar="LABEL", nargs="*")
    parser.add_argument("--all", action="store_true", help="every pattern")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    if args.all == bool(args.labels):
        print("engram forget: give labels, or --all, and not both", file=sys.stderr)
        return 2
    return explained("forget", lambda: _forget(args))


def _forget(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        forgotten = client.sessions.forget(args.session, args.labels or None, all=args.all)
    print(json_text({"forgotten": forgotten}) if args.json else f"forgot {forgotten}")
    return 0
