"""The arena: preallocated tensors that hold the state of a model's resident sessions, one row (slot) each.

Beside the state it keeps, in host memory, each slot's last outputs (a ring of `window` rows) so that an answer that was
lost can be given again, and what is committed can carry them. The engine thread writes; the event loop hands out slots.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_models import Bundle, TensorSpec

_NOBODY = -1


class Arena:
    """Slots for `capacity` sessions of one model; slot `capacity` is scratch, for rows that pad a batch."""

    def __init__(self, bundle: Bundle, capacity: int, window: int, device: torch.device) -> None:
        self.bundle = bundle
        self.capacity = capacity
        self.window = window
        self.device = device
        self.state_nbytes = sum(spec.nbytes for spec in bundle.state)
        self.output_nbytes = bundle.output.nbytes
        self._maps: list[tuple[mmap.mmap, int]] = []
        self.state = [self._tensor(spec) for spec in bundle.state]
        self.last = self._tensor(bundle.output) if bundle.generates else None
        self._ring = self._host((capacity + 1, window, self.output_nbytes))
        self._free = list(range(capacity - 1, -1, -1))
        self._holder = np.full(capacity, _NOBODY, np.int32)  # session in each slot, as a row of the session table
        self._since = np.zeros(capacity)  # when it came, on the session table's clock
        self._initial = [
            torch.full((1, *spec.shape), spec.initial, dtype=spec.torch_dtype, device=device) for spec in bundle.state
        ]
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

    # Contents: engine thread only.

    def reset(self, slots: NDArray[Any]) -> None:
        """Sets slots to the schema's initial state."""
        index = self._index(slots)
        for tensor, initial in zip(self.state, self._initial, strict=True):
            tensor.index_copy_(0, index, initial.expand(len(slots), *initial.shape[1:]))
        if self.last is not None:
            self.last.index_fill_(0, index, 0)

    def load(self, slots: NDArray[np.int32], states: NDArray[np.uint8]) -> None:
        """Fills slots from packed state rows, uint8 [n, state_nbytes]."""
        index = self._index(slots)
        start = 0
        for spec, tensor in zip(self.bundle.state, self.state, strict=True):
            block = np.ascontiguousarray(states[:, start : start + spec.nbytes])
            tensor.index_copy_(0, index, from_bytes(block, spec).to(self.device))
            start += spec.nbytes

    def load_outputs(
        self, slots: NDArray[np.int32], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8], counts: NDArray[Any]
    ) -> None:
        """Fills the rings: row i holds the outputs of seqs[i]-counts[i]+1 .. seqs[i], oldest first."""
        for k in range(outputs.shape[1]):
            rows = np.flatnonzero(counts > k)
            seq = seqs[rows] - counts[rows].astype(np.uint64) + np.uint64(k + 1)
            self.keep(slots[rows], seq, outputs[rows, k])
        if self.last is not None:
            rows = np.flatnonzero(counts > 0)
            newest = np.ascontiguousarray(outputs[rows, counts[rows].astype(np.intp) - 1])
            self.last.index_copy_(0, self._index(slots[rows]), from_bytes(newest, self.bundle.output).to(self.device))

    def keep(self, slots: NDArray[Any], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8]) -> None:
        """Keeps outputs, uint8 [n, output_nbytes], as those of steps `seqs`."""
        self._ring[slots, seqs % np.uint64(self.window)] = outputs

    def kept(self, slots: NDArray[Any], seqs: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Outputs of steps that are at most `window` back; slots and seqs broadcast. [..., output_nbytes]"""
        kept: NDArray[np.uint8] = self._ring[slots, seqs % np.uint64(self.window)]
        return kept

    def packed(self, slots: NDArray[np.int32]) -> NDArray[np.uint8]:
        """State rows of slots, uint8 [n, state_nbytes]."""
        index = self._index(slots)
        return self.pack([tensor.index_select(0, index) for tensor in self.state], len(slots))

    def pack(self, state: list[torch.Tensor], rows: int) -> NDArray[np.uint8]:
        """Batch-first state tensors, none where the model has no state, as rows of bytes in schema order.

        uint8 [rows, state_nbytes]
        """
        packed = np.empty((rows, self.state_nbytes), np.uint8)
        start = 0
        for spec, tensor in zip(self.bundle.state, state, strict=True):
            packed[:, start : start + spec.nbytes] = to_bytes(tensor)
            start += spec.nbytes
        return packed

    def _index(self, slots: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(slots.astype(np.int64)).to(self.device)

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        shape = (self.capacity + 1, *spec.shape)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=spec.torch_dtype, device=self.device)
        flat = self._host((self.capacity + 1, spec.nbytes))
        return torch.from_numpy(flat).view(-1).view(spec.torch_dtype).view(shape)

    def _host(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Zeroed host memory whose pages cost nothing until they are touched and can be given back."""
        row_nbytes = int(np.prod(shape[1:]))
        pages = mmap.mmap(-1, max(1, shape[0] * row_nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append((pages, row_nbytes))
        return np.frombuffer(pages, np.uint8, shape[0] * row_nbytes).reshape(shape)


def to_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """A batch-first tensor as rows of bytes, uint8 [n, bytes]; a view where the tensor is contiguous on the CPU."""
    rows = len(tensor)
    flat = tensor.detach().contiguous().view(rows, -1)
    return flat.view(torch.uint8).cpu().numpy().reshape(rows, -1)


def from_bytes(rows: NDArray[np.uint8], spec: TensorSpec) -> torch.Tensor:
    """Rows of bytes, contiguous uint8 [n, spec.nbytes], as a CPU tensor [n, *shape]."""
    if not rows.flags.writeable:
        rows = rows.copy()
    return torch.from_numpy(rows).view(-1).view(spec.torch_dtype).view(len(rows), *spec.shape)  # rows may be none


def cast_to_bytes(values: NDArray[np.float32], spec: TensorSpec) -> bytes:
    """Numbers as bytes of a tensor's dtype."""
    return to_bytes(torch.from_numpy(values).to(spec.torch_dtype).view(-1, 1)).tobytes()


def cast_to_floats(rows: NDArray[np.uint8], spec: TensorSpec) -> list[float]:
    """Rows of bytes as numbers, flattened."""
    floats: list[float] = from_bytes(rows, spec).float().flatten().tolist()
    return floats
