"""`make bench`: `engram bench` for 1, 64, 1024 and 8192 sessions and both durabilities, and for 256 connections of one session.

Writes docs/benchmarks/<name>.md and .json with the machine's description, and the table of the README. Takes some five
minutes; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from engram._json import json_text
from engram_service.bench.drive import Options
from engram_service.bench.measure import Result, measure
from engram_service.bench.plain import PlainResult
from engram_service.bench.report import machine, table, verdict

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "docs" / "benchmarks"
FIGURES = re.compile(r"(<!-- figures -->\n).*(<!-- end of figures -->\n)", re.S)
# Sessions, and connections (0: one for each client process).
CASES = ((1, 0), (64, 0), (1024, 0), (8192, 0), (256, 256))
PLAIN_SESSIONS_MAX = 1024  # beyond, the plain server is only slower, and its callers wait for seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--sessions", type=int, nargs="+", help="only the cases of so many")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--name", help="of the files (default: the device and the number of cores)")
    args = parser.parse_args()
    described = machine()
    name = args.name or f"{'cpu' if args.device == 'auto' else args.device.replace(':', '')}-{described['cores']}-cores"
    cases = [case for case in CASES if not args.sessions or case[0] in args.sessions]
    base = Options(device=args.device, seconds=args.seconds, warm_up_s=args.warm_up, plain=not args.no_plain)
    results = run(cases, base)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    (DIRECTORY / f"{name}.md").write_text(page(results, described, args.seconds))
    found = {"machine": described, "results": [one.as_dict() for one in results]}
    (DIRECTORY / f"{name}.json").write_text(json_text(found, indent=2) + "\n")
    if args.device == "auto":
        write_readme(results, described)
    print(table(results))
    print(verdict(results))
    return 0 if all(one.outputs_equal for one in results) else 1


def run(cases: Sequence[tuple[int, int]], base: Options) -> list[Result]:
    """Every case in both durabilities; the plain server is measured once for each number of sessions."""
    results: list[Result] = []
    for sessions, connections in cases:
        plain: PlainResult | None = None
        for durability in ("step", "interval"):
            once = base.plain and sessions <= PLAIN_SESSIONS_MAX and plain is None
            options = replace(base, sessions=sessions, connections=connections, durability=durability, plain=once)
            result = measure(options, say, plain)
            results.append(result)
            print(table([result]), file=sys.stderr, flush=True)
            if plain is None and result.plain_steps_per_s and result.plain_p50_ms:
                plain = PlainResult(result.plain_steps_per_s, result.plain_p50_ms, 0.0)
    return results


def page(results: list[Result], described: dict[str, str], seconds: float) -> str:
    lines = [
        "# Benchmark",
        "",
        f"Written by `tools/benchmark.py` on {datetime.now(UTC):%Y-%m-%d}. Client processes, server and Redis share this machine:",
        "",
        *(f"- {key}: {value}" for key, value in described.items()),
        "",
        "W: one LSTM, input 64, hidden 256, linear head to 16, float32. Closed loop: a session sends its next input after its",
        f"output; windows of {seconds:g} s after a warm-up. *ONNX Runtime*, *torch*: the same cell in these libraries, the same",
        "batch size, no serving, measured in the same run with the best number of threads; *of ceiling* is to the one that the",
        "server uses, ONNX Runtime on a CPU. *plain*: the server of `tests/yardstick`, measured in",
        "the same run. With durability *step* each answer left after Redis had its state; with *interval* Redis has it within",
        "200 ms or 256 steps.",
        "",
        table(results),
        "",
        verdict(results),
        "",
    ]
    return "\n".join(lines)


def write_readme(results: list[Result], described: dict[str, str]) -> None:
    machine_in_words = f"{described['cores']} cores, {described['processor']}, ONNX Runtime {described['onnxruntime']}"
    text = f"{machine_in_words}. {verdict(results)}\n\n{table(results, short=True)}\n"
    readme = ROOT / "README.md"
    readme.write_text(FIGURES.sub(lambda found: found[1] + text + found[2], readme.read_text()))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
