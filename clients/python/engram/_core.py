"""The client's logic without any I/O: which rows go into the next frame, where answers belong, what is sent again.

    submit_*      callers' rows go into the outbox
    frames        the rows that may go now, as frames; _link.py writes them
    receive       an answer from the server, read by _link.py
    lost, attached, dropped    what _link.py tells of the stream

Everything runs on one event loop. The parts: _table.py (sessions as columns), _outbox.py (what is to be sent), _log.py
(what was sent and is not settled), _calls.py (who waits), _state.py (all of these together), _recovery.py (refused rows, resends,
replays), _fates.py (sent steps whose callers were told of a failure), _answers.py (answers), _handles.py (sessions by handle).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._answers import Answers, FrameError
from engram._calls import Answer, Call, Gather
from engram._errors import DataLossError, DeadlineExceededError, EngramError, Fate, make_error, of_detail
from engram._fates import OpenStep, row_bytes
from engram._frames import acknowledge_frame, steps_frames
from engram._handles import Handles
from engram._log import Part
from engram._options import ClientOptions
from engram._recovery import Recovery
from engram._state import ClientState
from engram._table import VOID_HANDLE
from engram.v1 import stream_pb2

_BY_EVENT = {
    stream_pb2.EventFrame.TYPE_TAKEN_OVER: (10, "TAKEN_OVER", "a newer open holds this session"),
    stream_pb2.EventFrame.TYPE_CLOSED: (
        10,
        "SESSION_CLOSED",
        "the session was closed by another client, or has expired",
    ),
}


_PRECISE_S = 1.0  # shorter timeouts of single steps get a timer each


class Core(ClientState):
    """See the module. `wake` is called when there may be something to send; `draining` when the server goes away,
    `attach` when it shall be asked whose these sessions are."""

    def __init__(
        self, options: ClientOptions, base: int, loop: asyncio.AbstractEventLoop, wake: Callable[[], None],
        draining: Callable[[], None], attach: Callable[[NDArray[np.int64]], None],
    ) -> None:  # fmt: skip
        super().__init__(options, base, loop, wake)
        self.recovery = Recovery(self)
        self._draining = draining
        self._attach = attach
        self._handles = Handles(self.table)
        self._answers = Answers(self, self.recovery, self._handles)
        self._live_max = 1024

    # Callers

    def submit_step(self, slot: int, row: bytes, timeout_s: float | None) -> asyncio.Future[NDArray[Any]]:
        """One row of one session; rows that are submitted before the next frame leaves go together."""
        future = Answer(loop=self.loop)
        model = int(self.table.model[slot])
        gather = self.outbox.gather(model)
        if gather is None:
            gather = Gather(self.models[model].output, self.loop)
            self.outbox.put_gather(model, gather)
            self._enlist(gather)
        gather.add(slot, row, math.inf if timeout_s is None else self.loop.time() + timeout_s, future)
        if timeout_s is not None and timeout_s < _PRECISE_S:
            timer = self.loop.call_later(timeout_s, self._expire_one, future)
            future.add_done_callback(lambda _: timer.cancel())
        self.wake()
        return future

    def submit(
        self, call: Call, slots: NDArray[np.int64] | int, timeout_s: float | None, while_stuck: bool = False
    ) -> asyncio.Future[Any]:
        """A call's rows: one of each session of `slots`, or all of one session. The timeout is for the whole call, or, if
        `while_stuck`, for a time in which none of its rows is answered."""
        call.slots = (slots,) if isinstance(slots, int) else slots
        self._enlist(call)
        call.deadline = math.inf if timeout_s is None or while_stuck else self.loop.time() + timeout_s
        if isinstance(slots, int):
            self.outbox.put_long(call, slots)
        else:
            self.outbox.put_wide(call, slots)
        if timeout_s is not None:
            self._arm(call, timeout_s, while_stuck)
        self.wake()
        return call.future

    def _arm(self, call: Call, timeout_s: float, while_stuck: bool) -> None:
        left = call.left

        def expire() -> None:
            if while_stuck and call.left < left:
                self._arm(call, timeout_s, while_stuck)
            elif call.waiting():
                self._fail(call, self._timed_out(call), call.unfinished())

        timer = self.loop.call_later(timeout_s, expire)
        call.future.add_done_callback(lambda _: timer.cancel())

    def _enlist(self, call: Call) -> None:
        self.live.add(call)
        call.gone = self._give_up
        if isinstance(call, Gather):
            # Callers may give up one by one, which nobody is told of: looked through now and then.
            if len(self.live) > self._live_max:
                self.live = {other for other in self.live if other is call or other.waiting()}
                self._live_max = max(1024, 2 * len(self.live))
            return
        call.future.add_done_callback(lambda _: self.live.discard(call))

    def expire(self) -> None:
        """Fails single rows whose time is up; called now and then, which is precise enough for long timeouts."""
        now = self.loop.time()
        for call in list(self.live):
            if isinstance(call, Gather) and call.earliest <= now and (late := call.expired(now)):
                self._fail(call, self._timed_out(call), late)

    def fail_waiting(self, error: EngramError, since: float, limit_s: float) -> None:
        """Fails the calls that have waited for a connection, from `since` on or from their start, longer than the limit."""
        now = self.loop.time()
        for call in list(self.live):
            if not call.waiting():
                self.live.discard(call)
            elif now - max(since, call.started) >= limit_s:
                self._fail(call, error, call.unfinished())
                self.live.discard(call)

    def _expire_one(self, future: Answer) -> None:
        call = future.call()
        if not future.done() and call is not None and future.at is not None:
            self._fail(call, self._timed_out(call), [future.at])

    def _timed_out(self, call: Call) -> EngramError:
        trouble = call.trouble
        if trouble is None and len(call.slots) == 1 and (doubt := self.doubts.get(int(call.slots[0]))) is not None:
            trouble = doubt.trouble  # it waits for an earlier step, for which this is why
        if trouble is not None:
            return trouble.copy()
        return DeadlineExceededError(
            "the timeout passed before the answer came; `applied` says what is known of the step"
        )

    # Callers who get no answer

    def _fail(self, call: Call, error: EngramError, rows: list[int]) -> None:
        """Fails unfinished rows of a call, and says of each what is known of it."""
        fates = self._fates(call, rows)
        call.fail(error, fates)
        self._unwanted(call, rows)

    def _give_up(self, call: Call, at: int | None) -> None:
        """Whoever waited was cancelled."""
        rows = call.unfinished() if at is None else [at]
        self._fates(call, rows)
        self._unwanted(call, rows)

    def fail_row(self, slot: int, seq: int, error: EngramError) -> None:
        call, at = self.call_of(slot, seq)
        if call is not None and call.wanted(at):
            rows = [at] if call.wide else call.unfinished()
            fates = self._fates(call, rows)
            if call.wide:
                call.refuse(at, error.of_step(fates[at]))
            else:
                call.fail(error, fates)

    def _fates(self, call: Call, rows: list[int]) -> dict[int, Fate]:
        """What is known of unfinished rows, by row; from now on the sessions of those that are open are in doubt."""
        fates = {at: Fate(None, False) for at in rows}
        if not call.id:
            return fates
        for slot in {int(call.slots[at]) for at in rows} if call.wide else map(int, call.slots):
            for first, last, owner, place in self.spans(slot):
                for seq in range(first, last + 1) if owner == call.id else ():
                    if (at := place + seq - first) not in fates:
                        continue
                    sure = self.recovery.not_applied(slot, seq)
                    fates[at] = Fate(seq, False if sure else None)
                    if not sure:
                        self.doubts.add(slot, OpenStep(fates[at], seq, row_bytes(call, at), call.flags))
        return fates

    def _unwanted(self, call: Call, rows: list[int]) -> None:
        """Nobody waits for these rows any more: steps that the server has refused are taken back at once."""
        if call.id and self.recovery.active:
            self.recovery.progressed(sorted({int(call.slots[at if call.wide else 0]) for at in rows}))

    async def settle(self, slot: int, timeout_s: float | None) -> list[OpenStep]:
        """The open steps of a session that were applied, when the server has said so of all. Raises DeadlineExceededError."""
        try:
            async with asyncio.timeout(timeout_s):
                while (doubt := self.doubts.get(slot)) is not None and not doubt.ready:
                    waiter = self.loop.create_future()
                    doubt.waiters.append(waiter)
                    await waiter
        except TimeoutError as error:
            if isinstance(error, EngramError) or doubt is None:
                raise
            raised = doubt.trouble or DeadlineExceededError(
                "the timeout passed, and the server has not said what was applied"
            )
            raise raised.of_step(doubt.steps[0].fate) from None
        if doubt is None:
            return []
        steps = self.doubts.decide(slot)
        self.let_on()
        return steps

    # Frames out

    @property
    def pending(self) -> bool:
        return self.outbox.pending or bool(self.due)

    def collect(self) -> None:
        """Decides what goes now."""
        self.due += self.outbox.take()

    def frames(self) -> list[stream_pb2.StreamRequest]:
        """What is to be written now."""
        self.collect()
        due, self.due = self.due, []
        by_model: dict[int, list[Part]] = {}
        for part in due:
            here = self.table.handle[part.slots] != VOID_HANDLE
            if not here.all():
                part = part.only(here)  # sessions that were lost meanwhile
            if len(part.slots):
                by_model.setdefault(part.model, []).append(part)
        frames: list[stream_pb2.StreamRequest] = []
        for model, parts in by_model.items():
            frames += steps_frames(self.table, parts, self.models[model].rows_max, self.loop.time())
        return frames

    def idle_acknowledgements(self) -> stream_pb2.StreamRequest | None:
        """Acknowledges what was answered, of sessions that were as idle the last time this was called."""
        table, count = self.table, self.table.count
        answered = table.answered[:count]
        idle = (answered > table.acked[:count]) & (answered == table.noticed[:count]) & ~table.held[:count]
        table.noticed[:count] = answered
        slots = np.flatnonzero(idle & ~table.lost[:count])
        return acknowledge_frame(table, slots) if len(slots) else None

    # Answers

    def receive(self, response: stream_pb2.StreamResponse) -> None:
        """An answer to rows, or an event. Raises FrameError where it cannot be one."""
        kind = response.WhichOneof("frame")
        if kind == "outputs":
            self._answers.outputs(response.outputs)
        elif kind == "errors":
            self._on_errors(response.errors)
        elif kind == "durable":
            self._answers.durable(response.durable)
        elif kind == "event":
            self._on_event(response.event)

    def _on_errors(self, frame: stream_pb2.ErrorsFrame) -> None:
        errors = [of_detail(detail) for detail in frame.errors]
        if not frame.handles:
            raise FrameError(f"the server could not use a frame: {errors[0] if errors else 'no reason given'}")
        slots = self._handles.slots(frame.handles).tolist()
        seqs = np.frombuffer(frame.seqs, "<i8").tolist()
        indexes = np.frombuffer(frame.error_indexes, "<u4").tolist()
        for slot, seq, index in zip(slots, seqs, indexes, strict=True):
            if slot >= 0:
                self.recovery.refused(slot, seq, errors[index])
        self.recovery.settle_refusals()

    def _on_event(self, frame: stream_pb2.EventFrame) -> None:
        if frame.type == stream_pb2.EventFrame.TYPE_DRAINING:
            self.table.held[self.table.attached()] = True
            self._draining()
            return
        told = _BY_EVENT.get(frame.type)
        if told is None:
            return
        slots = self._handles.slots(frame.handles)
        if frame.type == stream_pb2.EventFrame.TYPE_TAKEN_OVER:
            self.dispute(slots[slots >= 0])
            return
        for slot in slots[slots >= 0].tolist():
            self.lose(slot, make_error(told[0], told[2], told[1]))

    # Sessions come and go

    def enter(self, session_id: str, model: int, window: int, interval: bool, handle: int, seq: int) -> int:
        """A session that was opened; its slot."""
        table = self.table
        slot = table.add(session_id, self.log.oldest)
        table.model[slot], table.window[slot], table.interval[slot] = model, max(1, window), interval
        for name in ("sent", "answered", "durable", "acked", "noticed"):
            getattr(table, name)[slot] = seq
        self.attached(np.array([slot]), np.array([handle]), np.array([seq]))
        return slot

    def attached(self, slots: NDArray[np.int64], handles: NDArray[Any], seqs: NDArray[np.int64]) -> None:
        """These sessions have handles on this stream, and stand at these seqs: what is missing is sent again."""
        table = self.table
        if not len(slots):
            return
        self._handles.enter(handles, slots)
        table.confirmed[slots] = np.minimum(table.answered[slots], seqs)
        safe = np.where(table.interval[slots], table.durable[slots], table.answered[slots])
        self.recovery.said(slots, seqs)
        for slot in slots[(seqs < safe) | (seqs > table.sent[slots])].tolist():
            self.diverged(slot, int(seqs[slots == slot][0]))
        good = slots[~table.lost[slots]]
        # What a record holds is durable.
        table.durable[good] = np.maximum(
            table.durable[good], np.minimum(seqs[~table.lost[slots]], table.answered[good])
        )
        self.recovery.resend(good)

    def diverged(self, slot: int, seq: int) -> None:
        answered = int(self.table.answered[slot])
        message = (
            f"the session stands at step {seq} and this client had answers up to {answered}: the store has lost steps, or"
            " somebody else made some; open the session again to go on from there"
        )
        metadata = {"seq": str(seq), "answered_seq": str(answered)}
        self.lose(slot, DataLossError(message, reason="STATE_REWOUND", metadata=metadata))

    def lost(self) -> None:
        """The stream is gone: nothing is on its way any more."""
        table = self.table
        self._handles.clear()
        table.held[1 : table.count] = True
        table.seen[: table.count] = 0
        self._answers.lost()
        self.due.clear()  # in the log, and sent again from there
        self.recovery.reset()

    def dispute(self, slots: NDArray[np.int64]) -> None:
        table = self.table
        slots = np.unique(slots[~table.lost[slots] & (table.handle[slots] != VOID_HANDLE)])
        if not len(slots):
            return
        self.collect()
        table.handle[slots], table.held[slots], table.seen[slots] = VOID_HANDLE, True, 0
        for slot in slots.tolist():
            self.recovery.drop(slot)  # all that is not answered is sent again after the attach
        self._attach(slots)

    def lose(self, slot: int, error: EngramError) -> None:
        table = self.table
        if table.lost[slot] or slot not in table.ids:
            return
        self.collect()
        table.errors[slot] = error
        table.lost[slot] = table.held[slot] = True
        if table.by_id.get(table.ids[slot]) == slot:
            del table.by_id[table.ids[slot]]
        table.handle[slot] = VOID_HANDLE
        for first, last, owner, at in self.spans(slot):
            call = self.calls[owner]
            call.open -= last - first + 1
            fate = Fate(first, False if self.recovery.not_applied(slot, first) else None)
            call.refuse(at, error.of_step(fate))
            self.closed_rows(call)
        table.head_call[slot], table.more[slot] = 0, False
        table.spans.pop(slot, None)
        self.recovery.drop(slot)
        self.doubts.drop(slot, error)
        for item in self.outbox.forget(slot):
            item.call.refuse(item.at, error.of_step(Fate(None, False)))
        self.log.trim()

    def release(self, slot: int, error: EngramError) -> None:
        """The session was closed or let go by its owner here: its slot is free."""
        self.lose(slot, error)
        self.table.free(slot, self.log.newest)
