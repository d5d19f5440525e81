"""The checker finds what it is there for: histories that a faulty service would have left are fed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chaos.checker import Reference, Report, check
from chaos.histories import ANSWER, FINAL, OPENED, OUTPUTS, QUIET, ROW, Writer, read, rows

STEPS = 30
SESSION = 7


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def outputs(reference: Reference) -> NDArray[np.float32]:
    return reference.run(np.array([SESSION]), np.array([STEPS]), {})[0][SESSION]


def answers(outputs: NDArray[np.float32], first: int, last: int, **columns: Any) -> NDArray[Any]:
    return rows(ANSWER, SESSION, np.arange(first, last + 1), output=outputs[first - 1 : last], **columns)


def opened(seq: int, **columns: Any) -> NDArray[Any]:
    return rows(OPENED, SESSION, seq, **columns)


def numbers(report: Report) -> tuple[int, int, int, int]:
    return report.lost, report.doubled, report.reordered, report.differing


def test_what_is_in_order(reference: Reference, outputs: NDArray[np.float32]) -> None:
    """Two lives; between them steps that were applied and never acknowledged; absorbed ones; a copy."""
    final = reference.run(np.array([SESSION]), np.array([STEPS]), {SESSION: STEPS})[1][SESSION]
    copy = [opened(4, branch=9), answers(outputs, 5, 8, branch=9)]
    first = [opened(0), answers(outputs, 1, 5), rows(QUIET, SESSION, np.arange(6, 9)), answers(outputs, 9, 12), *copy]
    second = [opened(14), answers(outputs, 15, STEPS), rows(FINAL, SESSION, STEPS, output=final)]
    report = check([np.concatenate(first), np.concatenate(second)], reference)
    assert report.clean, report
    assert (report.acknowledged, report.sessions, report.copies) == (12 + 16 + 4, 1, 1)


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        pytest.param(lambda n: [*range(1, 10), *range(11, n + 1)], "lost", id="lost"),
        pytest.param(lambda n: [*range(1, 11), *range(10, n + 1)], "doubled", id="doubled"),
        pytest.param(lambda n: [*range(1, 10), 11, 10, *range(12, n + 1)], "reordered", id="reordered"),
    ],
)
def test_a_server_that_applies_steps_otherwise_than_it_says(
    reference: Reference, outputs: NDArray[np.float32], orders: Callable[[int], list[int]], expected: str
) -> None:
    """The seqs are in order; the outputs are those of a server that left step 10 out, applied it twice, or after the next."""
    wrong = outputs.copy()
    for seq in range(10, STEPS + 1):
        way = orders(seq)
        if len(way) > 1 and max(way) == seq and not (expected == "lost" and seq == 10):
            wrong[seq - 1] = reference.along(SESSION, [way])[0]
    report = check([np.concatenate([opened(0), answers(wrong, 1, STEPS)])], reference)
    assert getattr(report, expected) == 1 and report.differing >= 1, report
    assert sum((report.lost, report.doubled, report.reordered)) == 1


def test_one_bit(reference: Reference, outputs: NDArray[np.float32]) -> None:
    wrong = outputs.copy()
    wrong.view(np.uint32)[17, 3] ^= 1
    report = check([np.concatenate([opened(0), answers(wrong, 1, STEPS)])], reference)
    assert numbers(report) == (0, 0, 0, 1) and "from step 18 on 1 outputs differ: unexplained" in report.problems[0]


@pytest.mark.parametrize(
    ("seqs", "expected"),
    [
        ([1, 2, 4, 5], (1, 0, 0, 0)),
        ([1, 2, 2, 3], (0, 1, 0, 0)),
        ([1, 3, 2, 4], (0, 0, 1, 0)),
    ],
    ids=["lost", "doubled", "reordered"],
)
def test_seqs_that_were_acknowledged(
    reference: Reference, outputs: NDArray[np.float32], seqs: list[int], expected: tuple[int, ...]
) -> None:
    acknowledged = rows(ANSWER, SESSION, np.array(seqs), output=outputs[np.array(seqs) - 1])
    report = check([np.concatenate([opened(0), acknowledged])], reference)
    assert numbers(report) == expected and not report.clean


def test_a_session_that_stands_before_what_was_acknowledged(reference: Reference, outputs: NDArray[np.float32]) -> None:
    lives = [
        np.concatenate([opened(0), answers(outputs, 1, 12)]),
        np.concatenate([opened(9), answers(outputs, 10, 20)]),
    ]
    assert numbers(check(lives, reference)) == (3, 0, 0, 0)


def test_an_interval_session_may_fall_back_to_what_was_durable(
    reference: Reference, outputs: NDArray[np.float32]
) -> None:
    def lives(stands: int) -> list[NDArray[Any]]:
        first = [opened(0, interval=True), answers(outputs, 1, 12, interval=True, durable=8)]
        return [
            np.concatenate(first),
            np.concatenate([opened(stands, interval=True), answers(outputs, stands + 1, 20)]),
        ]

    report = check(lives(8), reference)
    assert report.clean and report.rewound == 4
    report = check(lives(6), reference)
    assert (report.lost, report.rewound) == (2, 4) and not report.clean


def test_the_state_at_the_end(reference: Reference, outputs: NDArray[np.float32]) -> None:
    good = reference.run(np.array([SESSION]), np.array([STEPS]), {SESSION: STEPS})[1][SESSION]
    history = [opened(0), answers(outputs, 1, STEPS)]
    assert check([np.concatenate([*history, rows(FINAL, SESSION, STEPS, output=good)])], reference).clean
    bad = good.copy()
    bad.view(np.uint32)[0] ^= 1
    assert check([np.concatenate([*history, rows(FINAL, SESSION, STEPS, output=bad)])], reference).differing == 1
    late = check([np.concatenate([*history, rows(FINAL, SESSION, STEPS + 1, output=good)])], reference)
    assert late.doubled == 1


def test_a_torn_row_is_dropped(tmp_path: Any, outputs: NDArray[np.float32]) -> None:
    path = tmp_path / "history"
    Writer(path).add(opened(0), answers(outputs, 1, 3))
    with path.open("ab") as file:
        file.write(bytes(ROW.itemsize - 1))
    assert read(path)["seq"].tolist() == [0, 1, 2, 3] and read(path)["output"].shape == (4, OUTPUTS)
