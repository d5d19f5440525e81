"""What is fuzzed: one module for each kind of bytes that come from outside. Used by test_targets.py and tools/fuzz.py.

Every target is a module with

    seeds()         valid inputs, made by the code that makes them in earnest
    mend(data)      the input with its lengths, checksums and digests put right, so that what was changed gets past them
    fuzz_one(data)  reads the input as the server does; lets the documented errors pass and raises at anything else
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

NAMES = ("frames", "exports", "chunks", "records", "bundles")
FAULTY = "faulty"  # fails, so that the runner can be seen to find it


class Target(Protocol):
    """See above."""

    def seeds(self) -> list[bytes]: ...

    def mend(self, data: bytes) -> bytes: ...

    def fuzz_one(self, data: bytes) -> None: ...


def target(name: str) -> Target:
    """Loads one target: some of them need torch and a model."""
    return cast(Target, import_module(f"targets.{name}"))
