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
_TOKEN_BYTES_MAX = 64 << 10


def add_address(parser: argparse.ArgumentParser) -> None:
    """Adds --address, and how to be let in there."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get("ENGRAM_ADDRESS", DEFAULT_ADDRESS),
        help=f"of the server, or several with commas between (default: ENGRAM_ADDRESS or {DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        default=os.environ.get("ENGRAM_TOKEN_FILE"),
        help="has the token (default: ENGRAM_TOKEN_FILE, or the token itself in ENGRAM_TOKEN)",
    )
    parser.add_argument(
        "--ca",
        metavar="FILE",
        default=os.environ.get("ENGRAM_CA"),
        help="speak TLS; PEM certificates that sign the server's, or `system` (default: ENGRAM_CA); a certificate of one's own"
        " is in the files ENGRAM_CERT and ENGRAM_KEY",
    )
    parser.add_argument(
        "--proxy",
        action="store_true",
        help="go through the proxy that the environment names (https_proxy and the like); it is not used otherwise",
    )


def client_of(args: argparse.Namespace) -> Client:
    """A client for --address."""
    from engram import Client, ClientOptions

    system = args.ca == "system"
    options = ClientOptions(
        connect_timeout_s=5.0, token=_token(args), tls=system, ca_file=None if system else args.ca,
        cert_file=os.environ.get("ENGRAM_CERT"), key_file=os.environ.get("ENGRAM_KEY"), proxy=args.proxy,
    )  # fmt: skip
    return Client([part.strip() for part in args.address.split(",")], options)


def _token(args: argparse.Namespace) -> str | Callable[[], str] | None:
    """A token is never an argument: arguments can be read by everybody on the machine. A file is read again for each connection."""
    from engram import InvalidInputError
    from engram._files import read_file

    def read() -> str:
        try:
            return read_file(args.token_file, _TOKEN_BYTES_MAX).decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InvalidInputError(f"--token-file {args.token_file}: {why}", reason="INVALID_ARGUMENT") from error

    return read if args.token_file else os.environ.get("ENGRAM_TOKEN")


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
