"""`engram recall SESSION`: what cues bring back, one output line for each.

Cues are lines on stdin, or --cue: 0110..., or numbers with commas between; ? or _ stands for an unknown bit. A line of output
has the label, overlap, sweeps, whether it converged, whether it is spurious, and the pattern.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engram._commands.connection import add_address, client_of, explained
from engram._commands.patterns import cue_of, text_of

if TYPE_CHECKING:
    from engram import Recall

HELP = "recall patterns of a session's memory from cues with wrong or unknown bits"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("session", metavar="SESSION")
    parser.add_argument(
        "--cue", metavar="BITS", action="append", help="a cue; may be given again; none: lines on stdin"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the order in which units are updated")
    parser.add_argument("--synchronous", action="store_true", help="update all units at once")
    parser.add_argument("--sweeps", metavar="N", type=int, default=100, help="at most so many (default: 100)")
    parser.add_argument("--json", action="store_true", help="one object a line")
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    return explained("recall", lambda: _recall(args))


def _recall(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        for number, line in _lines(args.cue):
            try:
                cue, unknown = cue_of(line)
            except ValueError as error:
                print(f"engram recall: cue {number}: {error}", file=sys.stderr)
                return 1
            hit = client.sessions.recall(
                args.session, cue, unknown if unknown.any() else None, seed=args.seed, synchronous=args.synchronous,
                sweeps_max=args.sweeps,
            )  # fmt: skip
            print(_json(hit) if args.json else _plain(hit), flush=True)
    return 0


def _lines(cues: list[str] | None) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(sys.stdin if cues is None else cues, 1):
        if line.strip():
            yield number, line


def _plain(hit: Recall) -> str:
    ends = f"{'converged' if hit.converged else 'unsettled'} {'spurious' if hit.spurious else 'stored'}"
    return f"{hit.label}\t{hit.overlap:.3f}\t{hit.sweeps} sweeps\t{ends}\t{text_of(hit.pattern)}"


def _json(hit: Recall) -> str:
    return json.dumps(
        {
            "label": hit.label, "overlap": hit.overlap, "distance": hit.distance, "sweeps": hit.sweeps,
            "converged": hit.converged, "spurious": hit.spurious, "energies": hit.energies.tolist(),
            "pattern": text_of(hit.pattern),
        }
    )  # fmt: skip
