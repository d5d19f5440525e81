"""Redis and the wire to it in trouble: answers lost, connections left behind, killed, emptied, full, paused. Nothing that was
acknowledged is lost, nothing is applied twice, and everything goes on by itself."""

from __future__ import annotations

import logging
import os
import pathlib
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import redis

from engram_service.store import ClaimStatus, Store, StoreError, StoreUnavailableError, Verdict, session_tag
from engram_service.store.packing import read_replies
from engram_service.store.private import PrivateRedis, PrivateSettings

_NO_EXTENSION = pytest.mark.skipif(
    find_spec("engram_native") is None, reason="engram_native is not here: make install builds it"
)
WAYS = ["committer", "python", *(pytest.param(way, marks=_NO_EXTENSION) for way in ("native", "columns"))]
OVER = ["unix", "tls"]

MakeHolder = Callable[..., Any]
OpenStore = Callable[..., Store]
OK, FENCED = Verdict.OK, Verdict.FENCED


@pytest.mark.promise(2)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("way", WAYS)
def test_a_commit_whose_answer_is_lost_is_settled_once(
    open_store: OpenStore, wire: Any, reached: Callable[..., str], holder: MakeHolder, way: str, over: str
) -> None:
    owner = holder(open_store(reached(over, wire.path)), "a", "b").claim()
    commit = partial(owner.commit_by, way)
    assert commit(1).wait() == [OK, OK]
    wire.lose_answer_to(b"\r\nXX\r\n")
    assert commit(2).wait() == [OK, OK]
    assert wire.lost == 1 and owner.stored() == [2, 2]


