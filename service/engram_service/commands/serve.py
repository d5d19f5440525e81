"""`engram serve`: reads the settings, sets up the logs, runs the server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

HELP = "serve models; keeps every session's state in Redis"


def configure(parser: argparse.ArgumentParser) -> None:
    from engram_service.settings import add_flags

    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    from engram_service.observability.logs import set_up
    from engram_service.settings import SettingError, read_settings

    try:
        settings = read_settings(vars(args), os.environ)
    except SettingError as error:
        print(f"engram serve: {error}", file=sys.stderr)
        return 2
    set_up(settings.log_level, settings.log_format)
    # The server's threads work side by side: numpy's library would have each wait for others at every small product. It
    # reads this once, when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from engram_service.manager.spawning import spawn

    spawned = spawn()  # before this process has imported its own part
    from engram_service.app import serve
    from engram_service.store import StoreError

    try:
        asyncio.run(serve(settings, spawned))
    except SettingError as error:
        print(f"engram serve: {error}", file=sys.stderr)
        return 2
    except (StoreError, OSError) as error:
        print(f"engram serve: {error}", file=sys.stderr)
        return 1
    return 0
