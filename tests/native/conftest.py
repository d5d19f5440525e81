"""What the tests of the native wire share."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture
def loops() -> Iterator[Callable[..., Any]]:
    from wire_loop import Loop  # skips where the extension is not built

    made: list[Loop] = []

    def make(*arguments: Any, **limits: Any) -> Loop:
        made.append(Loop(*arguments, **limits))
        return made[-1]

    yield make
    for loop in made:
        loop.close()
