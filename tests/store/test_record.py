"""Records: what is packed is read back whatever it is, and a damaged record is never taken for a sound one."""

from __future__ import annotations

import tracemalloc

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_service.store import RecordLayout
from engram_service.store.record import HEADER, INITIAL, SEQ_MAX, TIME_MS_MAX, checksums, read_headers

WORDS = st.integers(0, 2**64 - 1)
FINGERPRINT = "0123456789abcdef" * 2


@st.composite
def packed(draw: st.DrawFn):
    """A layout, and columns of records that fit it."""
    state, output, capacity = draw(st.integers(0, 70)), draw(st.integers(0, 20)), draw(st.integers(0, 4))
    rows = draw(st.integers(1, 4))
    counts = np.array(draw(st.lists(st.integers(0, capacity), min_size=rows, max_size=rows)), np.uint32)
    seqs = [draw(st.integers(int(count), SEQ_MAX)) for count in counts]
    acked = [seq - draw(st.integers(0, int(count))) for seq, count in zip(seqs, counts, strict=True)]
    epochs = draw(st.lists(WORDS, min_size=rows, max_size=rows))
    fields = {
        name: np.array(values, np.uint64) for name, values in (("seq", seqs), ("acked", acked), ("epoch", epochs))
    }
    states = draw(arrays.arrays(np.uint8, (rows, state)))
    outputs = draw(arrays.arrays(np.uint8, (rows, capacity, output)))
    for row, count in enumerate(counts):
        outputs[row, count:] = 0
    return (
        RecordLayout(FINGERPRINT, state, output, draw(st.integers(0, 255))),
        fields,
        states,
        counts,
        outputs,
        draw(st.integers(0, TIME_MS_MAX)),
    )


def pack(case):
    layout, fields, states, counts, outputs, now_ms = case
    cut = states.shape[1] // 3  # a state is several tensors
    blocks = [states[:, :cut], states[:, cut:]]
    return layout.pack(fields["seq"], fields["acked"], fields["epoch"], blocks, counts, outputs, now_ms)


@settings(max_examples=150, deadline=None)
@given(packed())
def test_what_is_packed_is_read_back(case) -> None:
    layout, fields, states, counts, outputs, now_ms = case
    values = pack(case)
    assert values.shape[1] == layout.record_nbytes(outputs.shape[1]) and values.shape[1] % 8 == 0
    records = layout.unpack([row.tobytes() for row in values])
    assert not records.errors and not records.initial.any()
    for name, column in fields.items():
        assert getattr(records, name).tolist() == column.tolist()
    assert records.commit_ms.tolist() == [now_ms] * len(counts)
    assert records.runtime.tolist() == [layout.runtime] * len(counts)
    assert records.states.tolist() == states.tolist()
    assert records.counts.tolist() == counts.tolist()
    most = int(counts.max())
    assert records.outputs.shape == (len(counts), most, layout.output_nbytes)
    assert records.outputs.tolist() == outputs[:, :most].tolist()
    assert read_headers([row.tobytes() for row in values])["seq"].tolist() == fields["seq"].tolist()


