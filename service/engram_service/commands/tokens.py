"""`engram tokens`: makes a token and its table for the tokens file, and checks such a file."""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from engram._json import json_text

HELP = "make a token for a tenant, check a tokens file"

_MANY_DAYS = 36_500


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    new = actions.add_parser("new", help="a new token: printed once, with the table to paste into the tokens file")
    new.add_argument(
        "--tenant", metavar="T", required=True, help="whose sessions it opens; '': those from before tokens"
    )
    new.add_argument(
        "--rights", metavar="R,R", default="read,step", help="of read, step, manage, operate (default: read,step)"
    )
    new.add_argument("--name", metavar="N", help="its name in logs; none: made of the tenant and the time")
    new.add_argument(
        "--days", metavar="D", type=int, help="valid for so many days; none: until it is taken out of the file"
    )
    new.add_argument("--json", action="store_true", help="for programs")
    check = actions.add_parser("check", help="whether a tokens file can be used, and what it says")
    check.add_argument("file", metavar="FILE", type=Path)
    check.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    return _new(args) if args.action == "new" else _check(args)


def _new(args: argparse.Namespace) -> int:
    from engram_service.auth.tenants import usable_tenant
    from engram_service.auth.tokens import RIGHTS, digest_of, new_token, usable_name

    rights = [right.strip() for right in args.rights.split(",")]
    now = datetime.now(UTC)
    name = args.name or f"{args.tenant or 'default'}-{now:%Y%m%d-%H%M%S}".replace(".", "-")
    if unknown := [right for right in rights if right not in RIGHTS]:
        return _wrong(f"--rights {unknown[0]!r}: choose of {', '.join(RIGHTS)}")
    if not usable_tenant(args.tenant) or not usable_name(name):
        return _wrong("--tenant, --name: 1 to 64 letters, digits, dots, dashes and underscores")
    if args.days is not None and not 0 < args.days <= _MANY_DAYS:
        return _wrong(f"--days {args.days}: from 1 to {_MANY_DAYS}")
    token = new_token()
    lines = [
        f"[tokens.{name if re.fullmatch(r'[A-Za-z0-9_-]+', name) else json_text(name)}]",
        f"tenant = {json_text(args.tenant)}",
        f"rights = {json_text(rights)}",
        f"sha256 = {json_text(digest_of(token))}",
    ]
    if args.days is not None:
        lines.append(f"expires = {now + timedelta(days=args.days):%Y-%m-%dT%H:%M:%SZ}")
    table = "\n".join(lines)
    if args.json:
        print(json_text({"name": name, "token": token, "table": table}))
    else:
        print(f"# the token, which is shown this once: hand it to the client\n{token}\n")
        print(f"# append to the tokens file: a running server takes it up within seconds\n{table}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from engram_service.auth.tokens import TokensError, read_book

    try:
        book = read_book(args.file)
    except TokensError as error:
        print(f"engram tokens: {args.file}: {error}", file=sys.stderr)
        return 1
    callers = sorted(book.callers.values(), key=lambda caller: (caller.tenant, caller.token))
    rows = [(one.token, one.tenant, sorted(one.rights), _until(one.expires)) for one in callers]
    if args.json:
        print(json_text([dict(zip(("name", "tenant", "rights", "expires"), row, strict=True)) for row in rows]))
        return 0
    for name, tenant, rights, expires in rows:
        print(f"{name}  tenant {tenant!r}  {', '.join(rights)}{f'  until {expires}' if expires else ''}")
    print(f"{len(rows)} tokens; the file can be used")
    return 0


def _until(seconds: float) -> str:
    return "" if seconds == float("inf") else datetime.fromtimestamp(seconds, UTC).isoformat()


def _wrong(message: str) -> int:
    print(f"engram tokens: {message}", file=sys.stderr)
    return 2
