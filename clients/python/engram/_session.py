"""A session, as a caller has it. AsyncClient.open makes them; everything is done by the client's core and link."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram._calls import FEEDBACK, PREFILL, Call
from engram._core import Core
from engram._errors import EngramError, FailedPreconditionError, Fate, InvalidInputError, SessionClosedError
from engram._manage import Sessions
from engram._memories import refused
from engram._options import UNSET
from engram._patterns import Patterns, Recreation, Stored
from engram._source import inputs_of
from engram._tensors import Codec, Input
from engram._types import ModelInfo, Settled

_T = TypeVar("_T")


class Owner(Protocol):
    """What a session needs of the client that opened it."""

    sessions: Sessions

    @property
    def _core(self) -> Core: ...

    def _timeout(self, timeout: float | None) -> float | None:
        """As it was given -> as it is. Raises EngramError where this client cannot be used."""

    async def _open(
        self, model: str, ids: Sequence[str], version: str, durability: int, timeout: float | None
    ) -> list[Session]:
        """Opens sessions of these ids."""

    async def _let_go(self, sessions: Sequence[Session], detach: bool, timeout: float | None) -> None:
        """Ends sessions, or lets go of them."""


class Session:
    """One sequence on one model version; made by `AsyncClient.open`.

    Steps of one session are applied in the order in which they were called. A step that fails for good (a NaN, say) is as
    if it had not been made: steps called after it are applied all the same. A call of many rows (`run`, `prefill`) stops at
    its first failing row; `error.metadata["row"]` says which.

    A step that timed out, was cancelled or failed with the connection is taken back if it had not left, or if the server is sure
    that it was not applied: then `error.applied` is False. Else its fate is open, None, and nothing more is sent for the session
    until the server has said what became of it. `settle` asks for that. Who does not ask: a next call that begins with the very
    same inputs is taken as the repeat, and they are applied once; any other goes behind the steps that were applied.

    An input is an array where the model has one, and a dict of arrays by name where it has several; outputs alike.
    Arrays are copied when a method is called: what the caller writes into them afterwards, before the call is awaited or its
    frame has left, is not sent.

    Every method takes `timeout` in seconds (None: no limit; not given: the client's) and raises EngramError.
    """

    def __init__(self, client: Owner, slot: int, session_id: str) -> None:
        self._client = client
        self._slot = slot
        self._uid = client._core.table.base + slot
        self._id = session_id
        self._last_seq = 0

    def __repr__(self) -> str:
        return f"<engram session {self._id!r} at step {self.seq}>"

    @property
    def id(self) -> str:
        """The session's id."""
        return self._id

    @property
    def seq(self) -> int:
        """The number of the last step that is known to be applied; 0 before the first. A step whose fate is open is not counted
        until that is decided, see `settle`."""
        return self._last_seq if self._uid < 0 else self._client._core.doubts.seq(self._slot)

    @property
    def in_doubt(self) -> bool:
        """Whether there are steps whose fate is open, see `settle`."""
        return self._uid >= 0 and bool(self._client._core.table.doubt[self._slot])

    @property
    def durable_seq(self) -> int:
        """The number of the last answered step known to be safe in Redis: `seq`, unless durability is "interval"."""
        if self._uid < 0:
            return self._last_seq
        table = self._client._core.table
        return min(self.seq, int(table.durable[self._slot])) if table.interval[self._slot] else self.seq

    @property
    def model(self) -> ModelInfo:
        """The model version that the session is on."""
        return self._client._core.models[self._model_index].info

    def step(self, x: Input, *, timeout: float | None = UNSET) -> Coroutine[Any, Any, Any]:
        """One input [*input shape] -> its output [*output shape]. Steps that are ready together leave as one frame."""
        try:
            row = self._codec.one(x)
        except EngramError as error:
            return refused(error)
        return self._step(row, timeout)

    async def _step(self, row: bytes | EngramError, timeout: float | None) -> Any:
        """The step of an input that was taken; an error that it was refused with is raised here."""
        if isinstance(row, EngramError):
            raise row
        slot = self._live()
        return await self._client._core.submit_step(slot, row, self._client._timeout(timeout))

    def run(self, X: Input, *, timeout: float | None = UNSET) -> Coroutine[Any, Any, Any]:
        """Inputs [T, *input shape] -> outputs [T, *output shape], pipelined."""
        try:
            inputs = self._codec.many(X)
        except EngramError as error:
            return refused(error)
        return self._submit(len(inputs), inputs, 0, timeout)

    def prefill(self, X: Input, *, timeout: float | None = UNSET) -> Coroutine[Any, Any, None]:
        """Takes inputs [T, *input shape] in, and gives no outputs."""
        try:
            inputs = self._codec.many(X)
        except EngramError as error:
            return refused(error)
        return self._submit(len(inputs), inputs, PREFILL, timeout)

    async def generate(self, k: int, *, timeout: float | None = UNSET) -> Any:
        """k further outputs [k, *output shape], each the next one's input; the first input is the last output."""
        link = self._client._core.models[self._model_index]
        if k < 0:
            raise InvalidInputError(
                f"generate takes the number of outputs, 0 or more; got {k}", reason="INVALID_ARGUMENT"
            )
        if not link.info.generates:
            message = f"model {link.info.name} cannot run on its own output: its output is not of its input's shape"
            raise FailedPreconditionError(message, reason="CANNOT_GENERATE")
        return await self._submit(k, None, FEEDBACK, timeout)

    async def stream(
        self,
        source: Iterable[Input] | AsyncIterable[Input] | Mapping[str, ArrayLike],
        *,
        ahead: int = 64,
        timeout: float | None = UNSET,
    ) -> AsyncIterator[Any]:
        """One output for each input of any (async) iterable, in order, as soon as it is there. A dict is one of arrays as `run`
        takes it.

        At most `ahead` steps are on their way at once, and at most one further item is taken from the source meanwhile. An item
        is copied as it is taken, before the source is asked for the next one: it may use one buffer for all of them. A plain
        iterable that is no list or array is read in a thread of its own. What the source raises is raised here, after the
        outputs of all inputs before it. Ends with the source; leaving the loop early leaves the session usable.
        """
        if ahead < 1:
            raise InvalidInputError(f"ahead is a whole number from 1; got {ahead}", reason="INVALID_ARGUMENT")
        outputs: deque[asyncio.Task[Any]] = deque()
        if isinstance(source, Mapping):
            inputs = inputs_of(self._codec.many(source), lambda row: row.tobytes())
        else:
            inputs = inputs_of(source, self._taken)
        next_input: asyncio.Task[bytes | EngramError] | None = None
        failure: BaseException | None = None
        ended = False
        try:
            while not ended or outputs:
                if next_input is None and not ended and len(outputs) < ahead:
                    next_input = asyncio.ensure_future(anext(inputs))
                waiting: set[asyncio.Task[Any]] = {outputs[0]} if outputs else set()
                if next_input is not None:
                    waiting.add(next_input)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if next_input is not None and next_input.done():
                    error = next_input.exception()
                    if error is not None:
                        ended, failure = True, None if isinstance(error, StopAsyncIteration) else error
                    else:
                        outputs.append(asyncio.ensure_future(self._step(next_input.result(), timeout)))
                    next_input = None
                while outputs and outputs[0].done():
                    yield outputs.popleft().result()
            if failure is not None:
                raise failure
        finally:
            for task in (*outputs, *(() if next_input is None else (next_input,))):
                task.cancel()
            await asyncio.gather(*outputs, *(() if next_input is None else (next_input,)), return_exceptions=True)
            await inputs.aclose()

    async def settle(self, *, timeout: float | None = UNSET) -> Settled:
        """What became of the steps whose fate is open: returns when the server has said so of all of them. Those that were applied
        count from now on, and the next call goes behind them. Without such steps it returns at once.

        Raises DeadlineExceededError or UnavailableError when it cannot be known in time; the fate then stays open.
        """
        client, slot = self._client, self._live()
        core = client._core
        steps = await core.settle(slot, client._timeout(timeout))
        codec = core.models[core.table.model[slot]].output
        outputs = codec.empty(len(steps))
        for place, step in enumerate(steps):
            if step.output is not None:
                outputs[place] = step.output
        return Settled(self.seq, len(steps), codec.given(outputs))

    async def state(self, *, timeout: float | None = UNSET) -> dict[str, NDArray[Any]]:
        """The state tensors by name, without the batch dimension, after the last step that was applied. Settles first."""
        await self.settle(timeout=timeout)
        return await self._client.sessions.state(self._id, min_seq=self.seq, timeout=timeout)

    def store(
        self, patterns: ArrayLike, labels: Sequence[str] | str | None = None, *, timeout: float | None = UNSET
    ) -> Coroutine[Any, Any, Stored]:
        """Adds patterns [n, N], or one [N], to the session's memory: of -1 and +1, or of 0 and 1, or of booleans.

        All of them are stored or none, and in Redis when this returns; beyond some megabytes they go in parts, which are
        taken back if a later one is refused. Labels are one a pattern, each once in a memory; None: the server numbers them
        "p0", "p1" and so on. Raises InvalidInputError, AlreadyExistsError (DUPLICATE_LABEL), FailedPreconditionError (MEMORY_FULL,
        or UNSUPPORTED_OPERATION: the model keeps no patterns).
        """
        return self._alive(self._client.sessions.store(self._id, patterns, labels, timeout=timeout))

    def recall(
        self,
        cue: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        synchronous: bool = False,
        seed: int = 0,
        sweeps_max: int = 100,
        timeout: float | None = UNSET,
    ) -> Coroutine[Any, Any, Any]:
        """What a cue [N] brings back: a Recall; of many cues [n, N], a list of them.

        mask: bool, [N] or like the cue, True where a bit is unknown; what the cue has there is not looked at. A masked array's
        own mask says the same. Units are updated one after the other in a random order drawn from `seed`, or all at once if
        `synchronous`, until nothing changes or `sweeps_max` sweeps are over. Any server answers, from what is in Redis; whoever
        has the session open is not disturbed. Raises InvalidInputError (INVALID_PATTERN, CUE_ALL_MASKED), FailedPreconditionError
        (EMPTY_MEMORY).
        """
        work = self._client.sessions.recall(
            self._id, cue, mask, synchronous=synchronous, seed=seed, sweeps_max=sweeps_max, timeout=timeout
        )
        return self._alive(work)

    async def forget(
        self, labels: Sequence[str] | str | None = None, *, all: bool = False, timeout: float | None = UNSET
    ) -> int:
        """Removes the patterns with these labels, or all of them; how many they were. Raises NotFoundError (UNKNOWN_LABEL), and
        then keeps every one."""
        self._live()
        return await self._client.sessions.forget(self._id, labels, all=all, timeout=timeout)

    async def patterns(self, *, values: bool = False, timeout: float | None = UNSET) -> Patterns:
        """What the memory holds: labels, and with `values` the patterns themselves."""
        self._live()
        return await self._client.sessions.patterns(self._id, values=values, timeout=timeout)

    def address(
        self, key: ArrayLike, strength: ArrayLike = 1.0, *, timeout: float | None = UNSET
    ) -> Coroutine[Any, Any, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Looks a key [M] up in the memory of a Neural Turing Machine, as it stands in Redis now, and changes nothing.

        The weighting [N] over its locations, a softmax of strength times cosine, and what is read under it [M]. Of many keys
        [n, M], with one strength or [n], they are [n, N] and [n, M].
        """
        return self._alive(self._client.sessions.address(self._id, key, strength, timeout=timeout))

    def recreate(
        self, x: ArrayLike, mask: ArrayLike | None = None, *, sweeps: int = 1, timeout: float | None = UNSET
    ) -> Coroutine[Any, Any, Recreation]:
        """What the session's model, a Boltzmann machine or belief network, makes of an input [visible] or of many [n, visible].

        Values are 0 to 1. mask: bool, True where a unit is unknown: it is filled in, and the others keep their values; without
        one, all are recreated. A masked array's own mask says the same.
        """
        return self._alive(self._client.sessions.recreate(self._id, x, mask, sweeps=sweeps, timeout=timeout))

    async def fork(self, session_id: str | None = None, *, timeout: float | None = UNSET) -> Session:
        """A new session, opened, that stands after the last step of this one that was applied. Settles first."""
        index = self._model_index
        await self.settle(timeout=timeout)
        info = await self._client.sessions.fork(self._id, session_id, min_seq=self.seq, timeout=timeout)
        link = self._client._core.models[index]
        opened = await self._client._open(link.info.name, [info.id], info.version, link.durability, timeout)
        return opened[0]

    async def close(self, *, timeout: float | None = UNSET) -> None:
        """Ends the session and deletes its record. Closing twice is no error."""
        await self._client._let_go([self], detach=False, timeout=timeout)

    async def detach(self, *, timeout: float | None = UNSET) -> None:
        """Lets go of the session and keeps its record: `open` carries on from there."""
        await self._client._let_go([self], detach=True, timeout=timeout)

    async def _submit(self, rows: int, inputs: NDArray[Any] | None, flags: int, timeout: float | None) -> Any:
        """The rows' outputs; None of a prefill."""
        slot = self._live()
        core = self._client._core
        codec = None if flags & PREFILL else core.models[core.table.model[slot]].output
        if not rows:
            return None if codec is None else codec.given(codec.empty(0))
        call = Call(rows, inputs, codec, flags, False, core.loop)
        # A long run takes as long as it takes: the client's own timeout is for a server that no longer answers.
        return await core.submit(call, slot, self._client._timeout(timeout), while_stuck=timeout == UNSET)

    async def _alive(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What a call by id gives, if the session is open here."""
        try:
            self._live()
        except EngramError:
            work.close()
            raise
        return await work

    @property
    def _codec(self) -> Codec:
        return self._client._core.models[self._model_index].input

    def _taken(self, x: Input) -> bytes | EngramError:
        """An input as it is sent, copied; or what it is refused with."""
        try:
            return self._codec.one(x)
        except EngramError as error:
            return error

    @property
    def _model_index(self) -> int:
        return int(self._client._core.table.model[self._live()])

    def _live(self) -> int:
        """The slot. Raises what the session was lost to."""
        if self._uid < 0:
            message = f"session {self._id!r} was closed here"
            raise SessionClosedError(message, reason="SESSION_CLOSED").of_step(Fate(None, False))
        table = self._client._core.table
        if table.lost[self._slot]:
            raise table.error_of(self._slot)
        return self._slot

    def _let_go(self, error: EngramError) -> None:
        """The slot is given back; the object is void."""
        if self._uid >= 0:
            self._last_seq = self.seq
            self._uid = -1
            self._client._core.release(self._slot, error)
