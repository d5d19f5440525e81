"""Holds histories against a reference run: the same cell, run without any service on the same inputs.

    lost        acknowledged, and not in the session afterwards
    doubled     applied, or acknowledged, twice
    reordered   applied, or acknowledged, in another order
    differing   acknowledged outputs, and states at the end, whose bits are not the reference's
    rewound     not an error: steps of interval sessions that no client was left to replay (server and client died)

A caller that goes away before its answer leaves steps, or a close, whose fate is open: they may have been done or not, whole and in
order, but nothing that was never asked for; where the session is found next settles it. The first two are seen in the seqs at which a session stands, and in the outputs: where bits differ, the checker tries which
single step, left out, taken twice or swapped with its neighbour, gives just what was answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chaos.histories import ANSWER, ASKED, CLOSED, CLOSING, FINAL, MODEL, OPENED, PREFILLED, SETTLED, digest, inputs
from engram_models.bundle import Bundle, Repository, load_bundle, shipped_models_dir, version_key
from engram_models.check import Step
from engram_models.examination import examine
from engram_models.inspection import checked_step

_BATCH_MAX = 256
_GPU_TILE = 256  # batches of the reference are multiples of this there
_SUSPECTS = 24  # steps before the first differing output that are tried for what happened to them


@dataclass
class Report:
    """Sums over all histories."""

    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    differing: int = 0
    rewound: int = 0
    sessions: int = 0
    copies: int = 0
    hung_up: int = 0  # times that a caller went away from steps, or from a close, of a session
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.reordered or self.differing or self.problems)

    def add(self, other: Report) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def numbers(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "problems"}


class Reference:
    """What sessions answer when nothing happens to them, computed by what computes them in a server on such a device."""

    def __init__(self, device: str = "cpu") -> None:
        bundle = reference_bundle()
        self._schema = bundle.schema
        self._initial = bundle.initial_states
        self._step: Step
        if device == "cpu":
            found = examine(bundle, _BATCH_MAX)
            assert found.floor is not None, "the reference needs a batch floor: see Same bits in ARCHITECTURE.md"
            self._step, self._floor = checked_step(bundle, found.batching), found.floor
        else:
            from engram_models.cell_bundles import CellStep, load_cell

            self._step, self._floor = CellStep(load_cell(bundle, device)), _GPU_TILE

    def run(
        self, sessions: NDArray[Any], lengths: NDArray[Any], states_at: Mapping[int, Iterable[int]]
    ) -> tuple[dict[int, NDArray[np.float32]], dict[tuple[int, int], NDArray[np.float32]]]:
        """Outputs [length, OUTPUTS] by session, and digests of the states that sessions have at seqs, by both."""
        outputs: dict[int, NDArray[np.float32]] = {}
        digests: dict[tuple[int, int], NDArray[np.float32]] = {}
        for start in range(0, len(sessions), _BATCH_MAX):
            some = sessions[start : start + _BATCH_MAX]
            Y = self._batch(some, int(lengths[start : start + _BATCH_MAX].max(initial=0)), states_at, digests)
            outputs.update({int(session): Y[:, n] for n, session in enumerate(some)})
        return outputs, digests

    def _batch(
        self, sessions: NDArray[Any], length: int, states_at: Mapping[int, Iterable[int]],
        digests: dict[tuple[int, int], NDArray[np.float32]],
    ) -> NDArray[np.float32]:  # fmt: skip
        wanted: dict[int, list[int]] = {}
        for n, session in enumerate(sessions.tolist()):
            for seq in states_at.get(session, ()):
                wanted.setdefault(seq, []).append(n)
        padded = np.resize(sessions, -(-len(sessions) // self._floor) * self._floor)
        Y = np.empty((length, len(sessions), self._schema.outputs[0].shape[0]), np.float32)
        state = self._initial(len(padded))
        for seq in range(length + 1):
            if seq:
                (y,), state = self._step([inputs(padded, seq)], state)
                Y[seq - 1] = y[: len(sessions)]
            for n in wanted.get(seq, ()):
                digests[int(sessions[n]), seq] = digest([tensor[n] for tensor in state])
        return Y

    def along(self, session: int, orders: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The last output after each of these orders of steps, each of which begins with the session's beginning."""
        longest = max(map(len, orders))
        padded = [*orders, *[orders[0]] * (-len(orders) % self._floor)]
        state = self._initial(len(padded))
        y = np.zeros((len(padded), self._schema.outputs[0].shape[0]), np.float32)
        for place in range(longest):
            seqs = np.array([order[place] if place < len(order) else 0 for order in padded])
            (new_y,), new = self._step([inputs(session, seqs)], state)
            goes = seqs > 0
            y = np.where(goes[:, None], new_y, y)
            state = [
                np.where(goes.reshape(-1, *[1] * (one.ndim - 1)), one, old) for one, old in zip(new, state, strict=True)
            ]
        return list(y[: len(orders)])


