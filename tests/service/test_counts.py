"""Limits are the whole server's: what processes count in the page that they share, and what is left of one that has died."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_service.auth.tenants import SERVER, UNKNOWN, TenantNumbers
from engram_service.auth.tokens import Book, Caller, Limits, Tokens, digest_of, heard, told
from engram_service.errors import ResourceExhaustedError
from engram_service.manager.spawning import Spawned
from engram_service.sessions import counts
from engram_service.sessions.counts import ROWS, SESSIONS, STREAMS, Page
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Streams
from engram_service.sessions.table import SessionTable
from engram_service.wire.base import NUMBER_BITS

ServerProcess = Any
Connect = Callable[..., Any]

ACME = 2  # its number
LIMITS = Limits(sessions_max=4, streams_max=3, rows_max=10)
RACE_S, WAIT_S = 2.0, 20.0


def shares_of(page: Page, process: int, limits: Limits = LIMITS, streams_max: int = 5, sessions_max: int = 6) -> Shares:
    numbers = {"acme": ACME, "globex": 3}
    return Shares(
        lambda tenant: limits,
        lambda tenant: numbers.get(tenant, UNKNOWN),
        page.column(process),
        streams_max,
        sessions_max,
    )


# What the other process does

OTHER = """
import os, sys, time, socket
from engram_service.manager.spawning import handed_over
from engram_service.sessions.counts import Page

file, _ = handed_over(socket.socket(fileno=int(sys.argv[1])))
column = Page(file).column(int(sys.argv[2]))
print("here", flush=True)
for line in sys.stdin:
    match line.split():
        case "take", *numbers:
            print(column.take(*map(int, numbers)), flush=True)
        case "race", proof, until:
            won = twice = 0
            while time.time() < float(until):
                if column.take(0, 2, 1, 1):
                    try:
                        os.close(os.open(proof, os.O_CREAT | os.O_EXCL))
                        os.unlink(proof)
                    except OSError:
                        twice += 1
                    column.add(0, 2, -1)
                    won += 1
            print(won, twice, flush=True)
