"""`engram top`: a live view of servers, models, sessions, rates and latencies by stage."""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from engram._json import json_text

HELP = "what servers are doing: sessions, rates, latencies by stage"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "servers", metavar="HOST:PORT", nargs="*", default=["127.0.0.1:9464"],
        help="where servers have /metrics (default: 127.0.0.1:9464); a name with several addresses is several servers",
    )  # fmt: skip
    parser.add_argument("--interval", metavar="S", type=float, default=2.0, help="seconds between looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="one page, after one interval, and end")
    parser.add_argument("--json", action="store_true", help="for programs: a line of JSON for each page")


def run(args: argparse.Namespace) -> int:
    from engram_service.top.figures import figures
    from engram_service.top.page import page
    from engram_service.top.scrape import scrape, servers_of

    if not 0.1 <= args.interval <= 3600:
        print(f"engram top: --interval {args.interval:g}: from 0.1 to 3600", file=sys.stderr)
        return 2
    try:
        before = scrape(servers_of(args.servers))
    except ValueError as error:
        print(f"engram top: {error}", file=sys.stderr)
        return 2
    while True:
        time.sleep(args.interval)
        # Looked up again each time: servers come and go.
        servers = servers_of(args.servers)
        after, known = scrape(servers), {one.address: one for one in before}
        found = figures([known.get(one.address, one) for one in after], after)
        if args.json:
            print(json_text({"interval_s": args.interval, **found}), flush=True)
        else:
            _show(page(found))
        if args.once:
            return 0 if found["total"]["servers_up"] else 1
        before = after


def _show(lines: list[str]) -> None:
    """In place on a terminal; one page after the other elsewhere."""
    if sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        lines = [line[:width] for line in lines[: height - 1]]
        sys.stdout.write("\x1b[H\x1b[J")
    print("\n".join(lines), flush=True)