@pytest.mark.parametrize("way", WAYS)
def test_a_line_whose_connection_was_lost_goes_on_by_itself(
    open_store: OpenStore, wire: Any, holder: MakeHolder, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it is the first commit over a connection that is lost, or a later one."""
    owner = holder(open_store(wire.url), "a", "b").claim()
    for seq in range(1, 13):
        if seq % 4 in (1, 2):
            wire.lose_answer_to(b"\r\nXX\r\n")
        assert owner.commit_by(way, seq).wait() == [OK, OK]
    assert wire.lost == 6 and owner.stored() == [12, 12]
    assert "not foreseen" not in caplog.text


@pytest.mark.promise(3)
def test_a_commit_that_was_written_but_never_answered_and_then_fenced(
    open_store: OpenStore, store: Store, wire: Any, holder: MakeHolder
) -> None:
    """The verdict says that the session was lost, and that the commit may have been written; the taker has it."""
    owner = holder(open_store(wire.url), "a").claim()
    taker = holder(store, "a")
    done = threading.Event()
    owner.store.on_trouble = lambda why: None if done.is_set() else (taker.claim(), done.set())
    wire.lose_answer_to(b"\r\nXX\r\n")
    assert owner.commit(1) == [Verdict.FENCED_LATE]
    records = taker.layout.unpack([taker.claims[0].record])
    assert records.seq.tolist() == [1] and taker.commit(2) == [OK]


@pytest.mark.promise(2)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_lost_connection_still_holds_never_comes_after_later_commits(
    open_store: OpenStore, wire: Any, reached: Callable[..., str], holder: MakeHolder, way: str, over: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Commit 1 is stuck on the way, is given up and sent again on another connection, and 2 follows; then the first arrives."""
    from engram_service.store import committer

    monkeypatch.setattr(committer, "TIMEOUT_S", 0.5)
    owner = holder(open_store(reached(over, wire.path)), "a")
    owner.claim()
    wire.hold(b"\r\nXX\r\n")
    first = owner.commit_by(way, 1)
    assert wire.held.wait(5) and first.wait() == [OK]
    assert owner.commit(2) == [OK]
    wire.release()
    assert owner.stored() == [2], "the first commit, come late, has overwritten the second"


def test_management_calls_whose_answers_are_lost(open_store: OpenStore, wire: Any, holder: MakeHolder) -> None:
    store = open_store(wire.url)

    def losing(call: Callable[[], Any]) -> Any:
        lost = wire.lost
        wire.lose_answer_to(b"EVALSHA")
        result = call()
        assert wire.lost == lost + 1
        return result

    for name in ("warm", "up"):  # the scripts are loaded, so that the lost answer is that of the script itself
        holder(store, name).claim().commit(1)
    info = store.describe("warm", with_record=True)
    assert info is not None
    assert store.create("copy", "m/1", "f" * 32, info.record, 60_000, "0" * 16)
    assert store.rewrite(info, "m/2", "f" * 32, info.record, "1" * 16)
    store.delete(["warm"])

    claimed = losing(lambda: holder(store, "new").claim().claims)
    assert [(claim.status, claim.epoch) for claim in claimed] == [(ClaimStatus.CREATED, 1)]
    claimed = losing(lambda: holder(store, "new").claim().claims)
    assert [(claim.status, claim.epoch) for claim in claimed] == [(ClaimStatus.CARRIED, 2)]
    assert losing(lambda: store.create("fork", "m/1", "f" * 32, info.record, 60_000, "2" * 16))
    fork = store.describe("fork")
    assert fork is not None
    assert losing(lambda: store.rewrite(fork, "m/2", "f" * 32, info.record, "3" * 16))
    moved = store.describe("fork")
    assert moved is not None and (moved.version, moved.epoch) == ("2", 2)
    losing(lambda: store.delete(["fork"]))
    assert not store.exists("fork")


def test_a_delete_that_comes_late_does_not_end_the_next_session_of_the_id(store: Store, holder: MakeHolder) -> None:
    first = holder(store, "a").claim()
    tokens = [token.encode() for token in first.tokens]
    store.delete(["a"], tokens)
    second = holder(store, "a").claim()
    store.delete(["a"], tokens)
    assert second.commit(1) == [OK] and second.stored() == [1]
    store.delete(["a"])
    assert second.stored() == [-1]


def test_a_private_redis_that_is_killed_loses_nothing_acknowledged(
    tmp_path: pathlib.Path, open_store: OpenStore, holder: MakeHolder, troubles: Any
) -> None:
    private = PrivateRedis(PrivateSettings(tmp_path / "data"))
    private.start()
    try:
        store = open_store(private.url)
        told = troubles(store)
        owner = holder(store, *(f"s{n}" for n in range(20))).claim()
        for seq in range(1, 60):
            if seq == 30:
                os.kill(redis.Redis.from_url(private.url).info("server")["process_id"], 9)
            assert owner.commit(seq) == [OK] * 20
            if seq in (29, 30):
                assert owner.stored() == [seq] * 20
        assert told.losses == 0 and store.losses == 0, "nothing was lost, so nothing had to be written back"
    finally:
        private.stop()
    again = PrivateRedis(PrivateSettings(tmp_path / "data"))
    again.start()
    try:
        assert holder(open_store(again.url), *owner.ids).stored() == [59] * 20
    finally:
        again.stop()


def test_a_redis_that_comes_back_empty_is_noticed_and_written_to(
    store: Store, redis_process: Any, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    told = troubles(store)
    owner = holder(store, "a", "b").claim()
    owner.commit(1)
    owner.losses = store.losses
    redis_process.lose_data()
    redis_process.start()
    eventually(lambda: told.losses == 1)
    assert owner.stored() == [-1, -1]
    assert owner.commit(1) == [OK, OK] and owner.stored() == [1, 1]
    assert owner.commit(2) == [OK, OK] and told.losses == store.losses == 1
    later = holder(store, "later").claim()
    store.delete(["later"])
    assert later.commit(1)[0] in (Verdict.GONE, Verdict.GONE_LATE), "closed after the loss: not written back"


def test_a_claim_does_not_start_a_session_over_when_redis_came_back_empty(
    store: Store, redis_process: Any, holder: MakeHolder
) -> None:
    owner = holder(store, "a").claim()
    owner.commit(1)
    store._watch.ended.set()  # without the watcher, which might see it first and hold claims back in the core
    store._watch.thread.join()
    redis_process.lose_data()
    redis_process.start()
    with pytest.raises(StoreUnavailableError, match="lost its data"):
        holder(store, "a").claim()
    assert owner.commit(2) == [OK]
    assert holder(store, "a").claim().claims[0].status is ClaimStatus.CARRIED


@pytest.mark.promise(2)
def test_what_was_on_its_way_when_redis_lost_its_data_does_not_meet_the_empty_one(
    store: Store, redis_process: Any, holder: MakeHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look whether the data is there and the claim itself, Redis dies and comes back with nothing."""
    owner = holder(store, "a").claim()
    owner.commit(1)
    tags, tokens = owner.tags, np.array([list(token.encode()) for token in owner.tokens], np.uint8)
    store._watch.ended.set()  # without the watcher, which might see it first
    store._watch.thread.join()
    with monkeypatch.context() as patch:
        patch.setattr(store._watch, "check_generation", lambda: False)
        redis_process.lose_data()
        redis_process.start()
        with pytest.raises(StoreUnavailableError, match="lost its data"):
            holder(store, "a").claim()
        with pytest.raises(StoreUnavailableError, match="lost its data"):
            store.diagnose(tags, tokens)
    assert owner.commit(2) == [OK]
    assert holder(store, "a").claim().claims[0].status is ClaimStatus.CARRIED


def test_a_claim_waits_while_what_was_lost_is_written_back(
    store: Store, redis_process: Any, holder: MakeHolder, eventually: Any
) -> None:
    """Also if it was another thread that found the loss: a claim or a look that comes right after it would find nothing."""
    told: list[None] = []
    store.on_loss = lambda: told.append(None)
    owner = holder(store, "a").claim()
    owner.commit(1)
    writing_back = True
    store.writing_back = lambda: writing_back
    redis_process.lose_data()
    redis_process.start()
    eventually(lambda: told)
    for ask in (holder(store, "a").claim, lambda: store.describe("a")):
        with pytest.raises(StoreUnavailableError, match="lost its data"):
            ask()
    assert owner.commit(1) == [OK]
    writing_back = False
    assert holder(store, "a").claim().claims[0].status is ClaimStatus.CARRIED


def test_a_full_redis_is_told_and_recovered_from(
    start_redis: Any, open_store: OpenStore, holder: MakeHolder, troubles: Any, eventually: Any
) -> None:
    process = start_redis("--maxmemory-policy", "noeviction")
    store = open_store(process.url)
    told = troubles(store)
    owner = holder(store, "a").claim()
    assert owner.commit(1) == [OK]
    process.client.config_set("maxmemory", "1")
    stuck = owner.submit(2)
    eventually(lambda: any("OOM" in why for why in told.told))
    with pytest.raises(StoreUnavailableError, match=r"OOM|maxmemory"):
        holder(store, "b").claim()
    assert not stuck.settled and owner.stored() == [1]
    process.client.config_set("maxmemory", "0")
    assert stuck.wait() == [OK]
    eventually(lambda: told.told[-1] == "")
    assert owner.commit(3) == [OK] and holder(store, "b").claim().commit(1) == [OK]


def test_redis_may_be_away_for_any_number_of_attempts(
    store: Store, redis_process: Any, holder: MakeHolder, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    """redis-py's pools make a hundred connections and no more, unless they are given back."""
    from engram_service.store import links, pending

    attempts: list[object] = []
    ready = links.Link._ready
    monkeypatch.setattr(links.Link, "_ready", lambda link: (attempts.append(link), ready(link))[1])
    monkeypatch.setattr(pending, "_BACKOFF_S", (0.001,))
    redis_process.client.config_set("appendfsync", "always")  # else Redis may put off to write what it has answered
    owner = holder(store, "a").claim()
    redis_process.kill()
    stuck = owner.submit(1)
    eventually(lambda: len(attempts) > 150)
    redis_process.start()
    assert stuck.wait() == [OK]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("way", WAYS)
def test_a_paused_redis_is_waited_for(
    open_store: OpenStore, redis_process: Any, reached: Callable[..., str], holder: MakeHolder, troubles: Any,
    eventually: Any, way: str, over: str,
) -> None:  # fmt: skip
    store = open_store(redis_process.url if over == "unix" else reached(over, redis_process.socket))
    told = troubles(store)
    owner = holder(store, "a").claim()
    owner.commit(1)
    redis_process.pause()
    stuck = owner.commit_by(way, 2)
    eventually(lambda: told.told)
    assert not stuck.settled and told.told[0]
    redis_process.go_on()
    assert stuck.wait() == [OK]
    assert [owner.commit(seq) for seq in range(3, 20)] == [[OK]] * 17 and owner.stored() == [19]
    eventually(lambda: told.told[-1] == "")


def test_half_an_answer_is_waited_for_once() -> None:
    """A Redis that is killed while it rewrites its file leaves a child that keeps the connections open, and silent."""

    class Recorded(socket.socket):
        flags: list[int] = []

        def recv(self, size: int, flags: int = 0) -> bytes:
            self.flags.append(flags)
            return super().recv(size, flags)

    ours, redis_end = socket.socketpair()
    with redis_end, Recorded(fileno=ours.detach()) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 50_000))
        redis_end.sendall(b"+OK\r\n" * 3)
        with pytest.raises(BlockingIOError):
            read_replies(end, 5)
        assert end.flags == [socket.MSG_WAITALL, socket.MSG_DONTWAIT]


def test_two_servers_do_not_share_a_data_directory(tmp_path: pathlib.Path) -> None:
    one = PrivateRedis(PrivateSettings(tmp_path / "data"))
    one.start()
    try:
        with pytest.raises(StoreError, match="in use by another server"):
            PrivateRedis(PrivateSettings(tmp_path / "data")).start()
        assert redis.Redis.from_url(one.url).ping(), "the first one's Redis is not disturbed"
    finally:
        one.stop()


def test_a_private_redis_is_found_again_and_long_paths_work(tmp_path: pathlib.Path, open_store: OpenStore) -> None:
    directory = tmp_path / ("long" * 40)
    one = PrivateRedis(PrivateSettings(directory))
    one.start()
    first = redis.Redis.from_url(one.url).info("server")["process_id"]
    one._stopping.set()  # as if its server had been killed: Redis goes on, the lock is let go
    assert one._lock is not None
    one._lock.close()
    two = PrivateRedis(PrivateSettings(directory))
    two.start()
    try:
        assert two.url == one.url and redis.Redis.from_url(two.url).info("server")["process_id"] == first
    finally:
        two.stop()
    assert one._process is not None
    one._process.wait(10)


@pytest.mark.parametrize("obstacle", ["a file", "no permission", "nothing can be written"])
def test_a_data_directory_that_cannot_be_used(tmp_path: pathlib.Path, obstacle: str) -> None:
    directory = tmp_path / "data"
    if obstacle == "a file":
        directory.write_text("")
    elif os.geteuid() == 0:
        directory = pathlib.Path(
            "/proc/engram" if obstacle == "no permission" else "/proc/self/attr"
        )  # not even for root
    elif obstacle == "no permission":
        tmp_path.chmod(0o500)
    else:
        directory.mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"data_dir .* cannot be used"):
        PrivateRedis(PrivateSettings(directory)).start()


