"""Native commits with a real Redis, and with peers that are none: what is written, what is said of it, and how a link ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_service.store.keys import META_PREFIX, record_key
from engram_service.store.packing import commands, counting
from engram_service.store.record import RecordLayout
from tests.redises import RedisProcess
from tests.wires import TlsEnd

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

WAIT_S = 20.0
COUNTER = b"engram:generation:test"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
def store(process: RedisProcess) -> redis.Redis:
    process.client.flushall()
    return process.client


class Columns:
    """Rows to write, none like another."""

    def __init__(self, rows: int, width: int = 330, ttl_ms: int = 60_000) -> None:
        letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
        generator = np.random.default_rng(rows)
        self.tags = generator.choice(letters, (rows, 22))
        self.tokens = generator.choice(letters, (rows, 16))
        self.records = generator.integers(0, 256, (rows, width), np.uint8)
        self.ttl_ms = np.full(rows, ttl_ms, np.uint64)

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint64]]:
        return self.tags, self.tokens, self.records, self.ttl_ms

    def keys(self) -> list[bytes]:
        return [record_key(*pair) for pair in zip(map(bytes, self.tags), map(bytes, self.tokens), strict=True)]

    def create(self, store: redis.Redis) -> None:
        store.mset(dict.fromkeys(self.keys(), b"before"))

    def written(self, store: redis.Redis) -> list[bool]:
        return [value == bytes(record) for value, record in zip(store.mget(self.keys()), self.records, strict=True)]


MakeLink = Callable[[RedisProcess], Any]


def connected(process: RedisProcess) -> Any:
    connection: Any = process.client.connection_pool.make_connection()
    connection.connect()
    return connection


@pytest.fixture(params=["unix", "tls"])
def link_to(request: pytest.FixtureRequest) -> Iterator[MakeLink]:
    """Links to a Redis, in clear or over TLS."""
    ends: list[TlsEnd] = []

    def make(process: RedisProcess) -> Any:
        if request.param == "unix":
            connection = connected(process)
            return native.CommitLink(connection._sock.detach())
        certificates = request.getfixturevalue("certificates")
        ends.append(TlsEnd(process.socket, certificates.issue("redis")))
        sock = socket.create_connection(("127.0.0.1", ends[-1].port))
        ca = certificates.ca("ca").read_bytes()
        return native.CommitLink.over_tls(native.TlsStream(sock.detach(), "127.0.0.1", WAIT_S, ca))

    yield make
    for end in ends:
        end.close()


def finished(link: Any) -> Any:
    assert link.progress(WAIT_S)
    return link.verdicts()


@pytest.mark.parametrize("rows", [1, 64, 1024, 4096])
@pytest.mark.parametrize("width", [330, 2200])
def test_rows_are_written_and_counted(
    process: RedisProcess, store: redis.Redis, rows: int, width: int, link_to: MakeLink
) -> None:
    columns = Columns(rows, width)
    columns.create(store)
    link = link_to(process)
    for count in (1, 2):
        columns.records[:] += 1
        link.send(*columns.arrays(), META_PREFIX, COUNTER)
        assert finished(link) == (None, [], count, [])
        assert all(columns.written(store))
    assert 0 < store.pttl(columns.keys()[-1]) <= 60_000
    assert not link.wants_write
    assert not link.in_doubt


def test_each_row_has_its_own_ttl(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    columns = Columns(3)
    columns.ttl_ms[:] = 100_000, 7_000_000_000, 2_000_000
    columns.create(store)
    link = link_to(process)
    link.send(*columns.arrays(), META_PREFIX)
    assert finished(link)[0] is None
    keys = columns.keys()
    assert [round(store.pttl(key), -5) for key in keys] == [100_000, 7_000_000_000, 2_000_000]


@pytest.mark.promise(2)
def test_each_row_has_its_verdict(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    columns = Columns(5)
    columns.create(store)
    store.delete(columns.keys()[1])
    columns.ttl_ms[3] = 0  # which Redis refuses
    link = link_to(process)
    link.send(*columns.arrays(), META_PREFIX, COUNTER)
    kinds, errors, counter, waited = finished(link)
    assert (kinds, counter, waited) == (b"+0+-+", 1, [])
    ((row, text),) = errors
    assert row == 3
    assert text.startswith(b"ERR invalid expire time")
    assert columns.written(store) == [True, False, True, False, True]
    assert store.get(columns.keys()[1]) is None


def test_a_commit_of_several_blocks_counts_once(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    parts = [Columns(3, 330), Columns(500, 2200), Columns(2, 64)]
    link = link_to(process)
    for columns in parts:
        columns.create(store)
    store.delete(parts[1].keys()[7])
    link.send(*parts[0].arrays(), META_PREFIX, more=True)
    link.send(*parts[1].arrays(), META_PREFIX)
    link.send(*parts[2].arrays(), META_PREFIX, COUNTER)
    with pytest.raises(ValueError, match="is not over"):
        link.send(*parts[2].arrays(), META_PREFIX)
    kinds, errors, counter, _ = finished(link)
    assert kinds == b"+" * 10 + b"0" + b"+" * 494
    assert (errors, counter) == ([], 1)
    assert all(parts[2].written(store))


def test_no_rows_only_count(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    link = link_to(process)
    link.send(*Columns(0).arrays(), META_PREFIX, COUNTER)
    assert finished(link) == (None, [], 1, [])
    link.send(*Columns(0).arrays(), META_PREFIX)
    assert finished(link) == (None, [], None, [])


def test_a_counter_that_is_no_number_says_nothing(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    store.set(COUNTER, "many")
    columns = Columns(1)
    columns.create(store)
    link = link_to(process)
    link.send(*columns.arrays(), META_PREFIX, COUNTER)
    assert finished(link) == (None, [], None, [])


def test_copies_are_waited_for(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    columns = Columns(2)
    columns.create(store)
    link = link_to(process)
    link.send(*columns.arrays(), META_PREFIX, COUNTER, b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$2\r\n10\r\n")
    assert finished(link) == (None, [], 1, [0])
    version = tuple(int(part) for part in store.info("server")["redis_version"].split(".")[:2])
    wait = b"*4\r\n$7\r\nWAITAOF\r\n$1\r\n1\r\n$1\r\n0\r\n$4\r\n1000\r\n"
    link.send(*columns.arrays(), META_PREFIX, COUNTER, wait)
    if version >= (7, 2):
        assert finished(link) == (None, [], 2, [1, 0])
    else:  # it does not know the command
        with pytest.raises(ConnectionError, match="unknown command"):
            link.progress(WAIT_S)


def test_python_may_use_the_connection_between_commits(process: RedisProcess, store: redis.Redis) -> None:
    connection = connected(process)
    columns = Columns(2)
    columns.create(store)
    link = native.CommitLink(os.dup(connection._sock.fileno()))
    for count in (1, 2):
        connection.send_command("CLIENT", "ID")
        assert int(connection.read_response()) > 0
        link.send(*columns.arrays(), META_PREFIX, COUNTER)
        assert finished(link) == (None, [], count, [])


def test_what_a_paused_redis_does_not_take_is_sent_later(
    process: RedisProcess, store: redis.Redis, link_to: MakeLink
) -> None:
    columns = Columns(4096, 2200)
    columns.create(store)
    link = link_to(process)
    process.pause()
    try:
        began = time.monotonic()
        link.send(*columns.arrays(), META_PREFIX, COUNTER)
        assert not link.progress()
        assert time.monotonic() - began < 1.0
        assert not link.progress(0.05)
        assert time.monotonic() - began >= 0.05
        assert link.wants_write
        assert link.in_doubt
        with pytest.raises(ValueError, match="not all replies"):
            link.verdicts()
    finally:
        process.go_on()
    assert finished(link) == (None, [], 1, [])
    assert all(columns.written(store))


def test_a_signal_is_not_put_off(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    columns = Columns(1)
    link = link_to(process)
    process.pause()
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(InterruptedError("now")))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        link.send(*columns.arrays(), META_PREFIX)
        with pytest.raises(InterruptedError, match="now"):
            link.progress(WAIT_S)
    finally:
        process.go_on()
        signal.signal(signal.SIGALRM, before)
    assert finished(link)[0] == b"0"


@pytest.mark.promise(2)
def test_a_link_that_redis_kills_ends_in_doubt(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    columns = Columns(1)
    columns.create(store)
    link = link_to(process)
    link.send(*columns.arrays(), META_PREFIX)
    assert finished(link)[0] is None  # it has come as far as Redis
    store.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(ConnectionError):  # noqa: PT012 - the end may show in either call
        link.send(*columns.arrays(), META_PREFIX)
        link.progress(WAIT_S)
    assert link.descriptor == -1
    assert not link.wants_write
    for call in (link.progress, link.verdicts, lambda: link.send(*columns.arrays(), META_PREFIX)):
        with pytest.raises(ConnectionError):
            call()


@contextlib.contextmanager
def peer(answer: bytes, whole: int, certificates: Any = None) -> Iterator[Any]:
    """A link to what reads so much, gives that answer in small parts, and closes; over TLS, where there are certificates."""
    ours, end = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificates is not None:
        context.load_cert_chain(*certificates.issue("peer"))

    def serve() -> None:
        with end if certificates is None else context.wrap_socket(end, server_side=True) as theirs:
            taken = 0
            while taken < whole:
                taken += len(theirs.recv(1 << 20))
            with contextlib.suppress(BrokenPipeError, ssl.SSLError):  # the link has given up before the last of it
                for start in range(0, len(answer), 7):
                    theirs.sendall(answer[start : start + 7])

    thread = threading.Thread(target=serve)
    thread.start()
    if certificates is None:
        yield native.CommitLink(ours.detach())
    else:
        ca = certificates.ca("ca").read_bytes()
        yield native.CommitLink.over_tls(native.TlsStream(ours.detach(), "localhost", WAIT_S, ca))
    thread.join(WAIT_S)


def packed(columns: Columns) -> bytes:
    return b"".join(bytes(buffer) for _, buffer in commands(*columns.arrays())) + counting(COUNTER)


@pytest.mark.parametrize(
    "answer", [b"", b"+OK\r\n", b"+OK\r\n+OK\r\n:1", b"$3\r\nabc\r\n", b"+OK\r\n:1\r\n", b"nonsense\r\n"]
)
@pytest.mark.parametrize("tls", [False, True])
def test_a_peer_that_says_something_else_is_given_up(answer: bytes, tls: bool, certificates: Any) -> None:
    columns = Columns(2)
    with peer(answer, len(packed(columns)), certificates if tls else None) as link:
        link.send(*columns.arrays(), META_PREFIX, COUNTER)
        with pytest.raises(ConnectionError, match=r"closed the connection|makes no sense|connection failed"):
            link.progress(WAIT_S)
        assert link.in_doubt
        assert link.descriptor == -1


def test_random_replies_end_in_an_error() -> None:
    chance = random.Random(1)
    columns = Columns(3)
    for _ in range(100):
        answer = bytes(chance.choices(b"+-:$*_OK0123\r\n\r\n a\xff", k=chance.randrange(200)))
        with peer(answer + b"!\r\n", len(packed(columns))) as link:
            link.send(*columns.arrays(), META_PREFIX, COUNTER)
            with pytest.raises(ConnectionError):
                link.progress(WAIT_S)


@pytest.mark.parametrize("rows", [1, 100])
def test_the_bytes_are_those_of_the_python_link(rows: int) -> None:
    ours, theirs = socket.socketpair()
    link = native.CommitLink(ours.detach())
    columns = Columns(rows, 2200)
    expected = packed(columns)
    got = bytearray()
    link.send(*columns.arrays(), META_PREFIX, COUNTER)
    with theirs:
        while len(got) < len(expected):
            got += theirs.recv(1 << 16)
            link.progress()
        assert got == expected
        assert not link.wants_write
        theirs.sendall(b"+OK\r\n" * rows + b":5\r\n")
        assert finished(link) == (None, [], 5, [])


def test_rows_may_lie_apart(process: RedisProcess, store: redis.Redis, link_to: MakeLink) -> None:
    columns = Columns(20)
    columns.create(store)
    link = link_to(process)
    link.send(*(array[::-2] for array in columns.arrays()), META_PREFIX)
    assert finished(link)[0] is None
    assert columns.written(store) == [False, True] * 10


def test_columns_that_do_not_fit_are_refused(process: RedisProcess, link_to: MakeLink) -> None:
    link = link_to(process)
    good = Columns(4).arrays()
    for place, wrong in ((0, good[0][:3]), (1, good[1][:5, ::2]), (2, good[2].view(np.int8)), (3, good[3][:2]), (3, 7)):
        arrays: list[Any] = list(good)
        arrays[place] = wrong
        with pytest.raises((ValueError, TypeError)):
            link.send(*arrays, META_PREFIX)
    assert not link.wants_write
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.CommitLink(-1)
    with open(Path(__file__)) as file, pytest.raises(OSError, match=r"[Ss]ocket"):
        native.CommitLink(file.fileno())


@pytest.mark.promise(2)
@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 5),
    states=st.lists(st.integers(0, 40), max_size=3),
    kept=st.tuples(st.integers(0, 3), st.integers(0, 20)),
    seed=st.integers(0, 2**32 - 1),
    now_ms=st.integers(0, 2**63),
    apart=st.booleans(),
)
def test_records_are_those_of_python(
    rows: int, states: list[int], kept: tuple[int, int], seed: int, now_ms: int, apart: bool
) -> None:
    generator = np.random.default_rng(seed)
    step = 2 if apart else 1
    fingerprint = generator.bytes(32).hex()
    layout = RecordLayout(fingerprint, sum(states), kept[1], runtime=int(generator.integers(256)))
    numbers = generator.integers(0, 2**64, (3, rows), np.uint64)
    counts = generator.integers(0, 2**32, rows, np.uint32)
    blocks = [generator.integers(0, 256, (rows * step, size), np.uint8)[::step] for size in states]
    outputs = generator.integers(0, 256, (rows * step, *kept), np.uint8)[::step]
    seq, acked, epoch = numbers
    expected = layout.pack(seq, acked, epoch, blocks, counts, outputs, now_ms)
    out = np.full_like(expected, 255)
    native.pack_records(out, layout.fingerprint, layout.runtime, *numbers, counts, blocks, outputs, now_ms)
    assert np.array_equal(out, expected)


@dataclass
class Sessions:
    """Columns of a session table and of an arena, random."""

    layout: RecordLayout
    table: list[NDArray[Any]]  # tags, tokens, ttl_ms, acked, epoch, slot
    states: list[NDArray[np.uint8]]
    outputs: NDArray[np.uint8]

    @classmethod
    def random(cls, generator: np.random.Generator, rows: int, widths: list[int], window: int, size: int) -> Sessions:
        letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
        layout = RecordLayout(generator.bytes(32).hex(), sum(widths), size, runtime=int(generator.integers(256)))
        slots = rows + 3
        table = [generator.choice(letters, (rows, 22)), generator.choice(letters, (rows, 16)),
                 generator.integers(10_000, 2**40, rows, np.uint64), generator.integers(0, 40, rows, np.uint64),
                 generator.integers(0, 2**64, rows, np.uint64),
                 generator.permutation(slots)[:rows].astype(np.int32)]  # fmt: skip
        states = [generator.integers(0, 256, (slots, width), np.uint8) for width in widths]
        return cls(layout, table, states, generator.integers(0, 256, (slots, window, size), np.uint8))

    def source(self, states: list[NDArray[np.uint8]]) -> Any:
        layout, window = self.layout, self.outputs.shape[1]
        facts = (window, layout.state_nbytes, layout.fingerprint, layout.runtime, META_PREFIX)
        return native.RecordSource(*self.table, states, self.outputs, *facts)

    def record(self, row: int, seq: int, now_ms: int) -> bytes:
        """As the NumPy of steps/records.py and record.py has it."""
        acked, slot, window = self.table[3][row], int(self.table[5][row]), self.outputs.shape[1]
        count = min(max(seq - int(acked), 1) if seq >= acked else window, window, seq)
        capacity = 1
        while capacity < count:
            capacity *= 2
        outputs = np.zeros((1, capacity, self.layout.output_nbytes), np.uint8)
        for k in range(count):
            outputs[0, k] = self.outputs[slot, (seq - count + 1 + k) % window]
        states = [state[slot : slot + 1] for state in self.states]
        one = [np.array([value], np.uint64) for value in (seq, acked, self.table[4][row])]
        return self.layout.pack(*one[:2], one[2], states, np.array([count], np.uint32), outputs, now_ms)[0].tobytes()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    widths=st.lists(st.integers(1, 40), max_size=3),
    kept=st.tuples(st.sampled_from((1, 3, 8, 32)), st.integers(0, 20)),
    seed=st.integers(0, 2**32 - 1),
    elsewhere=st.booleans(),
)
def test_records_are_put_together_from_columns(
    process: RedisProcess, rows: int, widths: list[int], kept: tuple[int, int], seed: int, elsewhere: bool
) -> None:
    generator = np.random.default_rng(seed)
    sessions = Sessions.random(generator, rows, widths, *kept)
    source = sessions.source([] if elsewhere else sessions.states)
    some = generator.permutation(rows)[: max(1, rows // 2)].astype(np.int32)
    seqs = np.where(
        generator.random(len(some)) < 0.9, sessions.table[3][some] + generator.integers(0, 40, len(some)), 0
    )
    seqs = seqs.astype(np.uint64)
    states = [state[sessions.table[5][some]] for state in sessions.states] if elsewhere else []
    keys = [record_key(bytes(sessions.table[0][row]), bytes(sessions.table[1][row])) for row in some]
    store = process.client
    store.mset(dict.fromkeys(keys, b"before"))
    connection = connected(process)
    link = native.CommitLink(connection._sock.detach())
    before = int(store.get(COUNTER) or 0)
    nbytes, counter, waited = link.commit(source, some, seqs, states, 77, COUNTER, b"", WAIT_S)
    expected = [sessions.record(int(row), int(seq), 77) for row, seq in zip(some, seqs, strict=True)]
    assert store.mget(keys) == expected and (nbytes, counter, waited) == (sum(map(len, expected)), before + 1, [])
    for key, row in zip(keys, some, strict=True):
        assert 0 <= int(sessions.table[2][row]) - store.pttl(key) < 60_000
    store.delete(keys[0])
    assert link.commit(source, some, seqs, states, 78, COUNTER, b"", WAIT_S) is None, "one is not there"
    assert link.progress() and link.verdicts()[0] == b"0" + b"+" * (len(some) - 1)
    assert store.mget(keys[1:]) == [
        sessions.record(int(row), int(seq), 78) for row, seq in list(zip(some, seqs, strict=True))[1:]
    ]


def test_columns_may_change_once_a_commit_is_sent(process: RedisProcess, link_to: MakeLink) -> None:
    """However little of it the kernel has taken."""
    generator = np.random.default_rng(3)
    sessions = Sessions.random(generator, 300, [40_000], 4, 8)
    source, rows = sessions.source(sessions.states), np.arange(300, dtype=np.int32)
    seqs = sessions.table[3] + np.uint64(1)
    keys = [record_key(bytes(tag), bytes(token)) for tag, token in zip(*sessions.table[:2], strict=True)]
    process.client.mset(dict.fromkeys(keys, b"before"))
    expected = [sessions.record(row, int(seqs[row]), 5) for row in range(300)]
    link = link_to(process)
    process.pause()
    try:
        assert link.commit(source, rows, seqs, [], 5, COUNTER) is None and link.wants_write
        for column in (*sessions.table, *sessions.states, sessions.outputs, seqs):
            column[:] = 1
    finally:
        process.go_on()
    assert link.progress(WAIT_S) and link.verdicts()[0] is None
    assert process.client.mget(keys) == expected


def test_sessions_that_do_not_fit_are_refused(process: RedisProcess, link_to: MakeLink) -> None:
    sessions = Sessions.random(np.random.default_rng(4), 5, [16, 8], 4, 8)
    source, link = sessions.source(sessions.states), link_to(process)
    one, seq = np.zeros(1, np.int32), np.ones(1, np.uint64)
    for rows, seqs, why in (
        (one + 5, seq, "no slot"),
        (one - 1, seq, "no slot"),
        (one, seq[:0], "seqs has"),
        (one.astype(np.int64), seq, "rows is no column"),
        (np.zeros((1, 2), np.int32), seq, "no slot"),
    ):
        with pytest.raises(ValueError, match=why):
            link.commit(source, rows, seqs, [], 1)
    for slot in (8, -1, 2**31 - 1):
        sessions.table[5][0] = slot
        with pytest.raises(ValueError, match="no slot"):
            link.commit(source, one, seq, [], 1)
    sessions.table[5][0] = 0
    with pytest.raises(ValueError, match="states of"):
        link.commit(sessions.source([]), one, seq, [sessions.states[0][:1]], 1)
    with pytest.raises(ValueError, match="do not fit together"):
        sessions.source(sessions.states[:1])
    with pytest.raises(ValueError, match="do not fit together"):
        native.RecordSource(*sessions.table, [], sessions.outputs, 3, 24, 0, 0, b"")
    assert link.commit(source, one, seq, [], 1, b"", b"", WAIT_S) is None, "nothing was sent of what was refused"
    assert link.progress() and link.verdicts()[0] == b"0"


def test_records_of_another_length_are_refused() -> None:
    numbers = np.ones(1, np.uint64)
    state, outputs, counts = np.zeros((1, 16), np.uint8), np.zeros((1, 2, 8), np.uint8), np.ones(1, np.uint32)
    good = np.zeros((1, 96), np.uint8)
    native.pack_records(good, 1, 0, numbers, numbers, numbers, counts, [state], outputs, 1)
    frozen = good.copy()
    frozen.flags.writeable = False
    for out in (
        np.zeros((1, 104), np.uint8),
        np.zeros((1, 88), np.uint8),
        np.zeros((1, 192), np.uint8)[:, ::2],
        frozen,
    ):
        with pytest.raises(ValueError, match=r"^out "):
            native.pack_records(out, 1, 0, numbers, numbers, numbers, counts, [state], outputs, 1)
    with pytest.raises(ValueError, match="seq has"):
        native.pack_records(good, 1, 0, numbers[:0], numbers, numbers, counts, [state], outputs, 1)
