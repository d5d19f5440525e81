"""Computes a batch: the model's runtime advances the sessions' states in the arena, wave by wave. Called by loop.py."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.places import at
from engram_service.scheduling.scheduler import Batch
from engram_service.sessions.table import SessionTable
from engram_service.steps import apart
from engram_service.steps.advance import Advance
from engram_service.wire.base import FEEDBACK


def advance(served: Served, table: SessionTable, batch: Batch) -> Advance:
    """Runs the batch. The new states are in the arena then, and the outputs are kept there. Raises what the model raised where it
    failed on every row; nothing was written then."""
    started, steps = time.monotonic(), batch.steps
    slots = table.slot[at(steps.rows)]
    feedback = (steps.flags & FEEDBACK).astype(np.bool_) if served.bundle.schema.generates else None
    if feedback is not None and not np.count_nonzero(feedback):
        feedback = None
    if batch.last is None:
        result = apart.advance(served.runtime, slots, steps.inputs, feedback)
        outputs, states, broken, error = result.done.outputs, result.done.states, result.broken, result.error
        sessions, seqs = steps.rows, steps.seqs
    else:
        outputs, broken, error = _waves(served, batch, slots, feedback)
        sessions, seqs, states = steps.rows[batch.last], steps.seqs[batch.last], []
    good = None
    if broken is None:
        served.arena.keep(slots, steps.seqs, outputs)
    else:
        good, kept = np.flatnonzero(~broken), ~(broken if batch.last is None else broken[batch.last])
        sessions, seqs, states = sessions[kept], seqs[kept], [block[kept] for block in states]
        served.arena.keep(slots[good], steps.seqs[good], outputs[good])
    table.computed[at(sessions)] = seqs
    return Advance(
        served, batch, outputs, sessions, seqs, states, good, error, started, time.monotonic(), broken is None, len(batch)
    )  # fmt: skip


def _waves(
    served: Served, batch: Batch, slots: NDArray[np.int32], feedback: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None, Exception | None]:
    """Outputs; rows of sessions of which a step failed, if there are any; why. What stands behind such a one is left out."""
    steps = batch.steps
    outputs = np.zeros((len(batch), served.arena.output_nbytes), np.uint8)
    broken: NDArray[np.bool_] | None = None
    error: Exception | None = None
    for wave in batch.waves:
        rows = np.arange(len(batch)) if wave is None else wave
        if broken is not None:
            rows = rows[~broken[rows]]
        if not len(rows):
            continue
        fed = None if feedback is None else feedback[rows]
        result = apart.advance(served.runtime, slots[rows], steps.inputs[rows], fed)
        outputs[rows] = result.done.outputs
        if result.broken is not None:
            these = np.isin(steps.rows, steps.rows[rows[result.broken]])
            broken, error = these if broken is None else broken | these, result.error
    return outputs, broken, error
