"""Unary steps: over the native wire most are rows without a Python object, over the other one all are calls. Both do the same."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status

from engram.v1 import session_pb2, stream_pb2
from engram_service.auth.tokens import digest_of

ServerProcess = Any
Raw = Any
Connect = Callable[..., Raw]

MODEL = "digits-reader"
WAIT_S = 20.0
INPUTS = np.random.default_rng(8).random((400, 8), dtype=np.float32)


def request(name: str, seq: int, **fields: Any) -> session_pb2.StepRequest:
    row = INPUTS[max(0, seq - 1) % len(INPUTS)]
    return session_pb2.StepRequest(**{"session_id": name, "model": MODEL, "inputs": row.tolist(), "seq": seq, **fields})


def step(caller: Raw, name: str, seq: int = 0, timeout: float = WAIT_S, **fields: Any) -> session_pb2.StepResponse:
    return caller.unary("Step", request(name, seq, **fields), session_pb2.StepResponse, timeout)


def later(caller: Raw, name: str, seq: int = 0, timeout: float = WAIT_S, **fields: Any) -> Any:
    call = caller.channel.unary_unary(
        "/engram.v1.EngramService/Step",
        request_serializer=session_pb2.StepRequest.SerializeToString,
        response_deserializer=session_pb2.StepResponse.FromString,
    )
    return call.future(request(name, seq, **fields), timeout=timeout, metadata=caller._metadata)


def refused(work: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a refusal."""
    with pytest.raises(grpc.RpcError) as caught:
        work()
    error: Any = caught.value
    status = rpc_status.from_call(error)
    details = [] if status is None else list(status.details)
    reason = next((d.value for d in details if d.type_url.endswith("ErrorInfo")), b"")
    from google.rpc import error_details_pb2  # type: ignore[import-untyped]

    return error.code(), error_details_pb2.ErrorInfo.FromString(reason).reason


@pytest.fixture
def name() -> str:
    return f"unary-{time.time_ns()}"


@pytest.fixture
def expected(shared_server: ServerProcess, connect: Connect) -> list[list[float]]:
    """The outputs of a session that takes INPUTS in turn, by a stream."""
    raw = connect(shared_server)
    opened = raw.open(f"expected-{time.time_ns()}")
    (handle,) = np.frombuffer(opened.handles, np.uint32).tolist()
    outputs = []
    for seq in range(1, 41):
        acknowledged = np.array([seq - 1], np.uint64).tobytes()
        output = raw.step(handle, seq, INPUTS[seq - 1], acknowledged_seqs=acknowledged)
        outputs.append(np.frombuffer(output, np.float32).tolist())
    return outputs


def rows_of(server: ServerProcess) -> float:
    """Unary steps that were rows."""
    return float(server.series().get('engram_wire_unary_steps_total{as="row"}', 0.0))


def is_native(server: ServerProcess) -> bool:
    return any('wire="native"' in name for name in server.series() if name.startswith("engram_build_info"))


# What it is


def test_steps_are_those_of_a_stream(
    shared_server: ServerProcess, connect: Connect, name: str, expected: list[list[float]]
) -> None:
    raw = connect(shared_server)
    before = rows_of(shared_server)
    for seq in range(1, 21):
        fields: dict[str, Any] = {"inputs": INPUTS[seq - 1].tolist(), "raw": seq % 5 == 0}
        if seq % 3 == 0:
            fields |= {"inputs": [], "raw_inputs": INPUTS[seq - 1].tobytes()}
        if seq % 2 == 0:
            fields["model"] = ""
        answer = step(raw, name, seq if seq % 4 else 0, **fields)
        outputs = np.frombuffer(answer.raw_outputs, np.float32).tolist() if seq % 5 == 0 else list(answer.outputs)
        assert (answer.seq, outputs, list(answer.shape)) == (seq, expected[seq - 1], [1, len(outputs)])
    if is_native(shared_server):
        assert rows_of(shared_server) - before >= 18, "steps of a session that is known are rows"


def test_a_step_without_outputs_and_its_repetition_with_them(
    shared_server: ServerProcess, connect: Connect, name: str, expected: list[list[float]]
) -> None:
    raw = connect(shared_server)
    step(raw, name, 1)
    quiet = step(raw, name, 2, prefill=True)
    assert (quiet.seq, list(quiet.outputs), quiet.raw_outputs, list(quiet.shape)) == (2, [], b"", [])
    assert list(step(raw, name, 2).outputs) == expected[1]
    quiet = step(raw, name, 2, prefill=True)
    assert (quiet.seq, list(quiet.outputs)) == (2, [])
    assert list(step(raw, name, 3).outputs) == expected[2]


