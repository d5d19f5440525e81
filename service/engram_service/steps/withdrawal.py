"""Takes waiting rows back out, when their session, stream or model goes, or their time is up. Event loop only.

Their sessions will expect those seqs again; whoever waits for one of these steps is told.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.condition import Condition
from engram_service.errors import ServiceError
from engram_service.scheduling.columns import Steps
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.table import SessionTable
from engram_service.steps.answers import Answers
from engram_service.steps.refusals import behind_late, closed, gaps
from engram_service.steps.repeats import Repeats


class Withdrawal:
    """Of rows that no batch has taken."""

    def __init__(
        self, scheduler: Scheduler, table: SessionTable, answers: Answers, repeats: Repeats, condition: Condition
    ) -> None:
        self._scheduler = scheduler
        self._table = table
        self._answers = answers
        self._repeats = repeats
        self._condition = condition

    def of_sessions(self, sessions: NDArray[Any], refusal: ServiceError) -> None:
        self._tell(self._scheduler.drop_sessions(sessions), refusal)

    def of_model(self, model: int, refusal: ServiceError) -> None:
        self._tell(self._scheduler.drop_model(model), refusal)

    def of_stream(self, stream: int) -> None:
        """The stream is gone, and need not be told."""
        if (steps := self._scheduler.drop_stream(stream)) is not None:
            self._expect_again(steps)
            self._repeats.refuse(self._table.refer(steps.rows), closed(), dropped=True)

    def late(self, now: float) -> None:
        """Rows whose time is up, and those that cannot run without them."""
        if (steps := self._scheduler.drop_late(now)) is None:
            return
        self._expect_again(steps)
        late = steps.deadlines < now
        if late.any():
            self._answers.refuse_all(steps[late], self._condition.late())
        if not late.all():
            own = steps[~late]
            behind = gaps(np.ones(len(own), np.bool_), self._table.admitted[own.rows])
            self._answers.refuse(own.streams, own.handles, own.seqs, behind)
        self._repeats.refuse(self._table.refer(steps.rows), behind_late(), dropped=True)

    def _tell(self, steps: Steps | None, refusal: ServiceError) -> None:
        if steps is not None:
            self._expect_again(steps)
            self._answers.refuse_all(steps, refusal)
            self._repeats.refuse(self._table.refer(steps.rows), refusal, dropped=True)

    def _expect_again(self, steps: Steps) -> None:
        np.minimum.at(self._table.admitted, steps.rows, steps.seqs - np.uint64(1))
