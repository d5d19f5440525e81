"""The arena: preallocated columns that hold the state of a model's resident sessions, one row (slot) each.

Beside the state it keeps each slot's last outputs (a ring of `window` rows) so that an answer that was lost can be given again,
and what is committed can carry them. Of the step loop's thread alone. In host memory; what keeps states on a
device overrides where they are (torch_cuda.py).
"""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.bundle import Bundle
from engram_models.spec import TensorSpec
from engram_service.places import keep

_NOBODY = -1


class Arena:
    """Slots for `capacity` sessions of one model; slot `capacity` is scratch, for rows that pad a batch."""

    device = "cpu"

    def __init__(self, bundle: Bundle, capacity: int, window: int) -> None:
        self.bundle = bundle
        self.schema = bundle.schema
        self.capacity = capacity
        self.window = window
        self.state_nbytes = self.schema.state_nbytes
        self.output_nbytes = self.schema.output_nbytes
        self._maps: list[tuple[mmap.mmap, int]] = []
        self._ring = self._host((capacity + 1, window, self.output_nbytes))
        self._free = list(range(capacity - 1, -1, -1))
        self._holder = np.full(capacity, _NOBODY, np.int32)  # session in each slot, as a row of the session table
        self._since = np.zeros(capacity)  # when it came, on the session table's clock
        self._make_columns()
        self.reset(np.array([capacity]))

    # Slots: event loop only.

    @property
    def resident(self) -> int:
        return self.capacity - len(self._free)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, rows: NDArray[np.int32], now: float) -> NDArray[np.int32]:
        """Slots for these sessions, for no more of them than there are free ones."""
        slots = np.array([self._free.pop() for _ in rows.tolist()], np.int32)
        self._holder[slots], self._since[slots] = rows, now
        return slots

    def give_back(self, slots: NDArray[np.int32]) -> None:
        self._holder[slots] = _NOBODY
        self._free.extend(slots.tolist())

    def holders(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The resident sessions, and since when they are."""
        used = self._holder != _NOBODY
        return self._holder[used], self._since[used]

    def trim(self) -> None:
        """Returns the memory of slots above the highest one in use to the system (host arenas)."""
        self._free.sort(reverse=True)
        used = np.ones(self.capacity, np.bool_)
        used[self._free] = False
        high = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
        for pages, row_nbytes in self._maps:
            start = -(-high * row_nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            # The scratch row, which stands last, is kept.
            end = self.capacity * row_nbytes // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                pages.madvise(mmap.MADV_DONTNEED, start, end - start)

    # Contents.

    def reset(self, slots: NDArray[Any]) -> None:
        """Sets slots to the schema's initial state."""
        for spec, column in zip(self.schema.state, self.state, strict=True):
            column[slots] = self.bundle.initial(spec)
        if self.last is not None:
            self.last[slots] = 0

    def load(self, slots: NDArray[np.int32], states: NDArray[np.uint8]) -> None:
        """Fills slots from packed state rows, uint8 [n, state_nbytes]."""
        for spec, column, block in zip(self.schema.state, self.state, split(states, self.schema.state), strict=True):
            column[slots] = from_bytes(block, spec)

    def load_outputs(
        self, slots: NDArray[np.int32], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8], counts: NDArray[Any]
    ) -> None:
        """Fills the rings: row i holds the outputs of seqs[i]-counts[i]+1 .. seqs[i], oldest first."""
        for k in range(outputs.shape[1]):
            rows = np.flatnonzero(counts > k)
            seq = seqs[rows] - counts[rows].astype(np.uint64) + np.uint64(k + 1)
            self.keep(slots[rows], seq, outputs[rows, k])
        if self.schema.generates:
            rows = np.flatnonzero(counts > 0)
            self._put_last(slots[rows], np.ascontiguousarray(outputs[rows, counts[rows].astype(np.intp) - 1]))

    def keep(self, slots: NDArray[Any], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8]) -> None:
        """Keeps outputs, uint8 [n, output_nbytes], as those of steps `seqs`."""
        keep(self._ring, slots, seqs, outputs)

    def kept(self, slots: NDArray[Any], seqs: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Outputs of steps that are at most `window` back; slots and seqs broadcast. [..., output_nbytes]"""
        kept: NDArray[np.uint8] = self._ring[slots, seqs % np.uint64(self.window)]
        return kept

    @property
    def output_rows(self) -> NDArray[np.uint8]:
        """All rings, uint8 [slots, window, output_nbytes]: the output of a step stands at its seq modulo `window`."""
        return self._ring

    def state_rows(self) -> list[NDArray[np.uint8]]:
        """The state columns as bytes, uint8 [slots, nbytes] each, in place; none where they are on a device."""
        return [to_bytes(column) for column in self.state if column.size]

    def packed(self, slots: NDArray[np.int32]) -> NDArray[np.uint8]:
        """State rows of slots, uint8 [n, state_nbytes]."""
        packed = np.empty((len(slots), self.state_nbytes), np.uint8)
        for block, column in zip(split(packed, self.schema.state), self.state, strict=True):
            block[:] = to_bytes(column[slots])
        return packed

    def _make_columns(self) -> None:
        """`state`: [capacity + 1, *shape] each; `last`: the last outputs' bytes where the model can feed on them, else None."""
        self.state: list[NDArray[Any]] = [
            self._host((self.capacity + 1, spec.nbytes)).reshape(-1).view(spec.np_dtype).reshape(-1, *spec.shape)
            if spec.size
            else np.empty((self.capacity + 1, *spec.shape), spec.np_dtype)
            for spec in self.schema.state
        ]
        self.last: NDArray[np.uint8] | None = None
        if self.schema.generates:
            self.last = self._host((self.capacity + 1, self.output_nbytes))

    def _put_last(self, slots: NDArray[np.int32], outputs: NDArray[np.uint8]) -> None:
        assert self.last is not None
        self.last[slots] = outputs

    def _host(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Zeroed host memory whose pages cost nothing until they are touched and can be given back."""
        row_nbytes = int(np.prod(shape[1:]))
        pages = mmap.mmap(-1, max(1, shape[0] * row_nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append((pages, row_nbytes))
        return np.frombuffer(pages, np.uint8, shape[0] * row_nbytes).reshape(shape)


def split(rows: NDArray[np.uint8], specs: tuple[TensorSpec, ...]) -> list[NDArray[np.uint8]]:
    """The tensors' bytes in rows [n, bytes of all], [n, nbytes] each; views."""
    if len(specs) == 1:
        return [rows]
    blocks, start = [], 0
    for spec in specs:
        blocks.append(rows[:, start : start + spec.nbytes])
        start += spec.nbytes
    return blocks


def from_bytes(rows: NDArray[np.uint8], spec: TensorSpec) -> NDArray[Any]:
    """Rows of bytes, uint8 [n, spec.nbytes], as [n, *shape]; a view where they are contiguous. Rows may be none."""
    if not rows.flags.c_contiguous:
        rows = np.ascontiguousarray(rows)
    if len(spec.shape) == 1 and spec.nbytes:  # the usual one, in one operation: small batches feel each
        return rows.view(spec.np_dtype)
    return rows.reshape(-1).view(spec.np_dtype).reshape(len(rows), *spec.shape)


def to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """[n, *shape] as rows of bytes, uint8 [n, bytes]; a view where it is contiguous. Rows may be none."""
    if values.ndim == 2 and values.flags.c_contiguous and values.size:
        return values.view(np.uint8)
    values = np.ascontiguousarray(values)
    return values.reshape(-1).view(np.uint8).reshape(len(values), prod(values.shape[1:]) * values.itemsize)