def test_eight_connections_step_one_session(shared_server: ServerProcess, connect: Connect, name: str) -> None:
    """Each step once, none left out, and nobody starves; also while the session is made."""
    each, callers = 40, [connect(shared_server) for _ in range(8)]
    before = rows_of(shared_server)
    together = threading.Barrier(len(callers))

    def work(raw: Raw) -> list[int]:
        together.wait()
        return [step(raw, name).seq for _ in range(each)]

    with ThreadPoolExecutor(len(callers)) as pool:
        seqs = list(pool.map(work, callers))
    assert all(own == sorted(own) for own in seqs)
    assert sorted(seq for own in seqs for seq in own) == list(range(1, each * len(callers) + 1))
    if is_native(shared_server):
        assert rows_of(shared_server) - before > each * len(callers) // 2
    # While the slowest took its last quarter, the fastest had not been done for long.
    ends = sorted(own[-1] for own in seqs)
    assert ends[0] > each * len(callers) // 4, ends
    assert callers[0].get(name).seq == each * len(callers)


def test_a_step_that_many_ask_for_is_done_once(
    server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect, expected: list[list[float]]
) -> None:
    with server_with("--redis-url", redis_process.url) as server:
        callers = [connect(server) for _ in range(6)]
        step(callers[0], "one", 1)
        for seq in range(2, 8):
            with frozen(redis_process):  # so that it is under way when the others ask
                calls = [later(caller, "one", seq, raw=n % 2 == 1) for n, caller in enumerate(callers)]
                time.sleep(0.3)
                assert not any(call.done() for call in calls)
            for answer in (call.result() for call in calls):
                outputs = list(answer.outputs) or np.frombuffer(answer.raw_outputs, np.float32).tolist()
                assert (answer.seq, outputs) == (seq, expected[seq - 1])
        assert callers[0].get("one").seq == 7


# What goes wrong


