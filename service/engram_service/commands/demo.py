"""`engram demo`: the main job on real input, with a crash in the middle."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_service.demo.story import Outcome

HELP = "stream real digits through a server that is killed half way"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=128, help="digits read at once (default: 128)")
    parser.add_argument(
        "--pace", type=float, default=0.4, metavar="SECONDS", help="time between rows, for the eye (default: 0.4)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary alone, as JSON")


def run(args: argparse.Namespace) -> int:
    if args.sessions < 1 or args.pace < 0:
        print("engram demo: --sessions is at least 1 and --pace at least 0", file=sys.stderr)
        return 2
    from engram import EngramError
    from engram_service.demo.screen import Lines, Screen, Terminal
    from engram_service.demo.story import tell
    from engram_service.local import LocalServerError

    screen: Screen
    if args.json:
        screen = Lines(sys.stderr)
    elif sys.stdout.isatty():
        screen = Terminal(sys.stdout, shutil.get_terminal_size().columns)
    else:
        screen = Lines(sys.stdout)
    try:
        outcome = asyncio.run(tell(screen, args.sessions, args.pace if sys.stdout.isatty() else 0.0))
    except (LocalServerError, EngramError, OSError) as error:
        print(f"engram demo: {error}", file=sys.stderr)
        return 1
    print(json.dumps({**asdict(outcome), "held": outcome.held}, indent=2) if args.json else _summary(outcome))
    return 0 if outcome.held else 1


def _summary(outcome: Outcome) -> str:
    lines = (
        ("digits read", f"{outcome.sessions}, one session each, {outcome.steps:,} steps"),
        ("read right", f"{outcome.accuracy:.1%} after the last row"),
        (
            "kills",
            f"{outcome.kills}; away for {outcome.away_s:.1f} s; {outcome.sessions_at_the_end} sessions at their last row",
        ),
        ("bits that differ", f"{outcome.bits_differ}, against a run that nobody disturbed"),
        ("took", f"{outcome.seconds:.1f} s"),
        ("everything held", "yes" if outcome.held else "NO"),
    )
    return "\n".join(["", *(f"{name:>18}  {text}" for name, text in lines)])
