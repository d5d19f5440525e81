"""A server's side of the store, without the server: sessions that are claimed and committed; and a wire that can be cut."""

from __future__ import annotations

import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from wires import TlsEnd, Wire

from engram_service.store import (
    ClaimRequest,
    ClaimResult,
    CommitJob,
    Line,
    MetaFields,
    RecordBlock,
    RecordLayout,
    Store,
    StoreSettings,
    Verdict,
    session_tag,
)
from engram_service.store.lines import NativeLine, PythonLine

WAIT_S = 15.0
LAYOUT = RecordLayout("0123456789abcdef" * 2, 40, 12)


_LINE_S = 0.3  # until a line is given up


class Commit:
    """A commit under way: `verdicts` has what was told of each row so far."""

    def __init__(self, count: int) -> None:
        self.verdicts: list[Verdict | None] = [None] * count
        self._settled = threading.Event()

    def done(self, rows: Any, verdict: Verdict) -> None:
        for row in rows.tolist():
            assert self.verdicts[row] is None, "a row is told once"
            self.verdicts[row] = verdict
        if None not in self.verdicts:
            self._settled.set()

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    def wait(self, timeout_s: float = WAIT_S) -> list[Verdict | None]:
        assert self._settled.wait(timeout_s), self.verdicts
        return self.verdicts


@dataclass
class Table:
    """Columns of a session table."""

    tag: Any
    token: Any
    ttl_ms: Any
    acked: Any
    epoch: Any
    slot: Any


class Holder:
    """Sessions as one server holds them: claimed in its store, committed under its tokens."""

    def __init__(self, store: Store, *ids: str, layout: RecordLayout = LAYOUT, ttl_ms: int = 60_000) -> None:
        self.store, self.ids, self.layout, self.ttl_ms = store, ids, layout, ttl_ms
        self.tokens = [secrets.token_hex(8) for _ in ids]
        self.claims: list[ClaimResult] = []
        self.losses = 0
        self.epoch = 1
        self.created_ms = 5
        self._lines: dict[str, Line] = {}

    def requests(
        self, model: str = "m", version: str = "", client_id: int = 1, attach: bool = False, replaces: str | None = None
    ) -> list[ClaimRequest]:
        return [
            ClaimRequest(
                session_id=name, model=model, version=version, create_version="1", fingerprint="f" * 32,
                client_id=client_id, attach=attach, token=token, ttl_ms=self.ttl_ms, initial=self.layout.initial(1, 5),
                replaces=replaces,
            )
            for name, token in zip(self.ids, self.tokens, strict=True)
        ]  # fmt: skip

    def claim(self, **fields: Any) -> Holder:
        self.claims = self.store.claim(self.requests(**fields))
        self.losses = self.store.losses
        self.epoch = max((claim.epoch for claim in self.claims), default=1)
        self.created_ms = max((claim.created_ms for claim in self.claims), default=5)
        return self

    @property
    def tags(self) -> Any:
        return np.array([np.frombuffer(session_tag(name), np.uint8) for name in self.ids]).reshape(-1, 22)

    @property
    def token_rows(self) -> Any:
        return np.array([np.frombuffer(token.encode(), np.uint8) for token in self.tokens]).reshape(-1, 16)

    def job(self, seq: int, commit: Commit) -> CommitJob:
        """Every session at this seq; the state tells session and seq, and the last output is kept."""
        count = len(self.ids)
        states = np.zeros((count, self.layout.state_nbytes), np.uint8)
        states[:, 0], states[:, 1] = np.arange(count) % 251, seq
        column = np.full(count, seq, np.uint64)
        block = RecordBlock(
            self.layout, column, column - 1, np.ones(count, np.uint64), [states], np.ones(count, np.uint32),
            np.full((count, 1, self.layout.output_nbytes), seq, np.uint8), int(time.time() * 1000),
        )  # fmt: skip
        return CommitJob(
            self.tags,
            self.token_rows,
            lambda: [(np.arange(count), block)],
            np.full(count, self.ttl_ms, np.uint64),
            self._meta,
            commit.done,
        )

    def _meta(self, row: int) -> MetaFields:
        return MetaFields(self.ids[row], "m/1", "f" * 32, 1, self.epoch, self.created_ms, self.losses)

    def submit(self, seq: int) -> Commit:
        commit = Commit(len(self.ids))
        self.store.submit(self.job(seq, commit))
        return commit

    def commit(self, seq: int) -> list[Verdict | None]:
        return self.submit(seq).wait()

    def commit_by(self, way: str, seq: int) -> Commit:
        """By the committers, or by a line as the event loop has them: "python" or "native", or "columns", which is native and puts
        the records together itself."""
        if way == "committer":
            return self.submit(seq)
        if way not in self._lines:
            self._lines[way] = (PythonLine if way == "python" else NativeLine)(self.store._committers)
            self._lines[way].open()
        return self.commit_by_line(self._lines[way], seq, columns=way == "columns")

    def begun(self, seq: int) -> tuple[Commit, CommitJob]:
        commit = Commit(len(self.ids))
        return commit, self.job(seq, commit)

    def commit_by_line(self, line: Line, seq: int, wait_s: float = _LINE_S, columns: bool = False) -> Commit:
        commit, job = self.begun(seq)
        if columns and self._written(line, seq):
            commit.done(np.arange(len(self.ids)), Verdict.OK)
            return commit
        line.send(job)
        if line.ready(wait_s):
            line.finish()
        else:
            line.give_up()
        return commit

    def _written(self, line: Line, seq: int) -> bool:
        """As `job` has it, written by a line at once; whether all of it was."""
        (_, block), *_ = self.job(seq, Commit(len(self.ids))).blocks()
        columns = Table(self.tags, self.token_rows, np.full(len(self.ids), self.ttl_ms, np.uint64), block.acked, block.epoch,
                        np.arange(len(self.ids), dtype=np.int32))  # fmt: skip
        outputs = np.repeat(block.outputs, 4, axis=1)
        source = line.source(self.layout, columns, list(block.states), outputs)
        return bool(line.write(source, columns.slot, block.seq, [], _LINE_S / 2))

    def stored(self) -> list[int]:
        """The seq of each session as anybody finds it; -1 where there is none."""
        found = [self.store.describe(name) for name in self.ids]
        return [-1 if info is None else info.seq for info in found]

    def loaded(self) -> Any:
        job = self.job(1, Commit(len(self.ids)))
        return self.layout.unpack([value or b"" for value in self.store.load(job.tags, job.tokens)])


