"""The record: what Redis keeps of a session, as one string. Packed and read for many sessions at once.

    header 64 bytes | state | unacknowledged outputs, oldest first | zeros to a multiple of 8

The checksum in the header is the sum of the record's length and its 64-bit words, each times an odd constant of its place,
modulo 2^64 (multilinear hashing): a changed word always changes it, as do zeros added or cut off, and numpy computes it for a
whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = 0x4D52474E  # "NGRM"
SCHEMA = 1
INITIAL = 1  # flag: the session is new, its state is the schema's initial one and is not stored
OUTPUTS_MAX = 32  # that a record keeps: no arena's window is longer
SEQ_MAX = 2**63  # beyond it, what is counted on from a seq would begin at 0 again
TIME_MS_MAX = 253_402_300_799_999  # the last millisecond of the year 9999, and of protobuf's timestamps

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("schema", "<u2"),
        ("flags", "u1"),
        ("runtime", "u1"),  # that computed the state (Runtime.code); 0: unknown, or none yet
        ("fingerprint", "<u8"),  # first 8 bytes of the bundle's fingerprint
        ("seq", "<u8"),
        ("acked", "<u8"),
        ("epoch", "<u8"),
        ("count", "<u4"),  # outputs that follow the state: of seqs seq-count+1 .. seq
        ("state_nbytes", "<u4"),
        ("commit_ms", "<u8"),  # Unix time
        ("checksum", "<u8"),
    ]
)
assert HEADER.itemsize == 64
_CHECKSUM_WORD = HEADER.fields["checksum"][1] // 8  # type: ignore[index]


@dataclass(frozen=True, slots=True)
class Records:
    """Unpacked records as columns; rows named in `errors` are zero."""

    seq: NDArray[np.uint64]
    acked: NDArray[np.uint64]
    epoch: NDArray[np.uint64]
    commit_ms: NDArray[np.uint64]
    initial: NDArray[np.bool_]
    runtime: NDArray[np.uint8]
    states: NDArray[np.uint8]  # [n, state_nbytes]
    counts: NDArray[np.uint32]
    outputs: NDArray[np.uint8]  # [n, greatest count, output_nbytes], oldest first
    errors: dict[int, str]  # row -> why it cannot be used

    def only(self, rows: Sequence[int]) -> Records:
        at = np.asarray(rows, np.intp)
        return Records(self.seq[at], self.acked[at], self.epoch[at], self.commit_ms[at], self.initial[at], self.runtime[at],
                       self.states[at], self.counts[at], self.outputs[at], {})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecordBlock:
    """What records of equal length are made of; a committer packs them, so that the step loop need not wait for it."""

    layout: RecordLayout
    seq: NDArray[np.uint64]
    acked: NDArray[np.uint64]
    epoch: NDArray[np.uint64]
    states: Sequence[NDArray[np.uint8]]  # [n, bytes of a state tensor], in schema order
    counts: NDArray[np.uint32]
    outputs: NDArray[np.uint8]  # [n, capacity, output_nbytes]
    now_ms: int

    def packed(self) -> NDArray[np.uint8]:
        """uint8 [n, record bytes]"""
        return self.layout.pack(self.seq, self.acked, self.epoch, self.states, self.counts, self.outputs, self.now_ms)


class RecordLayout:
    """Packs and reads the records of one model version, whose states a runtime of this code computes."""

    def __init__(self, fingerprint: str, state_nbytes: int, output_nbytes: int, runtime: int = 0) -> None:
        self.fingerprint = int.from_bytes(bytes.fromhex(fingerprint)[:8], "little")
        self.state_nbytes = state_nbytes
        self.output_nbytes = output_nbytes
        self.runtime = runtime
        # What `initial` made last, without a state, for which epoch and time: sessions are often made in the same millisecond.
        self._begun = (-1, -1, b"")

    def pack(
        self, seq: NDArray[Any], acked: NDArray[Any], epoch: NDArray[Any], states: Sequence[NDArray[np.uint8]],
        counts: NDArray[Any], outputs: NDArray[np.uint8], now_ms: int,
    ) -> NDArray[np.uint8]:  # fmt: skip
        """Records, uint8 [n, bytes].

        states: blocks [n, ...] of state_nbytes together; outputs: [n, capacity, output_nbytes], zero beyond counts.
        """
        rows, body = len(seq), HEADER.itemsize + self.state_nbytes
        kept = outputs.shape[1] * self.output_nbytes
        values = np.empty((rows, self.record_nbytes(outputs.shape[1])), np.uint8)
        header = self._header(values)
        header["flags"], header["runtime"] = 0, self.runtime
        header["seq"], header["acked"], header["epoch"], header["count"] = seq, acked, epoch, counts
        header["state_nbytes"] = self.state_nbytes
        header["commit_ms"] = now_ms
        start = HEADER.itemsize
        for block in states:
            values[:, start : start + block.shape[1]] = block
            start += block.shape[1]
        values[:, body : body + kept] = outputs.reshape(rows, kept)
        values[:, body + kept :] = 0
        header["checksum"] = checksums(values)
        return values

    def record_nbytes(self, outputs: int) -> int:
        return _padded(HEADER.itemsize + self.state_nbytes + outputs * self.output_nbytes)

    def initial(self, epoch: int, now_ms: int, state: NDArray[np.uint8] | None = None) -> bytes:
        """The record of a new session: the header alone, or with a state other than the schema's initial one."""
        last = self._begun
        if state is None and last[:2] == (epoch, now_ms):
            return last[2]
        values = np.zeros((1, HEADER.itemsize if state is None else self.record_nbytes(0)), np.uint8)
        header = self._header(values)
        header["epoch"], header["commit_ms"] = epoch, now_ms
        if state is None:
            header["flags"] = INITIAL
        else:
            header["state_nbytes"] = self.state_nbytes
            values[0, HEADER.itemsize : HEADER.itemsize + self.state_nbytes] = state
        header["checksum"] = checksums(values)
        record = values.tobytes()
        if state is None:
            self._begun = (epoch, now_ms, record)
        return record

    def refingerprinted(self, record: bytes) -> bytes:
        """The same record as one of this layout's model version (a move between versions of equal schema)."""
        values = np.frombuffer(record, np.uint8).reshape(1, -1).copy()
        self._header(values)["fingerprint"] = self.fingerprint
        values[:, : HEADER.itemsize].view(HEADER)["checksum"] = checksums(values)
        return values.tobytes()

    def begun(self, count: int, state: NDArray[np.uint8] | None = None) -> Records:
        """What `unpack` makes of records of new sessions (`initial`), but for their epochs and times."""
        zeros, states = np.zeros(count, np.uint64), np.zeros((count, self.state_nbytes), np.uint8)
        if state is not None:
            states[:] = state
        return Records(zeros, zeros, zeros, zeros, np.full(count, state is None), np.zeros(count, np.uint8), states,
                       np.zeros(count, np.uint32), np.empty((count, 0, self.output_nbytes), np.uint8), {})  # fmt: skip

    def unpack(self, values: Sequence[bytes]) -> Records:
        """Records as columns; what cannot be used is named in `errors` and disturbs no other row."""
        rows = len(values)
        errors: dict[int, str] = {}
        header = np.zeros(rows, HEADER)
        states = np.zeros((rows, self.state_nbytes), np.uint8)
        bodies: list[tuple[NDArray[np.intp], NDArray[np.uint8]]] = []
        lengths = [len(value) for value in values]
        for length in sorted(set(lengths)):
            at = np.flatnonzero(np.array(lengths) == length)
            if length < HEADER.itemsize or length % 8:
                errors.update((int(i), f"{length} bytes are not a record") for i in at)
                continue
            block = np.frombuffer(b"".join([values[i] for i in at.tolist()]), np.uint8).reshape(len(at), length)
            head = np.ascontiguousarray(block[:, : HEADER.itemsize]).view(HEADER)[:, 0]
            sound = self._check(at, head, block, errors)
            at, head, block = at[sound], head[sound], block[sound]
            header[at] = head
            if length >= HEADER.itemsize + self.state_nbytes:
                states[at] = block[:, HEADER.itemsize : HEADER.itemsize + self.state_nbytes]
                bodies.append((at, block[:, HEADER.itemsize + self.state_nbytes :]))
        counts = header["count"].copy()
        outputs = np.zeros((rows, int(counts.max(initial=0)), self.output_nbytes), np.uint8)
        for at, tail in bodies:
            room = min(tail.shape[1] // self.output_nbytes if self.output_nbytes else 0, outputs.shape[1])
            outputs[at, :room] = tail[:, : room * self.output_nbytes].reshape(len(at), room, self.output_nbytes)
        initial = (header["flags"] & INITIAL).astype(np.bool_)
        return Records(header["seq"].copy(), header["acked"].copy(), header["epoch"].copy(), header["commit_ms"].copy(), initial,
                       header["runtime"].copy(), states, counts, outputs, errors)  # fmt: skip

    def _check(
        self, at: NDArray[np.intp], head: NDArray[Any], block: NDArray[np.uint8], errors: dict[int, str]
    ) -> NDArray[np.bool_]:
        """Which rows of a block of equally long records are sound."""
        length = block.shape[1]
        initial = (head["flags"] & INITIAL).astype(np.bool_)
        need = np.where(
            initial,
            HEADER.itemsize,
            HEADER.itemsize + self.state_nbytes + head["count"].astype(np.int64) * self.output_nbytes,
        )
        checks = (
            (head["magic"] == MAGIC, "no record's magic number"),
            (head["schema"] == SCHEMA, "written by another version of Engram"),
            (head["checksum"] == checksums(block), "the checksum does not fit"),
            (head["fingerprint"] == self.fingerprint, "written by another model"),
            (initial | (head["state_nbytes"] == self.state_nbytes), "the state has another size"),
            (need <= length, "cut short"),
            (head["count"] <= np.minimum(head["seq"], OUTPUTS_MAX), "it keeps more outputs than there can be"),
            (head["seq"] <= SEQ_MAX, "its step number is too great"),
            (head["acked"] <= head["seq"], "more is acknowledged than was answered"),
            # Else a step that is asked for again would be answered with what another session left behind.
            (head["seq"] - head["acked"] <= head["count"], "outputs that were not acknowledged are missing"),
            (~initial | (head["seq"] == 0), "a new session has steps"),
            (head["commit_ms"] <= TIME_MS_MAX, "its time is beyond the calendar"),
        )
        sound = np.ones(len(at), np.bool_)
        for good, _ in checks:
            sound = sound & good
        if np.count_nonzero(sound) == len(at):  # as a rule
            return sound
        sound[:] = True
        for good, why in checks:
            if not good.all():
                errors.update((int(at[i]), why) for i in np.flatnonzero(sound & ~good))
                sound &= good
        return sound

    def _header(self, values: NDArray[np.uint8]) -> NDArray[Any]:
        """The headers of records, as a writable column of structs, with what all of them share filled in."""
        header: NDArray[Any] = np.ndarray((len(values),), HEADER, values.data, 0, (values.strides[0],))
        header["magic"], header["schema"], header["fingerprint"] = MAGIC, SCHEMA, self.fingerprint
        return header


def read_headers(values: Sequence[bytes]) -> NDArray[Any]:
    """Headers alone, unchecked, for listings; zero where there is none."""
    return np.frombuffer(b"".join(value[:64].ljust(64, b"\0") for value in values), HEADER)


def checksums(values: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Checksums of records uint8 [n, multiple of 8], their own checksum field left out."""
    words = np.ascontiguousarray(values).view("<u8")
    factors = _factors(words.shape[1])
    sums: NDArray[np.uint64] = np.einsum("ij,j->i", words, factors)
    sums += np.uint64(values.shape[1])
    return sums


_FACTORS = [np.empty(0, np.uint64)]  # those of the longest record so far: any other's are its first ones


def _factors(count: int) -> NDArray[np.uint64]:
    """Odd constants, the same on every machine (SplitMix64); 0 at the place of the checksum itself."""
    if count > len(_FACTORS[0]):
        place = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (place ^ (place >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        factors = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
        factors[_CHECKSUM_WORD : _CHECKSUM_WORD + 1] = 0
        _FACTORS[0] = factors
    return _FACTORS[0][:count]


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