def reference_bundle() -> Bundle:
    """The version that a server takes for new sessions."""
    found = [ref for ref in Repository([shipped_models_dir()]).scan()[0] if ref.name == MODEL]
    return load_bundle(max(found, key=lambda ref: version_key(ref.version)).path)


def check(lives: Sequence[NDArray[Any]], reference: Reference) -> Report:
    """`lives`: the histories of one client, in order."""
    report = Report()
    history = np.concatenate(lives) if lives else np.empty(0)
    if not len(history):
        return report
    answers, finals = history[history["kind"] == ANSWER], history[history["kind"] == FINAL]
    sessions = np.unique(history["session"])
    lengths = np.array([_longest(history, session) for session in sessions])
    states_at: dict[int, set[int]] = {}
    for row in finals:
        states_at.setdefault(int(row["session"]), set()).add(int(row["seq"]))
    outputs, digests = reference.run(sessions, lengths, states_at)
    for session, branch, mine in _by_session(history):
        report.sessions += branch == 0
        report.copies += branch != 0
        _check_seqs(f"session {session}" + (f" copy {branch}" if branch else ""), mine, report)
        _check_bits(session, branch, mine, outputs[session], reference, report)
    for row in finals:
        if row["output"].tobytes() != digests[int(row["session"]), int(row["seq"])].tobytes():
            report.differing += 1
            report.problems.append(f"session {row['session']}: its state at step {row['seq']} is not the reference's")
    report.acknowledged = len(answers) + int((history["kind"] == PREFILLED).sum())
    return report


def _longest(history: NDArray[Any], session: int) -> int:
    return int(history["seq"][history["session"] == session].max(initial=0))


def _by_session(history: NDArray[Any]) -> Iterator[tuple[int, int, NDArray[Any]]]:
    key = history["session"].astype(np.uint64) << np.uint64(32) | history["branch"]
    order = np.argsort(key, kind="stable")
    edges = np.flatnonzero(np.diff(key[order])) + 1
    for index in np.split(order, edges):
        mine = history[index]
        yield int(mine["session"][0]), int(mine["branch"][0]), mine


@dataclass
class _Known:
    """What a client knew of a session when it left it, or when the fate of its steps became open."""

    acknowledged: int = 0
    durable: int = 0
    asked: int | None = None  # the last step asked for, where that is known
    closing: bool = False
    closed: bool = False

    @property
    def open(self) -> bool:
        """Whether the fate of steps, or of a close, was open."""
        return (self.closing and not self.closed) or (self.asked or 0) > self.acknowledged

    def stands(self, name: str, seq: int, safe: int, report: Report) -> None:
        """It is found at `seq`: not before what is safe, not after what was asked for; a close may be done or not."""
        if self.closed or (self.closing and seq == 0):
            if seq:
                report.doubled += seq
                report.problems.append(f"{name}: closed, and opened at {seq}")
            self.acknowledged = self.durable = 0
            return
        if seq < safe:
            report.lost += safe - seq
            report.problems.append(f"{name}: opened at {seq}, although {safe} was acknowledged")
        report.rewound += max(0, self.acknowledged - max(seq, safe))
        if self.asked is not None and seq > max(self.asked, self.acknowledged):
            report.doubled += seq - max(self.asked, self.acknowledged)
            report.problems.append(f"{name}: stands at {seq}, and {self.asked} was the last step asked for")


