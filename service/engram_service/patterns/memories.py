"""Store, forget, recall and list, from what Redis has. Blocking; called by protocols/engram/memory.py in threads of its own.

Nobody claims a session for this. Every call first asks Redis what the memory is at, and catches up with its log; a recall is
then answered from what is at hand. A change is checked against that, and written by a script that refuses if the log has
grown meanwhile: then it is checked again. A call that is repeated is found in the log by its operation id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engram_models import PatternError, PatternMemory, Recalled
from engram_service.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ServiceError,
    UnavailableError,
    no_session,
)
from engram_service.offers import Offer
from engram_service.patterns.cache import Cache, Slot
from engram_service.patterns.chunks import FORGET, STORE, ChunkError, Operation, begins_log
from engram_service.patterns.held import Held, unfold
from engram_service.store import MemoryHead, Store, Written

_TRIES = 50  # of a change, while others change the same memory

T = TypeVar("T")
Resolve = Callable[[str, str], Offer]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a memory has: count and load (patterns a bit), bits of a pattern, and the rule that they are learnt by."""

    count: int
    load: float
    size: int
    rule: str


@dataclass(frozen=True, slots=True)
class Change:
    """What a store or forget did; `first` is the number of the first label, where the server made them."""

    rows: int
    first: int
    warning: str
    summary: Summary


class Memories:
    """The memories of all sessions. Thread-safe; methods raise ServiceError and StoreUnavailableError."""

    def __init__(self, resolve: Resolve, store: Store, cache_nbytes: int) -> None:
        self.cache = Cache(cache_nbytes)
        self._resolve = resolve
        self._store = store
        self._logs = store.memories

    def store(
        self, session_id: str, operation: bytes, size: int, bits: NDArray[np.uint8], labels: Sequence[str]
    ) -> Change:
        """Adds patterns of `size` bits, uint8 [n, bytes]; without labels they are numbered. All of them or none."""

        def change(held: Held) -> tuple[list[bytes], str]:
            numbers, first, named = held.numbers, 0, labels
            if not named:
                first = _first_number(held, len(bits))
                named = [f"p{first + row}" for row in range(len(bits))]
                numbers = first + len(bits)
            _check_size(held.memory, size)
            warning = held.memory.check(bits, named)
            return held.stored(Operation(operation, first, len(bits), STORE), bits, named, numbers), warning

        return self._change(session_id, operation, change)

    def forget(self, session_id: str, operation: bytes, labels: Sequence[str] | None) -> Change:
        """Removes these patterns, or none of them if one is not there; None: all that there are."""

        def change(held: Held) -> tuple[list[bytes], str]:
            if labels is None:
                return held.emptied(Operation(operation, 0, held.memory.count, FORGET)), ""
            _check_known(held.memory, labels)
            return held.forgot(Operation(operation, 0, len(labels), FORGET), labels), ""

        return self._change(session_id, operation, change)

    def recall(
        self, session_id: str, cues: NDArray[np.int8], synchronous: bool, seed: int, sweeps_max: int
    ) -> tuple[str, list[Recalled]]:
        """The model's name, and what each of the cues int8 [n, size] (-1, +1, 0 unknown) recalls."""

        def work(served: Offer, memory: PatternMemory) -> tuple[str, list[Recalled]]:
            _check_size(memory, cues.shape[1])
            return served.bundle.name, memory.recall(cues, synchronous=synchronous, seed=seed, sweeps_max=sweeps_max)

        return self._read(session_id, work)

    def page(self, session_id: str, start: int, count: int) -> tuple[list[str], NDArray[np.uint8], Summary]:
        """Labels and bits of so many patterns from a place on, and what there is in all."""

        def work(served: Offer, memory: PatternMemory) -> tuple[list[str], NDArray[np.uint8], Summary]:
            part = slice(start, start + count)
            return list(memory.labels[part]), np.array(memory.bits[part]), _summary(memory)

        return self._read(session_id, work)

    def check_log(self, served: Offer, chunks: Sequence[bytes]) -> None:
        """Raises ChunkError where this log is none for the model."""
        own = served.queries.patterns
        if own is None:
            raise ChunkError(f"{served.reference} keeps no patterns")
        unfold(own, chunks)

    # Reading

    def _read(self, session_id: str, work: Callable[[Offer, PatternMemory], T]) -> T:
        served, head = self._look(session_id)
        slot = self.cache.slot(session_id)
        with slot.lock:
            held = self._caught_up(session_id, slot, served, head)
            self.cache.used(session_id, slot)
            slot.enter()
        try:
            if held is not None:
                return self._asked(served, held.memory, work)
        finally:
            slot.leave()
        return self._asked(served, _own(served), work)  # never changed, so that no lock is needed

    def _asked(self, served: Offer, memory: PatternMemory, work: Callable[[Offer, PatternMemory], T]) -> T:
        try:
            return work(served, memory)
        except PatternError as error:
            raise _refusal(error) from error

    def _look(self, session_id: str) -> tuple[Offer, MemoryHead]:
        head = self._logs.look(session_id)
        if head is None:
            raise no_session(session_id)
        self._store.tally.renew(session_id)  # as the look has renewed the session's own time
        served = self._resolve(head.model, head.version)
        _own(served)
        if served.bundle.fingerprint != head.fingerprint:
            message = f"the session was written by other weights of {served.reference}; serve those or move the session"
            raise FailedPreconditionError("FINGERPRINT_MISMATCH", message)
        return served, head

    def _caught_up(self, session_id: str, slot: Slot, served: Offer, head: MemoryHead) -> Held | None:
        """What the log says, at least as far as `head` tells; None: the session has no patterns but its model's."""
        held, losses = slot.held, self._store.losses
        same = (slot.fingerprint, slot.created_ms) == (head.fingerprint, head.created_ms)
        gone = not head.length and (head.revision or (held is not None and losses > held.losses))
        if held is not None and same and (gone or held.outgrew(head.revision)):
            self._write_back(session_id, held, head)
        elif not head.revision:
            held = None
        elif held is None or not same or held.revision != head.revision:
            slot.held = None  # until it is known to be right
            slot.until_quiet()
            held = self._read_log(session_id, served, held if same else None)
        slot.held, slot.fingerprint, slot.created_ms = held, head.fingerprint, head.created_ms
        if held is not None:
            held.losses = losses
        return held

    def _read_log(self, session_id: str, served: Offer, held: Held | None) -> Held:
        own = _own(served)
        try:
            if held is not None:
                new = self._logs.chunks(session_id, held.length)
                if new and held.follow(new):
                    return held
            chunks = self._logs.chunks(session_id)
            if not chunks:
                raise ChunkError("Redis has lost it")
            return unfold(own, chunks)
        except ChunkError as error:
            message = f"the session's memory cannot be used ({error}); close the session to start over"
            raise DataLossError("RECORD_CORRUPTED", message) from error

    def _write_back(self, session_id: str, held: Held, head: MemoryHead) -> None:
        """Redis has lost the log, or the end of it, and this server has what it said."""
        chunks = held.whole()
        if self._logs.write(session_id, head, chunks, replace=True) is not Written.DONE:
            raise UnavailableError(
                "STORE_UNAVAILABLE", "the memory is being written back; try again", retry_after_ms=50
            )
        held.replaced(chunks)

    # Changing

    def _change(self, session_id: str, operation: bytes, change: Callable[[Held], tuple[list[bytes], str]]) -> Change:
        """`change` says which chunks come next, given what the memory is."""
        for _ in range(_TRIES):
            served, head = self._look(session_id)
            slot = self.cache.slot(session_id)
            with slot.lock:
                try:
                    made = self._changed(session_id, slot, served, head, operation, change)
                finally:
                    self.cache.used(session_id, slot)
            if made is not None:
                return made
        raise UnavailableError("STORE_UNAVAILABLE", "too many change this memory at once; try again", retry_after_ms=50)

    def _changed(
        self, session_id: str, slot: Slot, served: Offer, head: MemoryHead, operation: bytes,
        change: Callable[[Held], tuple[list[bytes], str]],
    ) -> Change | None:  # fmt: skip
        """None: the memory was changed by others just now."""
        held = self._caught_up(session_id, slot, served, head) or Held(_own(served))
        done = held.operations.get(operation)
        if done is not None:
            return Change(done.rows, done.first, "", _summary(held.memory))
        try:
            chunks, warning = change(held)
        except PatternError as error:
            raise _refusal(error) from error
        begins = begins_log(chunks[0])
        known = MemoryHead(head.model, head.version, head.fingerprint, held.revision, held.length, head.created_ms)
        written = self._logs.write(session_id, known, chunks, replace=begins)
        if written is Written.CHANGED:
            return None
        if written is Written.NO_SESSION:
            raise no_session(session_id)
        slot.held = None
        slot.until_quiet()
        if begins:
            held.restart(chunks)
        else:
            held.follow(chunks)
        self._tidy(session_id, held, known)
        slot.held, held.losses = held, self._store.losses
        done = held.operations[operation]
        return Change(done.rows, done.first, warning, _summary(held.memory))

    def _tidy(self, session_id: str, held: Held, known: MemoryHead) -> None:
        """Replaces a log that is much longer than what it says. If it fails, the next change sees to it."""
        if held.wasteful:
            at = MemoryHead(known.model, known.version, known.fingerprint, held.revision, held.length, known.created_ms)
            chunks = held.whole()
            if self._logs.write(session_id, at, chunks, replace=True) is Written.DONE:
                held.replaced(chunks)


