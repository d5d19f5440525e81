"""What was let go of is let go of: ends that are cut off or delayed, opens that are cancelled, handles, quotas, rows in flight."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from engram.v1 import session_pb2, stream_pb2
from engram_models import shipped_models_dir

ServerProcess = Any
Raw = Any
Connect = Callable[..., Raw]

COUNT = 40
TOKEN = "engram_" + "7" * 40


@pytest.fixture(scope="module")
def server(server_type: Any, module_redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for one tenant, which may have COUNT sessions in use and as many stored."""
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    directory = tmp_path_factory.mktemp("letting-go")
    tokens = directory / "tokens.toml"
    tokens.write_text(
        f'[tenants.acme]\nsessions_max = {COUNT}\nstored_max = {COUNT}\n[tokens.one]\ntenant = "acme"\nsha256 = "{digest}"\n'
        'rights = ["step", "read", "manage", "operate"]\n'
    )
    models = directory / "models"
    models.mkdir()
    (models / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    flags = ("--redis-url", module_redis.url, "--tokens-file", str(tokens), "--models", str(models))
    with server_type(directory, *flags, "--resident-idle-s", "0.5", "--step-timeout-s", "2") as process:
        yield process


@pytest.fixture
def redis_process(module_redis: Any) -> Iterator[Any]:
    """Its Redis, which goes on after the test in any case."""
    yield module_redis
    module_redis.go_on()


@pytest.fixture(autouse=True)
def _places(server: ServerProcess, redis_process: Any, connect: Connect) -> Iterator[None]:
    """Every test has all of the tenant's places."""
    yield
    redis_process.go_on()
    raw = connect(server, TOKEN)
    listed = raw.unary(
        "ListSessions", session_pb2.ListSessionsRequest(page_size=1000), session_pb2.ListSessionsResponse
    )
    for session in listed.sessions:
        raw.unary(
            "CloseSession", session_pb2.CloseSessionRequest(session_id=session.id), session_pb2.CloseSessionResponse
        )


def handles_of(opened: Any) -> list[int]:
    assert not opened.errors, opened.errors
    return np.frombuffer(opened.handles, np.uint32).tolist()


def close(raw: Raw, handles: list[int], detach: bool = False) -> None:
    raw.send(close=stream_pb2.CloseFrame(request_id=9, handles=np.array(handles, np.uint32).tobytes(), detach=detach))


def until(server: ServerProcess, name: str, value: float = 0, seconds: float = 15) -> None:
    """Waits for a figure of /metrics, which is a sum over its labels."""
    end = time.monotonic() + seconds
    while (found := sum(figure for key, figure in server.series().items() if key.split("{")[0] == name)) != value:
        assert time.monotonic() < end, f"{name} is {found}, and not {value}"
        time.sleep(0.1)


def reasons(frame: Any) -> set[str]:
    return {one.error.reason for one in frame.errors}


@pytest.mark.promise(12)
@pytest.mark.parametrize("detach", [False, True], ids=["close", "detach"])
def test_an_end_whose_stream_is_cut_off_is_finished(server: ServerProcess, connect: Connect, detach: bool) -> None:
    for lag in (0.0, 0.001, 0.002, 0.003, 0.005, 0.01):
        raw = connect(server, TOKEN)
        handles = handles_of(raw.open(*(f"s{lag}-{n}" for n in range(COUNT))))
        raw.steps(handles, [1] * COUNT)  # under way, so that the end has to wait
        close(raw, handles, detach)
        time.sleep(lag)
        raw.call.cancel()
        until(server, "engram_sessions")
        raw = connect(server, TOKEN)  # a close that had not been read when the stream was cut off was not begun
        close(raw, handles_of(raw.open(*(f"s{lag}-{n}" for n in range(COUNT)))))
        assert not raw.next("closed").errors
    until(server, "engram_rows_in_flight")


@pytest.mark.promise(12)
def test_an_end_while_redis_hangs_is_finished_and_its_repeat_joins_it(
    server: ServerProcess, redis_process: Any, connect: Connect
) -> None:
    raw = connect(server, TOKEN)
    handles = handles_of(raw.open(*(f"s{n}" for n in range(COUNT))))
    redis_process.pause()
    close(raw, handles)
    assert reasons(raw.next("closed")) == {"STORE_UNAVAILABLE"}, "it is not said to be done while it is not"
    close(raw, handles)
    redis_process.go_on()
    assert not raw.next("closed").errors, "the repeat waits for the end that is under way"
    with pytest.raises(grpc.RpcError, match="there is no session"):
        raw.get("s0")
    close(raw, handles)
    assert not raw.next("closed").errors, "what this stream has ended is ended"
    raw.steps(handles[:1], [1])
    assert raw.refusal()[0] == "SESSION_CLOSED"
    until(server, "engram_sessions")
    assert len(handles_of(raw.open(*(f"t{n}" for n in range(COUNT))))) == COUNT, "the quota is free again"


@pytest.mark.promise(12)
def test_an_open_that_is_cancelled_leaves_no_session_and_no_place(
    server: ServerProcess, redis_process: Any, connect: Connect
) -> None:
    for lag in (0.0, 0.002, 0.005, 0.02, 1.0):
        raw = connect(server, TOKEN)
        if lag == 1.0:
            redis_process.pause()
        frame = stream_pb2.OpenFrame(
            request_id=1, model="digits-reader", session_ids=[f"s{n}" for n in range(COUNT)], client_id=5
        )
        raw.send(open=frame)
        time.sleep(lag)
        raw.call.cancel()
    redis_process.go_on()
    until(server, "engram_sessions")
    raw = connect(server, TOKEN)
    for name in ("s", "t"):
        handles = handles_of(raw.open(*(f"{name}{n}" for n in range(COUNT))))
        close(raw, handles)
        assert not raw.next("closed").errors


@pytest.mark.promise(12)
def test_handles_are_used_again_and_old_ones_name_nobody(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server, TOKEN)
    before: list[int] = []
    for number in range(30):
        handles = handles_of(raw.open(f"s{number}", f"t{number}"))
        assert not set(handles) & set(before)
        for old in before[-2:]:
            raw.steps([old], [1])
            assert raw.refusal()[0] in ("INVALID_HANDLE", "SESSION_CLOSED")
        assert raw.step(handles[0], 1)
        close(raw, handles, detach=number % 2 == 0)
        assert not raw.next("closed").errors
        before += handles
    close(raw, before[:2])
    assert not raw.next("closed").errors, "what this stream has ended is ended"
    close(raw, [12345])
    assert reasons(raw.next("closed")) == {"INVALID_HANDLE"}


@pytest.mark.promise(12)
def test_a_close_by_its_id_is_finished_though_its_caller_went(
    server: ServerProcess, redis_process: Any, connect: Connect
) -> None:
    raw = connect(server, TOKEN)
    handles_of(raw.open("mine"))
    redis_process.pause()
    request, response = session_pb2.CloseSessionRequest(session_id="mine"), session_pb2.CloseSessionResponse
    with pytest.raises(grpc.RpcError):
        raw.unary("CloseSession", request, response, timeout=0.5)
    redis_process.go_on()
    until(server, "engram_sessions")
    with pytest.raises(grpc.RpcError, match="there is no session"):
        raw.get("mine")


@pytest.mark.promise(12)
def test_every_repeat_of_a_step_under_way_is_answered(
    server: ServerProcess, redis_process: Any, connect: Connect
) -> None:
    raw = connect(server, TOKEN)
    (handle,) = handles_of(raw.open("one"))
    redis_process.pause()
    for _ in range(12):
        raw.steps([handle], [1])
    time.sleep(0.3)
    redis_process.go_on()
    answers = {bytes(raw.next("outputs").outputs) for _ in range(12)}
    assert len(answers) == 1
    until(server, "engram_rows_in_flight")


def test_a_refused_row_says_what_became_of_the_step(
    server: ServerProcess, redis_process: Any, connect: Connect
) -> None:
    def applied() -> list[str]:
        frame = raw.next("errors")
        return [frame.errors[n].metadata["applied"] for n in np.frombuffer(frame.error_indexes, np.uint32).tolist()]

    raw = connect(server, TOKEN)
    (handle,) = handles_of(raw.open("one"))
    raw.step(handle, 1)
    raw.steps([handle], [3])
    assert applied() == ["no"], "a gap"
    raw.steps([handle, handle], [1, 2], bytes(7))
    assert applied() == ["yes", "no"], "a frame of which nothing can be used"
    redis_process.pause()
    raw.steps([handle], [2], timeout_ms=300)
    assert applied() == ["unknown"], "it is computed, and waits for Redis"
    raw.steps([handle], [3], timeout_ms=300)
    assert applied() == ["no"], "it waited behind that one, and was dropped"
    redis_process.go_on()
    raw.steps([handle], [2])
    assert raw.next("outputs").outputs, "its fate is known when it is asked for again"
    raw.steps([77], [1])
    assert applied() == ["unknown"], "no session has this handle, and it is not known whose it was"


@pytest.mark.promise(12)
def test_closes_that_wait_their_turn_are_finished_though_their_stream_is_gone(
    server: ServerProcess, redis_process: Any, connect: Connect
) -> None:
    raw = connect(server, TOKEN)
    handles = handles_of(raw.open(*(f"s{n}" for n in range(COUNT))))
    redis_process.pause()
    for handle in handles[:1] * 64 + handles:  # more than one stream may have under way
        close(raw, [handle])
    time.sleep(0.3)
    raw.call.cancel()
    redis_process.go_on()
    until(server, "engram_sessions")
    request, response = session_pb2.ListSessionsRequest(page_size=1000), session_pb2.ListSessionsResponse
    assert not connect(server, TOKEN).unary("ListSessions", request, response).sessions


def test_of_two_that_ask_for_one_step_the_loud_one_gets_its_output(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server, TOKEN)
    inputs = np.full(8, 0.5, np.float32).tobytes()

    def step(seq: int, prefill: bool) -> Any:
        request = session_pb2.StepRequest(
            session_id="twins", model="digits-reader", raw_inputs=inputs, seq=seq, prefill=prefill, raw=True
        )
        return raw.unary("Step", request, session_pb2.StepResponse)

    step(1, True)
    with ThreadPoolExecutor(2) as pool:
        for seq in range(2, 12):
            prefill, loud = pool.submit(step, seq, True), pool.submit(step, seq, False)
            assert prefill.result().seq == seq and np.frombuffer(loud.result().raw_outputs, np.float32).any()


def test_limits_hold_for_opens_side_by_side(server: ServerProcess, connect: Connect) -> None:
    raw = connect(server, TOKEN)
    for number in range(6):
        frame = stream_pb2.OpenFrame(
            request_id=number,
            model="digits-reader",
            session_ids=[f"s{number}-{n}" for n in range(COUNT // 4)],
            client_id=5,
        )
        raw.send(open=frame)
    opened = [raw.next("opened") for _ in range(6)]
    assert sum(len(one.handles) // 4 - len(one.errors) for one in opened) == COUNT
    assert {error.error.reason for one in opened for error in one.errors} == {"TENANT_LIMIT"}