def _check_seqs(name: str, mine: NDArray[Any], report: Report) -> None:
    """Each stretch of a session begins where it stands, and counts on from there."""
    known = _Known()
    starts = np.flatnonzero((mine["kind"] == OPENED) | (mine["kind"] == SETTLED))
    if not len(starts) or mine["kind"][0] != OPENED:
        report.problems.append(f"{name}: its history does not begin with an open")
        return
    for start, stop in zip(starts, [*starts[1:], len(mine)], strict=True):
        stands, opened = int(mine["seq"][start]), mine["kind"][start] == OPENED
        # A client that lives has the steps that are not durable yet, and replays them.
        known.stands(name, stands, known.durable if opened and mine["interval"][start] else known.acknowledged, report)
        life = mine[start + 1 : stop]
        steps = life[(life["kind"] == ANSWER) | (life["kind"] == PREFILLED)]
        _check_life(name, stands, steps["seq"].astype(np.int64), report)
        for final in life[life["kind"] == FINAL]["seq"].tolist():
            last = int(steps["seq"].max(initial=stands))
            if final != last:
                report.lost += max(0, last - final)
                report.doubled += max(0, final - last)
                report.problems.append(f"{name}: stands at {final} at the end, and {last} was acknowledged")
        asked = life["seq"][life["kind"] == ASKED]
        known = _Known(
            acknowledged=int(steps["seq"].max(initial=stands)),
            durable=int(steps["durable"].max(initial=stands if opened else known.durable)),
            asked=int(asked.max()) if len(asked) else None,
            closing=CLOSING in life["kind"],
            closed=bool(len(life)) and life["kind"][-1] == CLOSED,
        )
        report.hung_up += known.open


def _check_life(name: str, stands: int, seqs: NDArray[np.int64], report: Report) -> None:
    if (seqs == np.arange(stands + 1, stands + 1 + len(seqs))).all():
        return
    doubled = len(seqs) - len(np.unique(seqs))
    missing = len(np.setdiff1d(np.arange(stands + 1, seqs.max() + 1), seqs))
    once = np.array(list(dict.fromkeys(seqs.tolist())))
    reordered = int((np.diff(once) < 0).sum())
    report.doubled, report.lost, report.reordered = (
        report.doubled + doubled, report.lost + missing, report.reordered + reordered,
    )  # fmt: skip
    report.problems.append(
        f"{name}: after {stands}: {doubled} steps twice, {missing} missing, {reordered} out of order"
    )


def _check_bits(
    session: int, branch: int, mine: NDArray[Any], expected: NDArray[np.float32], reference: Reference, report: Report
) -> None:
    answers = mine[mine["kind"] == ANSWER]
    if not len(answers):
        return
    same = (answers["output"].view(np.uint32) == expected[answers["seq"] - 1].view(np.uint32)).all(axis=1)
    if same.all():
        return
    report.differing += int((~same).sum())
    first = answers[np.argmin(same)]
    what = explain(session, int(first["seq"]), first["output"], reference)
    for word in what:
        setattr(report, word.split()[0], getattr(report, word.split()[0]) + 1)
    where = f"session {session}" + (f" copy {branch}" if branch else "")
    report.problems.append(
        f"{where}: from step {first['seq']} on {(~same).sum()} outputs differ: {', '.join(what) or 'unexplained'}"
    )


def explain(session: int, seq: int, output: NDArray[np.float32], reference: Reference) -> list[str]:
    """Which step before this one, lost, doubled or reordered, gives this output; nothing if none does."""
    every = list(range(1, seq + 1))
    suspects = range(max(1, seq - _SUSPECTS), seq + 1)
    orders: dict[str, list[int]] = {}
    for step in suspects:
        if step < seq:
            orders[f"lost {step}"] = every[: step - 1] + every[step:]
            orders[f"reordered {step}"] = [*every[: step - 1], step + 1, step, *every[step + 1 :]]
        orders[f"doubled {step}"] = every[:step] + every[step - 1 :]
    found = reference.along(session, list(orders.values()))
    return [name for name, y in zip(orders, found, strict=True) if y.tobytes() == output.tobytes()][:1]