"""


class Other:
    """Another process with a column of the page, to which that was handed over as to a data process."""

    def __init__(self, page: int, process: int) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", OTHER, str(theirs.fileno()), str(process)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()], text=True
        )
        theirs.close()
        Spawned(self.process, ours).hand_over(page, [])  # type: ignore[arg-type]
        ours.close()
        assert self.said() == "here"

    def say(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def take(self, thing: int, number: int, more: int, limit: int = 0) -> bool:
        self.say("take", thing, number, more, limit)
        return self.said() == "True"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.process.stdin, self.process.stdout):
            assert end is not None
            end.close()


@pytest.fixture
def page() -> Iterator[int]:
    file = counts.made(3)
    yield file
    os.close(file)


@pytest.fixture
def another(page: int) -> Iterator[Callable[[int], Other]]:
    made: list[Other] = []

    def make(process: int) -> Other:
        made.append(Other(page, process))
        return made[-1]

    yield make
    for other in made:
        if other.process.returncode is None:
            other.kill()


@pytest.mark.promise(6)
def test_a_limit_is_of_all_processes_together(page: int, another: Callable[[int], Other]) -> None:
    own, other = Page(page), another(1)
    shares = shares_of(own, 0)
    acme = shares.of("acme")

    assert other.take(STREAMS, ACME, 2)
    acme.take_stream()
    with pytest.raises(ResourceExhaustedError) as full:
        acme.take_stream()
    assert full.value.reason == "TENANT_LIMIT" and full.value.metadata["limit"] == "streams_max"
    assert not other.take(STREAMS, ACME, 1, LIMITS.streams_max) and own.column(0).total(STREAMS, ACME) == 3
    acme.give_stream()
    assert other.take(STREAMS, ACME, 1, LIMITS.streams_max)

    assert other.take(SESSIONS, ACME, 2)
    with acme.sessions(2), pytest.raises(ResourceExhaustedError, match="sessions_max"), acme.sessions(1):
        pass
    assert other.take(SESSIONS, ACME, 2, LIMITS.sessions_max)

    assert other.take(ROWS, ACME, 6)
    acme.take_unary(4)
    with pytest.raises(ResourceExhaustedError, match="rows_max"):
        acme.take_unary(1)
    assert shares.over(np.array([3, ACME])).tolist() == [False, False]
    assert other.take(ROWS, ACME, 1)
    assert shares.over(np.array([3, ACME])).tolist() == [False, True]

    other.kill()
    with pytest.raises(ResourceExhaustedError):
        acme.take_unary(1)
    own.clear(1)
    acme.take_unary(6)
    for _ in range(LIMITS.streams_max):
        acme.take_stream()


@pytest.mark.promise(6)
def test_a_limit_of_the_server_is_of_all_processes_together(page: int, another: Callable[[int], Other]) -> None:
    own, other = Page(page), another(2)
    shares = shares_of(own, 0, Limits(), streams_max=5, sessions_max=6)
    assert other.take(STREAMS, SERVER, 4) and other.take(SESSIONS, SERVER, 4)
    shares.of("acme").take_stream()
    with pytest.raises(ResourceExhaustedError) as full:
        shares.of("globex").take_stream()
    assert full.value.reason == "TOO_MANY_STREAMS" and own.column(0).total(STREAMS, 3) == 0
    shares.count_sessions("acme", 1)
    with pytest.raises(ResourceExhaustedError) as full, shares.of("globex").sessions(2):
        pass
    assert full.value.reason == "TOO_MANY_SESSIONS" and own.column(0).total(SESSIONS, 3) == 0
    with shares.of("globex").sessions(1):
        pass
    assert own.column(0).total(SESSIONS, SERVER) == 5


@pytest.mark.promise(6)
def test_of_processes_that_come_at_once_never_too_many_are_let_in(
    page: int, another: Callable[[int], Other], tmp_path: pathlib.Path
) -> None:
    others, until = [another(process) for process in range(3)], time.time() + RACE_S
    for other in others:
        other.say("race", tmp_path / "proof", until)
    found = [tuple(map(int, other.said().split())) for other in others]
    assert all(won > 100 and twice == 0 for won, twice in found), found
    assert Page(page).column(0).total(STREAMS, ACME) == 0


# What is counted


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_rows_in_flight_are_counted_by_tenant_while_there_are_limits_on_them(data: st.DataObject) -> None:
    limits = {"acme": Limits(), "globex": Limits()}
    column = counts.alone()
    shares = Shares(limits.__getitem__, {"acme": ACME, "globex": 3}.__getitem__, column, 99, 99)
    streams = Streams(None, shares, 99)  # type: ignore[arg-type]
    there: dict[int, str] = {}
    rows: Counter[int] = Counter()
    for n in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["add", "remove", "arrived", "answered", "limit"])):
            case "add":
                stream_id, tenant = 1 + n % 80 | n << NUMBER_BITS, data.draw(st.sampled_from(sorted(limits)))
                streams.add(stream_id, Caller(tenant))
                there[stream_id] = tenant
            case "remove" if there:
                gone = data.draw(st.sampled_from(sorted(there)))
                streams.remove(streams._of[gone])
                del there[gone], rows[gone]
            case "arrived" if there:
                ids = data.draw(st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=4))
                streams.arrived(np.array(ids, np.uint32))
                rows.update(ids)
            case "answered" if rows.total():
                ids = data.draw(st.lists(st.sampled_from(sorted(rows.elements())), min_size=1, max_size=4))
                ids = sorted((Counter(ids) & rows).elements())
                streams.answered(np.array(ids, np.uint32))
                rows.subtract(ids)
            case "limit":
                limits[data.draw(st.sampled_from(sorted(limits)))] = Limits(rows_max=data.draw(st.integers(0, 3)))
                shares.renew()
        counted = any(limits[tenant].rows_max for tenant in shares._of)
        for tenant, number in (("acme", ACME), ("globex", 3)):
            mine = sum(count for stream_id, count in rows.items() if there[stream_id] == tenant)
            most = limits[tenant].rows_max if tenant in shares._of else 0
            assert shares.limited == counted and column.total(ROWS, number) == counted * mine
            assert column.total(STREAMS, number) == list(there.values()).count(tenant)
            assert bool(shares.over(np.array([number]))[0]) == (0 < most < mine)
        assert column.total(STREAMS, SERVER) == len(there)


def test_sessions_are_counted_as_they_come_and_go() -> None:
    table, column = SessionTable(4), counts.alone()
    shares = Shares(lambda tenant: Limits(), {"acme": ACME, "": UNKNOWN}.__getitem__, column, 99, 99)
    table.counted = shares.count_sessions
    with shares.of("acme").sessions(3) as entered:
        assert column.total(SESSIONS, ACME) == 3
        rows = [table.add("acme\x1fa"), table.add("acme\x1fb"), table.add("nobodys")]
        entered(2)
        assert [column.total(SESSIONS, number) for number in (ACME, UNKNOWN, SERVER)] == [3, 1, 4]
    assert [column.total(SESSIONS, number) for number in (ACME, UNKNOWN, SERVER)] == [2, 1, 3]
    table.remove(np.array(rows))
    assert [column.total(SESSIONS, number) for number in (ACME, UNKNOWN, SERVER)] == [0, 0, 0]


# Numbers of tenants


def test_a_tenant_keeps_its_number_and_only_one_that_is_long_gone_loses_it() -> None:
    numbers = TenantNumbers(6)
    assert numbers.of(["a", "b", "a"]) == {"a": 2, "b": 3}
    assert numbers.of(["c", "a"]) == {"c": 4, "a": 2}
    assert numbers.of(["d", "b"]) == {"d": 5, "b": 3}
    assert numbers.of(["b", "e", "d"]) == {"b": 3, "d": 5, "e": 2}
    assert numbers.of(["d", "a", "b", "e", "f"]) == {"d": 5, "b": 3, "e": 2, "a": 4}, "there is none for f"


def test_data_processes_have_the_managers_numbers() -> None:
    def book(*tenants: str) -> Book:
        callers = {digest_of(name): Caller(name, name, digest=digest_of(name)) for name in tenants}
        return Book(callers, {}, Limits())

    manager = Tokens(book("acme", "globex"))
    first, later = Tokens(heard(json.loads(json.dumps(told(manager.book))))), Tokens()
    manager.replace(book("initech", "globex"))
    for one in (first, later):
        again = heard(json.loads(json.dumps(told(manager.book))))
        assert again is not None
        one.replace(again)
    for tenant in ("globex", "initech"):
        assert manager.number_of(tenant) == first.number_of(tenant) == later.number_of(tenant) > UNKNOWN
    assert manager.number_of("acme") == UNKNOWN and manager.number_of("globex") != manager.number_of("initech")


def test_who_comes_back_with_another_number_takes_along_what_it_has() -> None:
    numbers, column = {"acme": ACME}, counts.alone()
    shares = Shares(lambda tenant: Limits(), lambda tenant: numbers.get(tenant, UNKNOWN), column, 9, 9)
    shares.of("acme").take_stream()
    shares.count_sessions("acme", 4)
    del numbers["acme"]
    shares.renew()
    assert column.total(STREAMS, ACME) == 1, "it is gone, and what it has is not yet"
    numbers["acme"] = 7
    shares.renew()
    assert [column.total(STREAMS, number) for number in (ACME, 7, SERVER)] == [0, 1, 1]
    assert [column.total(SESSIONS, number) for number in (ACME, 7, SERVER)] == [0, 4, 4]


# A server


@pytest.mark.promise(6)
def test_what_a_process_had_that_was_killed_is_free_again(
    tmp_path: pathlib.Path, server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(
        "[tenants.acme]\nstreams_max = 1\nsessions_max = 1\nrows_max = 1\n"
        f'[tokens.one]\ntenant = "acme"\nrights = ["read", "step"]\nsha256 = "{digest_of("secret")}"\n'
    )
    with server_with("--tokens-file", str(file)) as server:
        first = connect(server, "secret")
        assert not first.open("a").errors
        with pytest.raises(grpc.RpcError, match="streams_max"):
            connect(server, "secret").next()
        os.kill(server.data_pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            first.next()
        deadline = time.monotonic() + WAIT_S
        while "is there again" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = connect(server, "secret")
        opened = second.open("b")
        assert not opened.errors
        second.step(int(np.frombuffer(opened.handles, np.uint32)[0]), 1)
        with pytest.raises(grpc.RpcError, match="streams_max"):
            connect(server, "secret").next()