@settings(max_examples=150, deadline=None)
@given(packed(), st.data())
def test_a_damaged_record_is_found_and_harms_no_other(case, data) -> None:
    layout, fields, states, *_ = case
    values = [row.tobytes() for row in pack(case)]
    victim = data.draw(st.integers(0, len(values) - 1))
    whole = values[victim]
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "swap"]))
    if kind == "flip":
        place = data.draw(st.integers(0, len(whole) - 1))
        change = data.draw(st.integers(1, 255))
        values[victim] = whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :]
    elif kind == "cut":
        values[victim] = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "extend":
        values[victim] = whole + data.draw(st.binary(min_size=1, max_size=24))
    else:
        one = data.draw(st.integers(0, len(whole) // 8 - 1))
        other = data.draw(st.integers(0, len(whole) // 8 - 1))
        words = [whole[at : at + 8] for at in range(0, len(whole), 8)]
        words[one], words[other] = words[other], words[one]
        values[victim] = b"".join(words)
        if values[victim] == whole:
            return
    records = layout.unpack(values)
    assert set(records.errors) == {victim}
    for row in set(range(len(values))) - {victim}:
        assert records.seq[row] == fields["seq"][row] and records.states[row].tolist() == states[row].tolist()


def test_every_single_flipped_byte_of_a_record_is_found() -> None:
    layout = RecordLayout(FINGERPRINT, 40, 12)
    columns = [np.array([value], np.uint64) for value in (7, 5, 2)]
    state = np.arange(40, dtype=np.uint8).reshape(1, -1)
    outputs = np.arange(24, dtype=np.uint8).reshape(1, 2, 12)
    whole = layout.pack(*columns, [state], np.array([2], np.uint32), outputs, 99)[0].tobytes()
    damaged = [
        whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        for place in range(len(whole))
        for bit in range(8)
    ]
    assert len(layout.unpack(damaged).errors) == len(damaged)
    for size in range(len(whole)):
        assert layout.unpack([whole[:size]]).errors, size
    for more in range(1, 33):
        assert layout.unpack([whole + bytes(more)]).errors, more


def test_the_record_of_a_new_session_is_its_header() -> None:
    layout = RecordLayout(FINGERPRINT, 40, 12)
    records = layout.unpack([layout.initial(3, 99)])
    assert not records.errors and records.initial.tolist() == [True]
    assert (records.seq[0], records.epoch[0], records.commit_ms[0], records.counts[0]) == (0, 3, 99, 0)


def test_the_record_of_a_new_session_may_have_a_state_of_its_own() -> None:
    layout = RecordLayout(FINGERPRINT, 40, 12, runtime=1)
    state = np.arange(40, dtype=np.uint8)
    record = layout.initial(3, 99, state)
    assert len(record) == layout.record_nbytes(0)
    records = layout.unpack([record, layout.initial(3, 99)])
    assert not records.errors and records.initial.tolist() == [False, True]
    assert (records.seq[0], records.epoch[0], records.commit_ms[0], records.counts[0]) == (0, 3, 99, 0)
    assert records.states.tolist() == [state.tolist(), [0] * 40]
    assert records.runtime.tolist() == [0, 0], "no runtime has computed it"


def test_a_record_tells_the_runtime_that_wrote_it_wherever_it_goes() -> None:
    ours, theirs = RecordLayout(FINGERPRINT, 8, 4, runtime=1), RecordLayout("f" * 32, 8, 4, runtime=3)
    column = np.ones(1, np.uint64)
    record = theirs.pack(
        column, column, column, [np.zeros((1, 8), np.uint8)], np.zeros(1, np.uint32), np.zeros((1, 0, 4), np.uint8), 1
    )[0].tobytes()
    moved = ours.unpack([ours.refingerprinted(record)])
    assert not moved.errors and moved.only([0]).runtime.tolist() == [3]


def test_records_of_before_runtimes_were_named_are_of_an_unknown_one() -> None:
    """The flags were two bytes, of which the second was always 0."""
    assert [HEADER.fields[name][1] for name in ("flags", "runtime", "fingerprint")] == [6, 7, 8]  # type: ignore[index]


def test_a_record_of_another_model_or_size_is_refused_until_it_is_moved() -> None:
    layout, other = RecordLayout(FINGERPRINT, 40, 12), RecordLayout("f" * 32, 40, 12)
    record = layout.initial(1, 1)
    assert other.unpack([record]).errors == {0: "written by another model"}
    assert not other.unpack([other.refingerprinted(record)]).errors
    column = np.ones(1, np.uint64)
    state, outputs = np.zeros((1, 40), np.uint8), np.zeros((1, 0, 12), np.uint8)
    full = layout.pack(column, column, column, [state], np.zeros(1, np.uint32), outputs, 1)[0].tobytes()
    assert RecordLayout(FINGERPRINT, 32, 12).unpack([full]).errors == {0: "the state has another size"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"flags": INITIAL, "count": 2**32 - 1}, "more outputs than there can be"),
        ({"flags": INITIAL}, "a new session has steps"),
        ({"seq": 2**64 - 1, "acked": 2**64 - 1}, "step number"),
        ({"acked": 8}, "more is acknowledged"),
        ({"acked": 4}, "not acknowledged are missing"),
        ({"acked": 5, "count": 1}, "not acknowledged are missing"),
        ({"seq": 1, "acked": 1}, "more outputs than there can be"),
        ({"commit_ms": 2**63}, "beyond the calendar"),
    ],
)
def test_a_sound_checksum_makes_no_sound_record(fields: dict[str, int], why: str) -> None:
    """Whoever forges a record computes its checksum too: what it says must be possible."""
    layout = RecordLayout(FINGERPRINT, 40, 12)
    columns = [np.array([value], np.uint64) for value in (7, 5, 2)]
    outputs = np.zeros((1, 2, 12), np.uint8)
    sound = layout.pack(*columns, [np.zeros((1, 40), np.uint8)], np.array([2], np.uint32), outputs, 99)
    forged = sound.copy()
    header = forged[:, : HEADER.itemsize].view(HEADER)
    for name, value in fields.items():
        header[name] = value
    header["checksum"] = checksums(forged)
    records = layout.unpack([sound.tobytes(), forged.tobytes()])
    assert list(records.errors) == [1] and why in records.errors[1]
    assert records.outputs.shape == (2, 2, 12), "it must not cost memory either"


def test_many_outputs_of_one_record_cost_the_others_nothing() -> None:
    layout = RecordLayout(FINGERPRINT, 40, 4)
    column = np.full(1, 10**6, np.uint64)
    outputs = np.zeros((1, 10**5, 4), np.uint8)
    large = layout.pack(column, column, column, [np.zeros((1, 40), np.uint8)], np.array([10**5], np.uint32), outputs, 9)
    records = layout.unpack([large.tobytes(), layout.initial(1, 9)])
    assert list(records.errors) == [0]
    assert records.outputs.nbytes < 1000


def test_records_of_ever_new_lengths_leave_nothing_behind() -> None:
    """Found by fuzzing: the factors of the checksum were kept for every length that a record, or a forged one, ever had."""
    layout = RecordLayout(FINGERPRINT, 40, 12)
    layout.unpack([bytes(1 << 16)])
    tracemalloc.start()
    for nbytes in range(64, 1 << 14, 8):
        layout.unpack([bytes(nbytes)])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 18