def test_what_is_wrong_with_a_step_is_said(shared_server: ServerProcess, connect: Connect, name: str) -> None:
    raw = connect(shared_server)
    step(raw, name, 1)
    for fields, code, reason in [
        ({"seq": 5}, grpc.StatusCode.FAILED_PRECONDITION, "SEQ_GAP"),
        ({"inputs": [float("nan")] * 8}, grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE_INPUT"),
        ({"inputs": [1.0] * 7}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT_WIDTH"),
        ({"model": "no-such"}, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ({"version": "77"}, grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND"),
        ({"session_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SESSION_ID"),
    ]:
        given = {"seq": 0, **fields}
        assert refused(lambda given=given: step(raw, name, given.pop("seq"), **given)) == (code, reason)
    assert step(raw, name).seq == 2, "nothing of that was applied"
    step(raw, name, 3), step(raw, name, 4)
    assert refused(lambda: step(raw, name, 2)) == (grpc.StatusCode.FAILED_PRECONDITION, "SEQ_ACKNOWLEDGED")


def test_a_bad_step_leaves_no_gap_to_those_that_came_with_it(
    shared_server: ServerProcess, connect: Connect, name: str
) -> None:
    raw = connect(shared_server)
    step(raw, name)
    done = 1
    for _ in range(20):
        calls = [later(raw, name), later(raw, name, inputs=[float("inf")] * 8), later(raw, name), later(raw, name)]
        seqs = [call.result().seq for n, call in enumerate(calls) if n != 1]
        assert refused(calls[1].result)[1] == "NON_FINITE_INPUT"
        assert sorted(seqs) == [done + 1, done + 2, done + 3]
        done += 3


def test_calls_that_are_cancelled_or_late_leave_the_session_to_the_others(
    server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect
) -> None:
    """While Redis holds the commits back."""
    with server_with("--redis-url", redis_process.url) as server:
        raw = connect(server)
        step(raw, "kept", 1)
        with frozen(redis_process):
            cancelled, late, patient = later(raw, "kept", 2), later(raw, "kept", 2, timeout=0.3), later(raw, "kept", 2)
            assert refused(late.result)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            cancelled.cancel()
            time.sleep(0.2)
            assert not patient.done()
        assert patient.result().seq == 2
        assert step(raw, "kept", 3).seq == 3
        assert raw.get("kept").seq == 3
        deadline = time.monotonic() + WAIT_S
        while server.series()["engram_rows_in_flight"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.series()["engram_rows_in_flight"] == 0


@contextlib.contextmanager
def frozen(redis: Any) -> Iterator[None]:
    redis.pause()
    try:
        yield
    finally:
        redis.go_on()


# Whose session it is


def test_a_session_that_was_closed_is_another_one(
    shared_server: ServerProcess, connect: Connect, name: str, expected: list[list[float]]
) -> None:
    raw, other = connect(shared_server), connect(shared_server)
    for _ in range(5):
        assert [list(step(raw, name, seq).outputs) for seq in (1, 2, 3)] == expected[:3]
        other.unary("CloseSession", session_pb2.CloseSessionRequest(session_id=name), session_pb2.CloseSessionResponse)
        assert refused(lambda: step(raw, name, model=""))[1] == "SESSION_NOT_FOUND"


def test_a_stream_that_opens_the_session_has_it_until_the_next_unary_step(
    shared_server: ServerProcess, connect: Connect, name: str, expected: list[list[float]]
) -> None:
    raw, other = connect(shared_server), connect(shared_server)
    for seq in range(1, 10, 2):
        assert list(step(raw, name, seq).outputs) == expected[seq - 1]
        opened = other.open(name, client_id=9)
        assert np.frombuffer(opened.seqs, np.uint64).tolist() == [seq]
        (handle,) = np.frombuffer(opened.handles, np.uint32).tolist()
        output = other.step(handle, seq + 1, INPUTS[seq])
        assert np.frombuffer(output, np.float32).tolist() == expected[seq]
    step(raw, name)
    assert other.next("event").type == stream_pb2.EventFrame.TYPE_TAKEN_OVER


@pytest.mark.parametrize("numbered", [True, False])
def test_two_servers_step_one_session_in_turns(
    tmp_path: Path, redis_process: Any, server_type: type[ServerProcess], digits_alone: Sequence[str],
    connect: Connect, expected: list[list[float]], numbered: bool,
) -> None:  # fmt: skip
    """Each takes it over from the other, without a word to it."""
    servers = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        servers.append(server_type(tmp_path / folder, "--redis-url", redis_process.url, *digits_alone))
    with servers[0], servers[1]:
        raws = [connect(server) for server in servers]
        for seq in range(1, 31):
            who = raws[seq // 2 % 2]
            answer = step(who, "ours", seq if numbered else 0, inputs=INPUTS[seq - 1].tolist())
            assert (answer.seq, list(answer.outputs)) == (seq, expected[seq - 1])
            if numbered:
                again = step(raws[(seq // 2 + 1) % 2], "ours", seq)
                assert (again.seq, list(again.outputs)) == (seq, expected[seq - 1]), "a repeat, by the other server"
        assert raws[0].get("ours").seq == 30


def tokens(path: Path, **tokens: dict[str, Any]) -> None:
    lines = []
    for token, fields in tokens.items():
        rights = fields.get("rights", ["step", "read", "manage"])
        lines += [
            f"[tokens.{token}]",
            f'tenant = "{fields["tenant"]}"',
            f"rights = {rights}",
            f'sha256 = "{digest_of(token)}"',
        ]
        lines += [f"expires = {fields['expires']}"] if "expires" in fields else []
    written = path.with_suffix(".new")
    written.write_text("\n".join(lines) + "\n")
    written.replace(path)  # nobody reads a part of it


def test_tenants_have_their_own_sessions_of_one_name(
    tmp_path: Path, server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    file = tmp_path / "tokens.toml"
    people = {
        "ann": {"tenant": "a"}, "abe": {"tenant": "a"}, "bea": {"tenant": "b"}, "eve": {"tenant": "a", "rights": ["read"]},
        "out": {"tenant": "a"},
    }  # fmt: skip
    tokens(file, **people)
    with server_with("--tokens-file", str(file), "--tokens-poll-s", "0.1") as server:
        ann, abe, bea, eve, out = (connect(server, token) for token in people)
        for seq in range(1, 6):
            assert step(ann, "same").seq == 2 * seq - 1
            assert step(abe, "same").seq == 2 * seq, "of the same tenant"
            assert step(bea, "same").seq == seq
        assert refused(lambda: step(eve, "same")) == (grpc.StatusCode.PERMISSION_DENIED, "RIGHT_MISSING")
        assert step(out, "same").seq == 11
        people.pop("out")
        people["abe"] = {"tenant": "b"}  # now somebody else's
        people["bea"] = {"tenant": "b", "rights": ["read"]}
        tokens(file, **people)
        deadline, code = time.monotonic() + WAIT_S, None
        while code is None and time.monotonic() < deadline:
            code = later(out, "same").code()
            code = None if code is grpc.StatusCode.OK else code
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert refused(lambda: step(bea, "same"))[1] == "RIGHT_MISSING"
        assert step(abe, "same").seq == 6


def test_a_tenants_limit_of_rows_holds_for_unary_steps(
    tmp_path: Path, server_with: Callable[..., ServerProcess], redis_process: Any, connect: Connect
) -> None:
    file = tmp_path / "tokens.toml"
    tokens(file, ann={"tenant": "a"}, bea={"tenant": "b"})
    file.write_text(file.read_text() + "[tenants.a]\nrows_max = 4\n")
    with server_with("--tokens-file", str(file), "--redis-url", redis_process.url) as server:
        ann, bea = connect(server, "ann"), connect(server, "bea")
        for n in range(8):
            step(ann, f"s{n}"), step(bea, f"s{n}")
        for _ in range(3):  # what was counted is given back
            with frozen(redis_process):
                calls = [later(ann, f"s{n}") for n in range(8)]
                others = [later(bea, f"s{n}") for n in range(8)]
                deadline = time.monotonic() + WAIT_S
                while sum(call.done() for call in calls) < 4 and time.monotonic() < deadline:
                    time.sleep(0.01)
                full = [call for call in calls if call.done()]
                assert len(full) == 4 and not any(call.done() for call in others)
                assert {refused(call.result) for call in full} == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_LIMIT")}
            for call in [*others, *(call for call in calls if call not in full)]:
                call.result()