class Troubles:
    """What a store told of trouble, in order; "" is its end."""

    def __init__(self, store: Store) -> None:
        self.told: list[str] = []
        self.losses = 0
        store.on_trouble = self.told.append
        store.on_loss = self._lost

    def _lost(self) -> None:
        self.losses += 1


def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


@pytest.fixture
def open_store() -> Iterator[Callable[..., Store]]:
    """Started stores on URLs."""
    opened: list[Store] = []

    def make(url: str, start: bool = True, **settings: Any) -> Store:
        opened.append(Store(StoreSettings(url, **settings)))
        if start:
            opened[-1].start()
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store], redis_process: Any) -> Store:
    return open_store(redis_process.url)


@pytest.fixture
def wire(tmp_path: pathlib.Path, redis_process: Any) -> Iterator[Wire]:
    one = Wire(tmp_path / "w.sock", redis_process.socket)
    yield one
    one.close()


@pytest.fixture
def reached(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """The URL of what listens on a unix socket, reached over that or over TLS: there its answers come in small records."""
    ends: list[TlsEnd] = []

    def url(over: str, path: pathlib.Path) -> str:
        if over == "unix":
            return f"unix://{path}"
        certificates = request.getfixturevalue("certificates")
        ca = certificates.ca("ca")
        ends.append(TlsEnd(path, certificates.issue("redis"), record_nbytes=7))
        return f"rediss://127.0.0.1:{ends[-1].port}?ssl_ca_certs={ca}"

    yield url
    for end in ends:
        end.close()


@pytest.fixture
def holder() -> Callable[..., Holder]:
    return Holder


@pytest.fixture
def troubles() -> Callable[[Store], Troubles]:
    return Troubles


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    return until


@pytest.fixture(scope="session")
def layout() -> RecordLayout:
    return LAYOUT