def _own(served: Offer) -> PatternMemory:
    """The patterns that the model brings along. Raises FailedPreconditionError where its sessions keep none."""
    own = served.queries.patterns
    if own is None:
        message = (
            f"{served.reference} is of kind {served.bundle.kind}, which keeps no patterns; a hopfield network does"
        )
        raise FailedPreconditionError("UNSUPPORTED_OPERATION", message, model=served.bundle.name)
    return own


def _summary(memory: PatternMemory) -> Summary:
    return Summary(memory.count, memory.load, memory.size, memory.rule)


def _first_number(held: Held, rows: int) -> int:
    """A number from which on no label p{number} is taken."""
    first = held.numbers
    while any(held.memory.contains(f"p{first + row}") for row in range(rows)):
        first += rows
    return first


def _check_known(memory: PatternMemory, labels: Sequence[str]) -> None:
    if len(set(labels)) < len(labels):
        raise PatternError("DUPLICATE_LABEL", "a label stands twice among those to forget")
    for label in labels:
        if not memory.contains(label):
            raise PatternError("UNKNOWN_LABEL", f"no pattern is labelled {label!r}")


def _check_size(memory: PatternMemory, size: int) -> None:
    if size != memory.size:
        message = f"patterns of this session have {memory.size} bits, those of the call {size}"
        raise PatternError("INVALID_PATTERN", message)


_REFUSALS: dict[str, type[ServiceError]] = {
    "INVALID_PATTERN": InvalidArgumentError,
    "CUE_ALL_MASKED": InvalidArgumentError,
    "DUPLICATE_LABEL": AlreadyExistsError,
    "UNKNOWN_LABEL": NotFoundError,
    "MEMORY_FULL": FailedPreconditionError,
    "EMPTY_MEMORY": FailedPreconditionError,
}


def _refusal(error: PatternError) -> ServiceError:
    return _REFUSALS.get(error.reason, InvalidArgumentError)(error.reason, str(error))
