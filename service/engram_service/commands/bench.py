"""`engram bench`: one measurement under closed-loop load, or where the time of one step goes; as a table or as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engram._json import json_text

HELP = "measure a server beside plain ONNX Runtime, plain torch and a plain server"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="bench-w", help="the model; bench-w, the default, is one LSTM 64-256-16 from a fixed seed")
    add("--models", type=Path, metavar="DIR", help="where --model is, if it is not one that ships")
    add("--breakdown", action="store_true", help="where the time of one step goes, stage by stage: for 1, 64 and 1024 sessions,"
        " each on its own connection, or for --sessions")  # fmt: skip
    add("--sessions", type=int, help="sessions in a closed loop (default: 1024)")
    add("--seconds", type=float, default=8.0, help="length of the measured window (default: 8)")
    add("--warm-up", type=float, default=3.0, metavar="SECONDS", help="load before the window (default: 3)")
    add("--durability", choices=("step", "interval"), default="step")
    add("--connections", type=int, default=0, help="separate connections (default: one for each process)")
    add("--processes", type=int, default=2, help="client processes (default: 2)")
    add("--groups", type=int, default=2, help="groups of sessions that a connection steps side by side (default: 2)")
    add("--address", default="", metavar="HOST:PORT", help="a server that runs already and serves the model")
    add("--http", default="", metavar="HOST:PORT", help="with --address: where its /metrics is")
    add("--device", default="auto", help="of the private server: auto, cpu or cuda:N")
    add(
        "--server-flag",
        action="append",
        default=[],
        metavar="FLAG=VALUE",
        help="another setting of the private server, such as batch_rows_max=256",
    )
    add("--no-plain", action="store_true", help="do not measure the plain server")
    add("--json", action="store_true", help="print JSON")
    add(
        "--write-bundle",
        type=Path,
        metavar="DIR",
        help="only write the bundle of bench-w into DIR, for a server to serve",
    )


def run(args: argparse.Namespace) -> int:
    from engram import EngramError
    from engram_models import BundleError
    from engram_service.bench.breakdown import SESSIONS, breakdowns, text
    from engram_service.bench.drive import BenchError, Options
    from engram_service.bench.measure import measure
    from engram_service.bench.report import table, verdict
    from engram_service.bench.workload import write_w
    from engram_service.local import LocalServerError

    flags = tuple(part for flag in args.server_flag for part in ("--" + flag.partition("=")[0], flag.partition("=")[2]))
    options = Options(
        model=args.model, models=args.models, address=args.address, http=args.http,
        sessions=1024 if args.sessions is None else args.sessions,
        connections=args.connections, processes=args.processes, groups=args.groups, seconds=args.seconds,
        warm_up_s=args.warm_up, durability=args.durability, device=args.device, plain=not args.no_plain, server_flags=flags,
    )  # fmt: skip
    try:
        if args.write_bundle:
            print(write_w(args.write_bundle))
            return 0
        if args.breakdown:
            found = breakdowns(options, SESSIONS if args.sessions is None else (args.sessions,), _progress)
            print(json_text([one.as_dict() for one in found], indent=2) if args.json else text(found))
            return 0
        result = measure(options, _progress)
    except (BenchError, BundleError, LocalServerError, EngramError, OSError) as error:
        print(f"engram bench: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json_text(result.as_dict(), indent=2))
    else:
        print(table([result]))
        print(verdict([result]))
    return 0 if result.outputs_equal else 1


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
