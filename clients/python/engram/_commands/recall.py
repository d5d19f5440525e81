"""`engram recall SESSION`: what cues bring back, one output line for each.

Cues are lines on stdin, or --cue: 0110..., or numbers with commas between; ? or _ stands for an unknown bit. A line of output
has the label, overlap, sweeps, whether it converged, whether it is spurious, and the pattern.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engram._commands.connection import add_address, client_of, explained
from engram._commands.patterns import cue_of, text_of
from engram._commands.text import numbered, stdin_blocks
from engram._json import json_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
        cues = _cues(args.cue)
        while True:
            try:
                cue, unknown = next(cues)
            except StopIteration:
                return 0
            except ValueError as error:
                print(f"engram recall: {error}", file=sys.stderr)
                return 1
            hit = client.sessions.recall(
                args.session, cue, unknown if unknown.any() else None, seed=args.seed, synchronous=args.synchronous,
                sweeps_max=args.sweeps,
            )  # fmt: skip
            print(_json(hit) if args.json else _plain(hit), flush=True)


def _cues(given: list[str] | None) -> Iterator[tuple[NDArray[np.int8], NDArray[np.bool_]]]:
    """Those of the arguments, or of stdin as they arrive. Raises ValueError with which one is bad."""
    what = "line" if given is None else "cue"
    for number, text in numbered(stdin_blocks()) if given is None else enumerate(given, 1):
        try:
            yield cue_of(text)
        except ValueError as error:
            raise ValueError(f"{what} {number}: {error}") from error


def _plain(hit: Recall) -> str:
    ends = f"{'converged' if hit.converged else 'unsettled'} {'spurious' if hit.spurious else 'stored'}"
    return f"{hit.label}\t{hit.overlap:.3f}\t{hit.sweeps} sweeps\t{ends}\t{text_of(hit.pattern)}"


def _json(hit: Recall) -> str:
    return json_text(
        {
            "label": hit.label, "overlap": hit.overlap, "distance": hit.distance, "sweeps": hit.sweeps,
            "converged": hit.converged, "spurious": hit.spurious, "energies": hit.energies.tolist(),
            "pattern": text_of(hit.pattern),
        }
    )  # fmt: skip
