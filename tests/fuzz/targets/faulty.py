"""A target with three faults: an error, a long time, and an input that is refused as it should be. For the runner's test."""

from __future__ import annotations

import time


def seeds() -> list[bytes]:
    return [b"error", b"slow", b"fine"]


def mend(data: bytes) -> bytes:
    return next((seed for seed in seeds() if seed[:1] == data[:1]), b"fine")


def fuzz_one(data: bytes) -> None:
    if data == b"error":
        raise ValueError("not a typed one")
    if data == b"slow":
        begun = time.thread_time()
        while time.thread_time() - begun < 0.3:
            pass
