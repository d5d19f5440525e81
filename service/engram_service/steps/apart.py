"""A batch in which somebody's row makes the model fail: the rows that do are found, the others are computed. For computing.py.

A token beyond a vocabulary is enough to make a graph fail, and whoever shares the batch must not feel it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_service.runtimes.base import Advanced, Runtime, RuntimeStoppedError

_FAILURES_MAX = 64  # calls of one batch that may fail; then what is left of it is taken for broken


@dataclass(slots=True)
class Parted:
    """What became of a batch, and which of its rows failed."""

    done: Advanced
    broken: NDArray[np.bool_] | None = None  # None: none has
    error: Exception | None = None


def advance(
    runtime: Runtime, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None
) -> Parted:
    """As Runtime.step; raises what it raised where no row can be computed, or where the batch was stopped for its time."""
    try:
        return Parted(runtime.step(slots, inputs, feedback))
    except RuntimeStoppedError:
        raise
    except Exception as error:
        if len(slots) == 1:
            raise
        return _halved(runtime, slots, inputs, feedback, error)


def _halved(
    runtime: Runtime, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None,
    error: Exception,
) -> Parted:  # fmt: skip
    count, failures, done = len(slots), 1, None
    broken = np.ones(count, np.bool_)
    waiting = [slice(0, count // 2), slice(count // 2, count)]
    while waiting and failures < _FAILURES_MAX:
        part = waiting.pop()
        try:
            got = runtime.step(slots[part], inputs[part], None if feedback is None else feedback[part])
        except RuntimeStoppedError:
            raise
        except Exception as failed:
            failures, error, middle = failures + 1, failed, (part.start + part.stop) // 2
            if middle > part.start:
                waiting += [slice(part.start, middle), slice(middle, part.stop)]
            continue
        if done is None:
            done = Advanced(_empty(count, got.outputs), [_empty(count, block) for block in got.states])
        for whole, new in zip((done.outputs, *done.states), (got.outputs, *got.states), strict=True):
            whole[part] = new
        broken[part] = False
    if done is None:
        raise error
    return Parted(done, broken, error)


def _empty(rows: int, like: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.zeros((rows, *like.shape[1:]), like.dtype)
