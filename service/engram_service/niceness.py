"""Who gives way to steps where processors are scarce: what computes for long beside them, and examinations of models."""

from __future__ import annotations

import os
import sys
import threading

NICENESS = 5  # steps go before; and yet a machine that they fill leaves a quarter of a processor


def give_way() -> None:
    """The calling thread does from now on. Of a pool: its `initializer`. Linux alone has the niceness of a thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
