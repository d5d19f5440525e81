"""The order in which an engine thread computes ticks and sends their commits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engram_service.engine.engine import Engine


def played(monkeypatch: pytest.MonkeyPatch, script: str) -> list[str]:
    """What is done with these ticks: lower case is small, upper case a turn of large streams, a point nothing that waits, a question
    mark a turn that may not be had yet."""
    done: list[str] = []
    ticks = iter(script.split())

    class Tick(SimpleNamespace):
        def __len__(self) -> int:
            return 200 if self.turn else 3

    def take(wait: bool, turns: bool) -> Any:
        name = next(ticks, ".")
        assert turns or not name.isupper()
        assert not (turns and name == "?")
        return None if name in ".?" else (0, Tick(name=name, turn=name.isupper(), waves=[None]))

    def computed(engine: Engine, model: int, tick: Any) -> Any:
        done.append(tick.name)
        return lambda: SimpleNamespace(name=tick.name, tags=[0] * len(tick))

    def begin(job: Any) -> Any:
        done.append(f">{job.name}")
        return job

    monkeypatch.setattr(Engine, "_tick", computed)
    engine = object.__new__(Engine)
    engine._queue = SimpleNamespace(take=take)  # type: ignore[assignment]
    engine._store = SimpleNamespace(begin=begin, finish=lambda job: done.append(f"{job.name}<"))  # type: ignore[assignment]
    engine._run()
    return done


@pytest.mark.parametrize(
    ("script", "done"),
    [
        ("a b .", "a >a b a< >b b<"),
        ("A b .", "A b >b b< >A A<"),
        ("A . b .", "A >A b A< >b b<"),
        ("A ? B c .", "A >A B c A< >c c< >B B<"),
        ("A ? b B .", "A >A b A< >b b< B >B B<"),
        ("a B c D .", "a >a a< B c >c c< >B D B< >D D<"),
    ],
    ids=[
        "one computed while the other is written",
        "overtaken",
        "nobody there",
        "the one before is not",
        "between two turns",
        "and so on",
    ],
)
def test_small_ticks_overtake_the_commit_of_a_turn(monkeypatch: pytest.MonkeyPatch, script: str, done: str) -> None:
    assert played(monkeypatch, script) == done.split()
