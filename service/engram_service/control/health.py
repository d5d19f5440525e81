"""How one process of a server has another told of its health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from engram_service.observability.health import Health


def tell_health(health: Health, tell: Callable[..., None]) -> None:
    """Whenever something of it changes, from whichever thread; and now."""
    loop = asyncio.get_running_loop()

    def say() -> None:
        tell("health", **health.told())

    def changed() -> None:
        if threading.current_thread() is threading.main_thread():
            say()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(say)

    health.on_change = changed
    say()
