"""The checker finds what it is there for: histories that a faulty service would have left are fed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chaos.checker import Reference, Report, check
from chaos.histories import (
    ANSWER,
    ASKED,
    CLOSED,
    CLOSING,
    FINAL,
    OPENED,
    OUTPUTS,
    PREFILLED,
    ROW,
    SETTLED,
    Writer,
    read,
    rows,
)

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
    """Two lives; between them steps that were applied and never acknowledged; prefilled ones; a copy."""
    final = reference.run(np.array([SESSION]), np.array([STEPS]), {SESSION: [STEPS]})[1][SESSION, STEPS]
    copy = [opened(4, branch=9), answers(outputs, 5, 8, branch=9)]
    first = [
        opened(0),
        answers(outputs, 1, 5),
        rows(PREFILLED, SESSION, np.arange(6, 9)),
        answers(outputs, 9, 12),
        *copy,
    ]
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


@pytest.mark.parametrize(
    ("settled", "lost", "doubled"),
    [(12, 0, 0), (14, 0, 0), (17, 0, 0), (11, 1, 0), (18, 0, 1)],
    ids=["nothing was applied", "a part", "all of it", "less than was acknowledged", "more than was asked for"],
)
@pytest.mark.parametrize("by", [SETTLED, OPENED], ids=["told to its caller", "found by an open"])
def test_steps_that_were_called_off(
    reference: Reference, outputs: NDArray[np.float32], by: int, settled: int, lost: int, doubled: int
) -> None:
    """Acknowledged up to 12, asked for up to 17; what of it was applied is settled by where the session stands next."""
    history = [
        opened(0), answers(outputs, 1, 12), rows(ASKED, SESSION, 15), rows(ASKED, SESSION, 17), rows(by, SESSION, settled),
        answers(outputs, settled + 1, 20),
    ]  # fmt: skip
    report = check([np.concatenate(history)], reference)
    assert numbers(report) == (lost, doubled, 0, 0) and report.hung_up == 1
    assert report.clean == (not lost and not doubled)


def test_a_settled_session_of_a_living_client_does_not_fall_back(
    reference: Reference, outputs: NDArray[np.float32]
) -> None:
    """Its client has what is not durable yet, unlike one that opens the session in another life."""
    history = [
        opened(0, interval=True), answers(outputs, 1, 12, interval=True, durable=8), rows(ASKED, SESSION, 15, interval=True),
        rows(SETTLED, SESSION, 10, interval=True, durable=8),
    ]  # fmt: skip
    assert check([np.concatenate(history)], reference).lost == 2
    history[-1] = rows(SETTLED, SESSION, 13, interval=True, durable=8)
    report = check([np.concatenate(history), opened(8, interval=True)], reference)
    assert report.clean and report.rewound == 5


@pytest.mark.parametrize(
    ("end", "stands", "expected"),
    [
        (CLOSING, 0, (0, 0)), (CLOSING, 12, (0, 0)), (CLOSING, 9, (3, 0)), (CLOSED, 0, (0, 0)), (CLOSED, 12, (0, 12)),
        (None, 0, (12, 0)),
    ],
    ids=["done", "not done", "half of it", "acknowledged", "acknowledged and not done", "detached"],
)  # fmt: skip
def test_a_close_that_was_called_off(
    reference: Reference, outputs: NDArray[np.float32], end: int | None, stands: int, expected: tuple[int, int]
) -> None:
    ending = [] if end is None else [rows(CLOSING, SESSION, 12), *([rows(CLOSED, SESSION, 0)] if end == CLOSED else [])]
    history = [opened(0), answers(outputs, 1, 12), *ending, opened(stands), answers(outputs, stands + 1, 14)]
    report = check([np.concatenate(history)], reference)
    assert (report.lost, report.doubled) == expected and report.clean == (expected == (0, 0))
    assert report.hung_up == (end == CLOSING)


def test_the_state_at_the_end(reference: Reference, outputs: NDArray[np.float32]) -> None:
    good = reference.run(np.array([SESSION]), np.array([STEPS]), {SESSION: [STEPS]})[1][SESSION, STEPS]
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