def test_a_password_is_used_and_never_shown(
    start_redis: Any, open_store: OpenStore, holder: MakeHolder, troubles: Any, eventually: Any, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    process = start_redis("--requirepass", "open sesame")
    good = f"unix://:open%20sesame@{process.socket}"
    store = open_store(good)
    told = troubles(store)
    owner = holder(store, "a").claim()
    assert owner.commit(1) == [OK]
    shown: list[str] = []
    for wrong in (f"unix://:swordfish@{process.socket}", process.url):
        with pytest.raises(StoreError, match=r"credentials|redis_url") as caught:
            open_store(wrong)
        shown.append(str(caught.value))
    with pytest.raises(StoreError, match="redis_url") as caught:
        open_store("http://:swordfish@nowhere")
    shown.append(str(caught.value))
    process.kill()
    stuck = owner.submit(2)
    eventually(lambda: told.told)
    with pytest.raises(StoreUnavailableError) as unavailable:
        owner.claim()
    process.start()
    assert stuck.wait() == [OK]
    shown += [str(unavailable.value), repr(store.settings), *told.told, caplog.text]
    assert not any(secret in text for text in shown for secret in ("sesame", "swordfish")), shown
    assert session_tag("a").decode() not in caplog.text


def test_the_private_redis_keeps_its_file_short(tmp_path: Any, eventually: Callable[..., None]) -> None:
    """The same 400 records written again and again: the file follows the data, also across restarts."""
    value = os.urandom(100_000)

    def write_much(client: redis.Redis) -> None:
        for _ in range(8):
            with client.pipeline(transaction=False) as pipe:
                for n in range(400):
                    pipe.set(f"key{n}", value)
                pipe.execute()
        eventually(lambda: client.info("persistence")["aof_current_size"] < 200 << 20)
        assert client.dbsize() == 400

    for _ in range(2):
        private = PrivateRedis(PrivateSettings(tmp_path / "data"))
        private.start()
        try:
            write_much(redis.Redis.from_url(private.url))
        finally:
            private.stop()


def test_a_look_at_a_missing_record_that_fails_is_tried_again(
    store: Store, holder: MakeHolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner = holder(store, "a", "b").claim()
    holder(store, "a").claim()
    real, calls = store.diagnose, []

    def diagnose(*columns: Any) -> list[Verdict]:
        calls.append(columns)
        if len(calls) < 3:
            raise StoreUnavailableError("Redis went away just now")
        return real(*columns)

    monkeypatch.setattr(store, "diagnose", diagnose)
    assert owner.commit(1) == [FENCED, OK] and len(calls) == 3
    assert "not foreseen" not in caplog.text


def test_a_committer_outlives_what_is_raised_where_it_tells_what_became_of_a_commit(
    store: Store, holder: MakeHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engram_service.store.committer import Committers

    owner, real, failures = holder(store, "a").claim(), Committers._take, []

    def take(self: Committers, *rest: Any) -> None:
        if len(failures) < 4:  # more often than there are committers
            failures.append(rest)
            raise RuntimeError("not foreseen")
        real(self, *rest)

    monkeypatch.setattr(Committers, "_take", take)
    assert owner.commit(1) == [OK] and owner.commit(2) == [OK] and len(failures) == 4
