"""`engram demo`: what Engram does, on real input, with a crash in the middle. Four stories, in engram_service.demo."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from engram._json import json_text

if TYPE_CHECKING:
    from engram_service.demo.outcome import Told
    from engram_service.demo.screen import Screen

HELP = "real digits through a server that is killed half way; also: recall, ntm, variants"
_STORIES = {
    "digits": "handwritten digits in many sessions, the server killed half way",
    "recall": "half a letter brings back the whole one",
    "ntm": "a Turing machine writes, outlives its server, and reads",
    "variants": "the four ways from inputs to outputs",
}
_PACES_S = {"digits": 0.4, "recall": 1.0, "ntm": 0.1, "variants": 0.1}
_VECTORS_MAX = 20


def configure(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {what}" for name, what in _STORIES.items())
    parser.add_argument(
        "story", metavar="STORY", nargs="?", choices=_STORIES, default="digits", help=f"{about} (default: digits)"
    )
    parser.add_argument("--sessions", type=int, default=128, help="digits read at once (default: 128)")
    parser.add_argument(
        "--vectors",
        type=int,
        default=_VECTORS_MAX,
        help=f"that the ntm copies, 1 to {_VECTORS_MAX} (default: {_VECTORS_MAX})",
    )
    parser.add_argument("--seed", type=int, default=1, help="of recall's noise and of the ntm's sequence (default: 1)")
    parser.add_argument("--pace", type=float, metavar="SECONDS", help="time between pictures, for the eye")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="take the story's models from here (default: the shipped ones)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write pictures there, as PNG; needs the extra [train]")
    parser.add_argument("--json", action="store_true", help="print the summary alone, as JSON")


def run(args: argparse.Namespace) -> int:
    pace_s = _PACES_S[args.story] if args.pace is None else args.pace
    wrong = _wrong(args, pace_s)
    if wrong:
        print(f"engram demo: {wrong}", file=sys.stderr)
        return 2
    from engram import EngramError
    from engram_models.training.errors import TrainingError
    from engram_service.local import LocalServerError

    try:
        told = asyncio.run(_tell(args, pace_s if sys.stdout.isatty() else 0.0))
        written = _write(told, args.out) if args.out else []
    except (LocalServerError, EngramError, TrainingError, OSError) as error:
        print(f"engram demo: {error}", file=sys.stderr)
        return 1
    outcome = told.outcome
    print(json_text({**asdict(outcome), "held": outcome.held}, indent=2) if args.json else outcome.summary())
    for path in written:
        print(f"engram demo: wrote {path}", file=sys.stderr)
    return 0 if outcome.held else 1


def _wrong(args: argparse.Namespace, pace_s: float) -> str:
    """What cannot be meant, or nothing. Asked before a server starts."""
    if args.sessions < 1 or not 0 <= pace_s < float("inf") or args.seed < 0:
        return "--sessions is at least 1, --pace and --seed at least 0"
    if not 1 <= args.vectors <= _VECTORS_MAX:
        return f"--vectors is 1 to {_VECTORS_MAX}"
    if args.out:
        try:
            import matplotlib  # noqa: F401 - whether it is there is all that is asked
        except ImportError:
            return "--out draws with matplotlib, which is not installed: pip install 'engram[train]'"
    return ""


async def _tell(args: argparse.Namespace, pace_s: float) -> Told:
    from engram_service.demo import digits, ntm, recall, variants

    screen = _screen(args.json)
    if args.story == "recall":
        return await recall.tell(screen, args.seed, pace_s, args.models)
    if args.story == "ntm":
        return await ntm.tell(screen, args.vectors, args.seed, pace_s, args.models)
    if args.story == "variants":
        return await variants.tell(screen, pace_s, args.models)
    return await digits.tell(screen, args.sessions, pace_s, args.models)


def _screen(as_json: bool) -> Screen:
    from engram_service.demo.screen import Lines, Terminal

    if as_json:
        return Lines(sys.stderr)
    if sys.stdout.isatty():
        return Terminal(sys.stdout, *shutil.get_terminal_size())
    return Lines(sys.stdout)


def _write(told: Told, out: Path) -> list[Path]:
    """The story's pictures in `out`, each whole or not at all. Raises TrainingError."""
    from engram_models.training.output import write_whole
    from engram_models.training.pictures import png

    paths = []
    for name, drawn in told.pictures.items():
        paths.append(out / f"{name}.png")
        write_whole(paths[-1], png(drawn()))
    return paths
