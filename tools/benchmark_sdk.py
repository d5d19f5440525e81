"""`make bench-sdk`: what a step through the Python SDK takes; docs/benchmarks/sdk.md and .json. AGAINST=DIR is an older checkout.

W, `step` durability, one server and one client process on this machine, each edition's client at its own server, in turns. One
session that is stepped again and again, in asyncio and by the blocking client; a thousand tasks that step a session each; and
`step_many` of a thousand sessions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from connection_contestants import PACKAGES, Target, older, server, write_weights

from engram._json import json_text
from engram_service.bench.report import machine

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
THIS, OLDER = "this", "older"
DRIVER = Path(__file__).with_name("sdk_driver.py")
# What is measured, its unit and its goal: of p50 at most, of a rate at least; and of the older edition's.
FIGURES = {
    "async_ms": ("`step`, asyncio, p50 ms", 0.5, 0.5),
    "blocking_ms": ("`step`, blocking, p50 ms", 0.6, 0.5),
    "tasks_per_s": ("`step` of a thousand tasks, steps/s", None, 1.0),
    "many_per_s": ("`step_many` of a thousand sessions, steps/s", None, 1.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each figure and round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="DIR", help="an older checkout")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory of sdk.md and sdk.json")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch, ExitStack() as stack:
        editions = {THIS: (stack.enter_context(server(Path(scratch), THIS)), "")}
        if args.against:
            target = stack.enter_context(older(Path(scratch), args.against, write_weights(Path(scratch))))
            packages = os.pathsep.join(str(args.against.resolve() / package) for package in PACKAGES)
            editions[OLDER] = target, packages
        for number in range(args.rounds):
            for name, (target, packages) in editions.items():
                rounds.setdefault(name, []).append(driven(target, packages, args.seconds))
                print(f"round {number + 1}, {name}: {rounds[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: float(np.median([one[key] for one in some])) for key in FIGURES} for name, some in rounds.items()
    }
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "medians": medians, "rounds": rounds}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sdk.json").write_text(json_text(found, indent=2) + "\n")
    (args.out / "sdk.md").write_text(page(found))
    print(page(found))
    return 0


def driven(target: Target, packages: str, seconds: float) -> dict[str, float]:
    """The figures of one edition, by its own SDK in a process of its own."""
    variables = {**os.environ, **({"PYTHONPATH": packages} if packages else {})}
    command = [sys.executable, str(DRIVER), target.address, target.model, str(seconds)]
    answer = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name: float(value) for name, value in map(str.split, answer.splitlines())}


def page(found: dict[str, Any]) -> str:
    on, medians = found["machine"], found["medians"]
    this, other = medians[THIS], medians.get(OLDER)
    lines = [
        "# Through the Python SDK", "",
        f"`make bench-sdk`, {found['date']}, {on['cores']} cores, {on['processor']}, Python {on['python']}. W, durability *step*;",
        f"client, server and Redis share the machine; medians of {len(found['rounds'][THIS])} rounds, editions in turns.", "",
        "| figure | this | older | ratio | goal |", "|---|---:|---:|---:|---|",
    ]  # fmt: skip
    for key, (text, most, share) in FIGURES.items():
        values = [f"{this[key]:,.2f}" if most else f"{this[key]:,.0f}"]
        if other:
            values += [f"{other[key]:,.2f}" if most else f"{other[key]:,.0f}", f"{this[key] / other[key]:.2f}"]
        else:
            values += ["-", "-"]
        goal = f"at most {most} ms, and {share} of the older" if most else "no less than the older"
        lines.append(f"| {text} | {' | '.join(values)} | {goal} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
