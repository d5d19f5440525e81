"""What the SDK's commands share: the server's address, a client for it, and errors as a person reads them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram import Client

DEFAULT_ADDRESS = "127.0.0.1:50051"


def add_address(parser: argparse.ArgumentParser) -> None:
    """Adds --address."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get("ENGRAM_ADDRESS", DEFAULT_ADDRESS),
        help=f"of the server, or several with commas between (default: ENGRAM_ADDRESS or {DEFAULT_ADDRESS})",
    )


def client_of(args: argparse.Namespace) -> Client:
    """A client for --address."""
    from engram import Client, ClientOptions

    return Client([part.strip() for part in args.address.split(",")], ClientOptions(connect_timeout_s=5.0))


def explained(command: str, work: Callable[[], int]) -> int:
    """Runs the work; an EngramError becomes one line on stderr and exit code 1."""
    from engram import EngramError

    # gRPC writes its own lines about lost connections to stderr otherwise.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return work()
    except EngramError as error:
        print(f"engram {command}: {error}", file=sys.stderr)
        return 1
