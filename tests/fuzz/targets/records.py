"""Store records: what Redis holds of a session, or an export carries, beside a sound record that must not suffer."""

from __future__ import annotations

import numpy as np

from engram_service.protocols.engram.unary import _session
from engram_service.store import RecordLayout, Records, SessionInfo
from engram_service.store.record import HEADER, checksums, read_headers
from targets.world import SLOTS, world

_LAYOUT = world().lstm.layout
_CHECKSUM = HEADER.fields["checksum"][1]  # type: ignore[index]
_OUTPUT_NBYTES_MAX = 1 << 20  # of a few small records


def record(seq: int, acked: int, count: int, layout: RecordLayout = _LAYOUT) -> bytes:
    """A record as the engine writes it."""
    state = np.arange(layout.state_nbytes, dtype=np.uint8).reshape(1, -1) % 61
    outputs = np.arange(count * layout.output_nbytes, dtype=np.uint8).reshape(1, count, layout.output_nbytes) % 59
    columns = [np.array([value], np.uint64) for value in (seq, acked, 2)]
    return layout.pack(*columns, [state], np.array([count], np.uint32), outputs, 1_700_000_000_000)[0].tobytes()


_SOUND = record(5, 4, 1)


def seeds() -> list[bytes]:
    state = np.arange(_LAYOUT.state_nbytes, dtype=np.uint8)
    constants = _LAYOUT.initial(1, 1_700_000_000_000, state)
    return [_LAYOUT.initial(1, 1_700_000_000_000), constants, record(1, 0, 1), record(9, 7, 2), record(40, 32, 8)]


def mend(data: bytes) -> bytes:
    return mended(data)


def mended(value: bytes) -> bytes:
    """A record whose length and checksum fit."""
    if len(value) < HEADER.itemsize:
        return value
    whole = np.frombuffer(value + bytes(-len(value) % 8), np.uint8).reshape(1, -1)
    return b"".join((whole[0, :_CHECKSUM].tobytes(), checksums(whole).tobytes(), whole[0, _CHECKSUM + 8 :].tobytes()))


def fuzz_one(data: bytes) -> None:
    records = _LAYOUT.unpack([_SOUND, data])
    assert 0 not in records.errors, "a bad record spoils a good one"
    assert (int(records.seq[0]), int(records.counts[0])) == (5, 1)
    assert records.outputs.nbytes <= _OUTPUT_NBYTES_MAX, "a record has others take up memory"
    header = read_headers([data])[0]
    listed(int(header["seq"]), int(header["acked"]), int(header["commit_ms"]))
    if 1 in records.errors:
        return
    seq, acked, count = int(records.seq[1]), int(records.acked[1]), int(records.counts[1])
    assert acked <= seq and count <= seq, "a step was answered that was never taken"
    assert seq - acked <= count, "an answer that is kept is not there"
    assert seq <= 2**63, "no step could follow"
    assert _LAYOUT.refingerprinted(data) == data, "a record is not what it is read as"
    _place(records)


def _place(records: Records) -> None:
    """Into the arena, as an open does; the slot that another session has does not change."""
    arena, slots = world().lstm.arena, np.arange(2, dtype=np.int32)
    other, seqs = np.array([SLOTS - 1]), np.arange(8, dtype=np.uint64)[None, :]
    before = arena.kept(other, seqs)
    arena.reset(slots)
    arena.load(slots, records.states)
    arena.load_outputs(slots, records.seq, records.outputs, records.counts)
    assert (arena.kept(other, seqs) == before).all()


def listed(seq: int, acked: int, commit_ms: int) -> None:
    """A listing reads headers unchecked: one session's must not spoil the listing of all."""
    info = SessionInfo(
        session_id="a", model="lstm", version="1", fingerprint="f" * 32, token="t" * 16, epoch=1, created_ms=1,
        seq=seq, acked=acked, commit_ms=commit_ms, ttl_ms=1000, record=b"",
    )  # fmt: skip
    _session(info, on_device=False)
