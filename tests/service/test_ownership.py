"""One owner: the newest open wins, on one server and on two, and a fenced server's commits fail by themselves."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import engram
from engram.v1 import session_pb2, stream_pb2

ServerProcess = Any
Raw = Any
RedisProcess = Any
Connect = Callable[[ServerProcess], Raw]

INPUTS = np.random.default_rng(6).random((60, 8), dtype=np.float32)
TAKEN_OVER = stream_pb2.EventFrame.TYPE_TAKEN_OVER


@pytest.fixture
def pair(
    tmp_path: pathlib.Path, redis_process: RedisProcess, server_type: type[ServerProcess], digits_alone: Sequence[str]
) -> Iterator[list[ServerProcess]]:
    """Two servers on one Redis."""
    servers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        flags = ("--redis-url", redis_process.url, "--interval-ms", "60000", "--interval-steps", "10000")
        servers.append(server_type(tmp_path / name, *flags, *digits_alone))
    with servers[0], servers[1]:
        yield servers


def handle_of(raw: Raw, session_id: str, seq: int = 0, **fields: Any) -> int:
    response = raw.open(session_id, **fields)
    assert not response.errors, response.errors
    assert np.frombuffer(response.seqs, np.uint64).tolist() == [seq]
    return int(np.frombuffer(response.handles, np.uint32)[0])


def step(raw: Raw, handle: int, seq: int) -> bytes:
    return bytes(raw.step(handle, seq, INPUTS[seq - 1], acknowledged_seqs=np.array([seq - 1], np.uint64).tobytes()))


@pytest.mark.promise(3)
def test_the_newest_open_wins_and_the_other_is_told(shared_server: ServerProcess, connect: Connect) -> None:
    first, second = connect(shared_server), connect(shared_server)
    name = f"mine-{time.time()}"
    old = handle_of(first, name)
    step(first, old, 1)
    new = handle_of(second, name, seq=1)
    event = first.next("event")
    assert event.type == TAKEN_OVER and np.frombuffer(event.handles, np.uint32).tolist() == [old]
    first.steps([old], [2], INPUTS[1][None])
    assert first.refusal()[0] == "TAKEN_OVER"
    step(second, new, 2)
    first.send(attach=stream_pb2.AttachFrame(request_id=1, model="digits-reader", session_ids=[name], client_id=77))
    assert [row.error.reason for row in first.next("opened").errors] == ["TAKEN_OVER"], "an attach never takes over"
    first.send(attach=stream_pb2.AttachFrame(request_id=1, model="digits-reader", session_ids=[name], client_id=5))
    assert not first.next("opened").errors, "the client that opened it last may attach again"


def test_an_open_of_a_client_that_is_gone_takes_nothing(pair: list[ServerProcess], connect: Connect) -> None:
    """It was sent to a server that hung; its client was killed, and began again at another server."""
    one, two = pair
    gone, again = connect(one), connect(two)
    handle_of(gone, "other")
    one.signal(signal.SIGSTOP)
    try:
        names = [f"mine-{number}" for number in range(20)]
        gone.send(open=stream_pb2.OpenFrame(request_id=2, model="digits-reader", session_ids=names, client_id=5))
        time.sleep(0.2)
        gone.close()
        opened = again.open(*names, client_id=6)
        handles = np.frombuffer(opened.handles, np.uint32).tolist()
    finally:
        one.signal(signal.SIGCONT)
    time.sleep(1.0)
    for handle in handles:
        step(again, handle, 1)


@pytest.mark.promise(3)
def test_an_open_that_comes_late_takes_nothing_from_a_newer_one(pair: list[ServerProcess], connect: Connect) -> None:
    """The wire held it back: its server knows nothing of its client's end, and is the one that claims last."""
    one, two = pair
    handle_of(connect(two), "kept", client_id=4)
    late, newer = connect(one), connect(two)
    late.send(open=stream_pb2.OpenFrame(model="digits-reader", session_ids=["kept", "new"], client_id=5, confirms=True))
    first = late.next()
    assert first.WhichOneof("frame") == "confirm"
    handles = np.frombuffer(newer.open("kept", "new", client_id=6).handles, np.uint32).tolist()
    late.send(confirm=first.confirm)  # sent before the newer open, for all that a server can know
    second = late.next()
    assert second.WhichOneof("frame") == "confirm", "the sessions are another's by now: is it still there?"
    late.send(confirm=first.confirm)  # the same again says nothing of now
    for handle in handles:
        step(newer, handle, 1)
    late.send(confirm=second.confirm)
    opened = late.next("opened")
    assert not opened.errors, "it is there, and was the last to open"
    newer.steps(handles[:1], [2], INPUTS[1][None])
    assert newer.refusal()[0] == "TAKEN_OVER"
    third, newest = connect(one), connect(two)
    third.send(open=stream_pb2.OpenFrame(model="digits-reader", session_ids=["kept"], client_id=7, confirms=True))
    third.next("confirm")
    handle = handle_of(newest, "kept", seq=1, client_id=8)
    third.close()
    time.sleep(0.3)
    step(newest, handle, 2)


