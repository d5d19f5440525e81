"""A target with two faults: an error, and an input that takes long. For the runner's test."""

from __future__ import annotations

import time


def seeds() -> list[bytes]:
    return [b"fine"]


def mend(data: bytes) -> bytes:
    return (b"error", b"slow", b"fine")[sum(data) % 3]


def fuzz_one(data: bytes) -> None:
    if data == b"error":
        raise ValueError("not a typed one")
    if data == b"slow":
        begun = time.thread_time()
        while time.thread_time() - begun < 0.3:
            pass