SLOW_LOOK = """
import time
from engram_service.store import Store

real, calls = Store.holders, []

def holders(self, ids):
    calls.append(1)
    if len(calls) == 1:
        time.sleep(0.5)
    return real(self, ids)

Store.holders = holders
"""


def test_of_two_opens_of_one_stream_the_later_one_stays(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    """A client that has called an open off asks again: the first one, which goes on and comes late, takes nothing from the second."""
    server = server_with()
    server.faults = SLOW_LOOK
    with server:
        raw = connect(server)
        for number in (1, 2):
            raw.send(
                open=stream_pb2.OpenFrame(request_id=number, model="digits-reader", session_ids=["one"], client_id=5)
            )
            time.sleep(0.1)
        second, first = raw.next("opened"), raw.next("opened")
        assert (second.request_id, first.request_id) == (2, 1)
        assert [error.error.reason for error in first.errors] == ["TAKEN_OVER"]
        (handle,) = np.frombuffer(second.handles, np.uint32).tolist()
        raw.step(handle, 1)
        raw.send(close=stream_pb2.CloseFrame(request_id=3, handles=second.handles))
        assert not raw.next("closed").errors


def test_a_client_is_asked_behind_thousands_of_opens(shared_server: ServerProcess, connect: Connect) -> None:
    """What it answers comes behind the opens that it has sent already."""
    names = [f"many-{time.time()}-{number}" for number in range(2000)]
    connect(shared_server).open(*names, client_id=4)
    raw = connect(shared_server)
    for number, name in enumerate(names, 1):
        frame = stream_pb2.OpenFrame(
            request_id=number, model="digits-reader", session_ids=[name], client_id=5, confirms=True
        )
        raw.send(open=frame)
    opened: set[int] = set()
    while len(opened) < len(names):
        response = raw.next()
        if response.WhichOneof("frame") == "confirm":
            raw.send(confirm=response.confirm)
        else:
            assert not response.opened.errors
            opened.add(response.opened.request_id)


def test_one_id_belongs_to_one_model(
    tmp_path: pathlib.Path, connect: Connect, server_with: Callable[..., ServerProcess]
) -> None:
    import engram_models

    models = tmp_path / "models"
    engram_models.write_bundle(models, "other", "1", engram_models.GRU(3, 4))
    with server_with("--models", str(models), "--shipped-models", "true") as server:
        raw = connect(server)
        handle_of(raw, "shared-id")
        response = raw.open("shared-id", model="other")
        assert [row.error.reason for row in response.errors] == ["SESSION_OF_OTHER_MODEL"]


@pytest.mark.promise(3)
def test_two_servers_hand_a_session_back_and_forth(pair: list[ServerProcess], connect: Connect) -> None:
    raws = [connect(server) for server in pair]
    lone = handle_of(raws[0], "lone")
    expected = [step(raws[0], lone, seq) for seq in range(1, 9)]
    for seq in range(1, 9):
        handle = handle_of(raws[seq % 2], "wanderer", seq=seq - 1)
        assert step(raws[seq % 2], handle, seq) == expected[seq - 1]


@pytest.mark.promise(3)
def test_a_server_that_was_asleep_cannot_write(pair: list[ServerProcess], connect: Connect) -> None:
    one, two = pair
    raw = connect(one)
    handle = handle_of(raw, "zombie")
    expected_handle = handle_of(raw, "undisturbed")
    expected = [step(raw, expected_handle, seq) for seq in range(1, 6)]
    assert step(raw, handle, 1) == expected[0]
    raw.steps([handle], [2], INPUTS[1][None])
    assert bytes(raw.next("outputs").outputs) == expected[1]
    one.signal(signal.SIGSTOP)
    try:
        taker = connect(two)
        taken = handle_of(taker, "zombie", seq=2)
        raw.steps([handle], [3], INPUTS[50][None])  # another input, which must never be applied
        assert step(taker, taken, 3) == expected[2]
    finally:
        one.signal(signal.SIGCONT)
    reason, _ = raw.refusal()
    assert reason == "TAKEN_OVER"
    assert step(taker, taken, 4) == expected[3]
    assert step(raw, expected_handle, 6), "its other sessions go on"


@pytest.mark.promise(2)
def test_a_killed_server_comes_back_with_every_session(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server)
    names = [f"s{n}" for n in range(50)]
    response = raw.open(*names, "reference")
    handles = np.frombuffer(response.handles, np.uint32).tolist()
    for seq in range(1, 4):
        raw.steps(handles, [seq] * 51, np.tile(INPUTS[seq - 1], (51, 1)))
        count = 0
        while count < 51:
            count += len(raw.next("outputs").seqs) // 8
    last = step(raw, handles[-1], 4)
    server.restart()
    raw = connect(server)
    response = raw.open(*names)
    assert np.frombuffer(response.seqs, np.uint64).tolist() == [3] * 50
    for handle in np.frombuffer(response.handles, np.uint32).tolist()[:5]:
        assert step(raw, handle, 4) == last


@pytest.mark.promise(4)
def test_the_answer_that_was_lost_is_given_after_a_restart(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server)
    handle = handle_of(raw, "lost-reply")
    answers = [bytes(raw.step(handle, seq, INPUTS[seq - 1])) for seq in (1, 2, 3)]
    server.restart()
    raw = connect(server)
    handle = handle_of(raw, "lost-reply", seq=3)
    raw.steps([handle] * 3, [1, 2, 3], np.zeros((3, 8), np.float32))
    outputs = raw.next("outputs")
    assert np.frombuffer(outputs.seqs, np.uint64).tolist() == [1, 2, 3]
    assert bytes(outputs.outputs) == b"".join(answers)


@pytest.mark.promise(12)
def test_a_client_killed_in_the_middle_disturbs_nobody(shared_server: ServerProcess, connect: Connect) -> None:
    raw = connect(shared_server)
    handle = handle_of(raw, f"neighbour-{time.time()}")
    program = (
        "import sys, threading, time, grpc, numpy as np\n"
        "from engram.v1 import stream_pb2 as s\n"
        "def frames():\n"
        "    yield s.StreamRequest(open=s.OpenFrame(request_id=1, model='digits-reader', session_ids=[''], client_id=2))\n"
        "    seq = 0\n"
        "    while True:\n"
        "        seq += 1\n"
        "        yield s.StreamRequest(steps=s.StepsFrame(handles=bytes(4), seqs=np.array([seq], np.uint64).tobytes(),\n"
        "            inputs=bytes(32), acknowledged_seqs=np.array([seq - 1], np.uint64).tobytes()))\n"
        "ch = grpc.insecure_channel(sys.argv[1])\n"
        "call = ch.stream_stream('/engram.v1.EngramService/Stream', request_serializer=s.StreamRequest.SerializeToString,\n"
        "    response_deserializer=s.StreamResponse.FromString)(frames())\n"
        "for n, _ in enumerate(call):\n"
        "    if n == 20: print('going', flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", program, shared_server.address], stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline() == b"going\n"
    for seq in range(1, 20):
        step(raw, handle, seq)
    client.kill()
    client.wait()
    for seq in range(20, 40):
        step(raw, handle, seq)


def test_fork_export_import_and_state(shared_server: ServerProcess, connect: Connect) -> None:
    raw = connect(shared_server)
    name = f"source-{time.time()}"
    handle = handle_of(raw, name, durability=2)
    for seq in (1, 2, 3):
        step(raw, handle, seq)
    fork = raw.unary(
        "ForkSession", session_pb2.ForkSessionRequest(session_id=name), session_pb2.ForkSessionResponse
    ).session
    exported = raw.unary(
        "ExportSession", session_pb2.ExportSessionRequest(session_id=name), session_pb2.ExportSessionResponse
    ).data
    imported = raw.unary(
        "ImportSession",
        session_pb2.ImportSessionRequest(data=exported, session_id=name + "-i"),
        session_pb2.ImportSessionResponse,
    ).session
    assert (fork.seq, imported.seq) == (3, 3), "what is volatile is committed before it is copied"
    states = [
        raw.unary(
            "GetSessionState", session_pb2.GetSessionStateRequest(session_id=one), session_pb2.GetSessionStateResponse
        )
        for one in (name, fork.id, imported.id)
    ]
    assert len({tuple(tensor.data for tensor in state.tensors) for state in states}) == 1
    expected = step(raw, handle, 4)
    for one in (fork.id, imported.id):
        assert step(raw, handle_of(raw, one, seq=3), 4) == expected
    damaged = bytearray(exported)
    damaged[len(damaged) // 2] ^= 1
    import grpc

    with pytest.raises(grpc.RpcError, match="digest"):
        raw.unary(
            "ImportSession",
            session_pb2.ImportSessionRequest(data=bytes(damaged), session_id="d"),
            session_pb2.ImportSessionResponse,
        )


def test_a_copy_waits_for_the_step_that_it_is_to_stand_at(pair: list[ServerProcess], connect: Connect) -> None:
    """Durability `interval` lets Redis be behind, and another server than the session's has only that."""
    first, second = (engram.Client(server.address) for server in pair)
    with first, second:
        session = first.open("digits-reader", "ahead", durability="interval")
        session.run(INPUTS[:4])
        assert second.sessions.fork("ahead", "behind").seq == 0
        with pytest.raises(engram.EngramError):
            second.sessions.export("ahead", min_seq=4, timeout=0.5)
        assert session.fork("level").seq == 4
        for copy in (
            second.sessions.import_(second.sessions.export("ahead", min_seq=4), "other"),
            second.sessions.fork("ahead", min_seq=4),
        ):
            assert copy.seq == 4
        session.run(INPUTS[4:6])
        state, level = session.state(), second.sessions.state("level")
        second.open("digits-reader", "level").run(INPUTS[4:6])
        assert all((state[name] == tensor).all() for name, tensor in second.sessions.state("level", min_seq=6).items())
        assert any((state[name] != tensor).any() for name, tensor in level.items())
