"""Constants of sessions: set by whoever makes the session, kept through whatever happens to it; several inputs and outputs."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import robots
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import NDArray

from engram.v1 import model_pb2, session_pb2

WAIT_S = 15.0
RATE, GAIN = 8000, (2.0, -0.5)


def constants(rate: int = RATE, gain: tuple[float, float] = GAIN) -> list[model_pb2.Constant]:
    return [
        model_pb2.Constant(name="gain", data=np.array(gain, "<f4").tobytes()),
        model_pb2.Constant(name="rate", data=np.array(rate, "<i8").tobytes()),
    ]


@pytest.fixture(scope="module")
def robot(server_type: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("robots")
    with server_type(directory, "--models", str(models_in(directory))) as server:
        yield server


def models_in(directory: pathlib.Path) -> pathlib.Path:
    robots.write(directory / "models")
    return directory / "models"


def opened(raw: Any, *ids: str, **fields: Any) -> tuple[list[int], list[int], list[int]]:
    """Handles, seqs, and which were created."""
    frame = raw.open(*ids, model="robot", **fields)
    assert not frame.errors, frame.errors
    handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
    return handles.tolist(), seqs.tolist(), list(frame.created)


def stepped(raw: Any, handle: int, inputs: NDArray[Any], first: int = 1) -> NDArray[Any]:
    """A session's steps from seq `first` on, one frame each, acknowledged as they come."""
    outputs = [raw.step(handle, first + n, inputs[n : n + 1]) for n in range(len(inputs))]
    return np.frombuffer(b"".join(outputs), robots.OUTPUT)


def state_of(raw: Any, session_id: str, **fields: Any) -> NDArray[Any]:
    request = session_pb2.GetSessionStateRequest(session_id=session_id, **fields)
    answer = raw.unary("GetSessionState", request, session_pb2.GetSessionStateResponse)
    assert [tensor.spec.name for tensor in answer.tensors] == list(robots.STATE.names or ())
    return np.frombuffer(b"".join(tensor.data for tensor in answer.tensors), robots.STATE)[0]


def test_rows_of_several_inputs_and_outputs_are_packed_in_their_order(robot: Any, connect: Callable) -> None:
    raw, inputs = connect(robot), robots.some(12)
    (handle,), _, created = opened(raw, "packed")
    outputs, state = robots.run(inputs)
    assert created == [1]
    assert stepped(raw, handle, inputs[:4]).tobytes() == outputs[:4].tobytes()
    raw.steps([handle] * 4, list(range(5, 9)), inputs[4:8].tobytes())
    assert raw.next("outputs").outputs == outputs[4:8].tobytes()
    assert stepped(raw, handle, inputs[8:], 9).tobytes() == outputs[8:].tobytes()
    assert state_of(raw, "packed", min_seq=12).tobytes() == state.tobytes()


def test_the_model_says_what_it_takes_gives_and_keeps(robot: Any, connect: Callable) -> None:
    request = session_pb2.ListModelsRequest()
    (model,) = connect(robot).unary("ListModels", request, session_pb2.ListModelsResponse).models
    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in model.inputs] == [
        ("gap", "float16", []),
        ("obs", "float32", [3]),
    ]
    assert [spec.name for spec in model.outputs] == ["seen", "action", "steps"]
    assert [spec.role for spec in model.state] == ["constant", "recurrent", "constant", "counter"]
    assert not model.generates


def test_rows_that_do_not_fit_are_told_what_a_row_is(robot: Any, connect: Callable) -> None:
    raw = connect(robot)
    (handle,), *_ = opened(raw, "unfit")
    raw.steps([handle], [1], bytes(12))
    (error,) = raw.next("errors").errors
    assert error.reason == "INVALID_INPUT_WIDTH" and "gap float16[], obs float32[3]" in error.message
    inputs = robots.some(3)
    inputs["gap"][1] = np.inf
    raw.steps([handle] * 3, [1, 2, 3], inputs.tobytes())
    errors = raw.next("errors")
    assert errors.errors[0].reason == "NON_FINITE_INPUT" and "gap" in errors.errors[0].message
    raw.steps([handle], [2], inputs[1:2].tobytes())  # alone, by the quick way
    assert raw.refusal() == ("NON_FINITE_INPUT", [2])
    raw.steps([handle], [2], bytes(14), flags=b"\x02")
    (error,) = raw.next("errors").errors
    assert error.reason == "CANNOT_GENERATE"
    assert (
        "gives seen bool[], action float32[2], steps int64[] and takes gap float16[], obs float32[3]" in error.message
    )


def test_a_call_takes_and_gives_numbers_or_bytes(robot: Any, connect: Callable) -> None:
    raw, inputs = connect(robot), robots.some(6)
    outputs, _ = robots.run(inputs, RATE, GAIN)
    floats = np.column_stack([inputs["gap"].astype(np.float32), inputs["obs"]]).ravel().tolist()
    answer = step(raw, "called", inputs=floats[:12], constants=constants())
    assert (answer.seq, list(answer.shape)) == (3, [3, 4])
    told = np.array(answer.outputs).reshape(3, 4)
    assert told[:, 0].tolist() == outputs["seen"][:3].tolist()
    assert told[:, 1:3].tolist() == outputs["action"][:3].tolist() and told[:, 3].tolist() == [1, 2, 3]
    answer = step(raw, "called", raw_inputs=inputs[3:].tobytes(), raw=True, constants=constants(1, (0, 0)))
    assert answer.raw_outputs == outputs[3:].tobytes(), "a session that is there keeps its constants"
    for wrong in ({"inputs": floats[:3]}, {"raw_inputs": bytes(13)}):
        reason, message = refused(raw, "called", **wrong)
        assert reason == "INVALID_INPUT_WIDTH" and "gap float16[], obs float32[3]" in message


def step(peer: Any, session_id: str, **fields: Any) -> session_pb2.StepResponse:
    request = session_pb2.StepRequest(session_id=session_id, model="robot", **fields)
    return peer.unary("Step", request, session_pb2.StepResponse)


def refused(peer: Any, session_id: str, **fields: Any) -> tuple[str, str]:
    """Reason and message."""
    with pytest.raises(grpc.RpcError) as error:
        step(peer, session_id, **fields)
    status = dict(error.value.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(status).details[0].Unpack(info)
    return info.reason, error.value.details()


def test_sessions_of_different_constants_share_a_batch(robot: Any, connect: Callable) -> None:
    raw, wanted = connect(robot), {"plain": ((), {}), "own": (constants(), {"rate": RATE, "gain": GAIN})}
    wanted["slow"] = (constants(1, (0.25, 0.25)), {"rate": 1, "gain": (0.25, 0.25)})
    inputs = {name: robots.some(5, seed) for seed, name in enumerate(wanted)}
    handles = [opened(raw, f"mixed-{name}", constants=given)[0][0] for name, (given, _) in wanted.items()]
    for seq in range(1, 6):
        raw.steps(handles, [seq] * 3, b"".join(inputs[name][seq - 1].tobytes() for name in wanted))
        rows = np.frombuffer(b"".join(answers(raw, handles, seq)), robots.OUTPUT)
        for row, (name, (_, own)) in zip(rows, wanted.items(), strict=True):
            assert row.tobytes() == robots.run(inputs[name], **own)[0][seq - 1].tobytes(), (name, seq)


def answers(raw: Any, handles: list[int], seq: int) -> list[bytes]:
    """The outputs of one step of each session, in the order of the handles."""
    found: dict[int, bytes] = {}
    while len(found) < len(handles):
        frame = raw.next("outputs")
        width = len(frame.outputs) // (len(frame.handles) // 4)
        for n, handle in enumerate(np.frombuffer(frame.handles, np.uint32).tolist()):
            found[handle] = frame.outputs[n * width : (n + 1) * width]
        assert set(np.frombuffer(frame.seqs, np.uint64).tolist()) == {seq}
    return [found[handle] for handle in handles]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("speed", bytes(8))], "no constant 'speed'; there are: rate int64[], gain float32[2]"),
        ([("place", bytes(8))], "no constant 'place'"),
        ([("", b"")], "no constant ''"),
        ([("x" * 100_000, b"")], "no constant 'xxx"),
        ([("rate", bytes(4))], "rate is int64[], 8 bytes, and 4 were given"),
        ([("gain", bytes(1_000_000))], "gain is float32[2], 8 bytes, and 1000000 were given"),
        ([("rate", bytes(8)), ("gain", bytes(8)), ("rate", bytes(8))], "rate is given twice"),
        ([("gain", np.array([1, np.nan], "<f4").tobytes())], "gain has NaN or infinity"),
    ],
)
def test_constants_that_do_not_fit_are_refused_and_nothing_is_made(
    robot: Any, connect: Callable, given: list[tuple[str, bytes]], said: str
) -> None:
    raw = connect(robot)
    bad = [model_pb2.Constant(name=name, data=data) for name, data in given]
    frame = raw.open("refused", "refused too", model="robot", constants=bad)
    assert {one.error.reason for one in frame.errors} == {"INVALID_CONSTANT"}
    told = frame.errors[0].error.message
    assert "robot/1" in told and said in told and len(told) < 300
    reason, message = refused(raw, "refused", raw_inputs=robots.some(1).tobytes(), constants=bad)
    assert reason == "INVALID_CONSTANT" and said in message
    with pytest.raises(grpc.RpcError):
        raw.get("refused")


def test_a_model_without_constants_says_so(server: Any, connect: Callable) -> None:
    frame = connect(server).open("none", constants=constants())
    assert "this model has none" in frame.errors[0].error.message


def test_new_sessions_have_their_constants_at_once_and_those_that_exist_keep_theirs(
    robot: Any, connect: Callable
) -> None:
    raw = connect(robot)
    opened(raw, "old", constants=constants())
    assert state_of(raw, "old").tobytes() == robots.run(robots.some(0), RATE, GAIN)[1].tobytes()
    handles, _, created = opened(raw, "old", "new", constants=constants(1, (0, 0)))
    assert created == [0, 1]
    assert state_of(raw, "old")["rate"] == RATE and state_of(raw, "new")["rate"] == 1
    inputs = robots.some(2)
    assert stepped(raw, handles[0], inputs).tobytes() == robots.run(inputs, RATE, GAIN)[0].tobytes()
    assert stepped(raw, handles[1], inputs).tobytes() == robots.run(inputs, 1, (0, 0))[0].tobytes()
    (handle,), *_ = opened(raw, "default", constants=constants(16000, (1, 1)))
    assert stepped(raw, handle, inputs).tobytes() == robots.run(inputs)[0].tobytes()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("durability", [1, 2])
def test_a_takeover_by_another_server_keeps_them(
    server_type: Any, connect: Callable, tmp_path: pathlib.Path, redis_process: Any, steps: int, durability: int
) -> None:
    flags, inputs = ("--models", str(models_in(tmp_path)), "--redis-url", redis_process.url), robots.some(6)
    outputs, state = robots.run(inputs, RATE, GAIN)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with server_type(tmp_path / "one", *flags) as first, server_type(tmp_path / "two", *flags) as second:
        (handle,), *_ = opened(connect(first), "s", constants=constants(), durability=durability)
        raw = connect(first)
        (handle,), seqs, _ = opened(raw, "s", durability=durability)
        assert seqs == [0]
        assert stepped(raw, handle, inputs[:steps]).tobytes() == outputs[:steps].tobytes()
        state_of(raw, "s", min_seq=steps)
        other = connect(second)
        (handle,), seqs, created = opened(other, "s", durability=durability)
        assert (seqs, created) == ([steps], [0])
        assert stepped(other, handle, inputs[steps:], steps + 1).tobytes() == outputs[steps:].tobytes()
        assert state_of(other, "s", min_seq=6).tobytes() == state.tobytes()


def test_forks_and_imports_have_them_before_the_first_step_and_after(robot: Any, connect: Callable) -> None:
    raw, inputs = connect(robot), robots.some(6)
    outputs, _ = robots.run(inputs, RATE, GAIN)
    (handle,), *_ = opened(raw, "origin", constants=constants())
    for steps in (0, 3):
        fork = session_pb2.ForkSessionRequest(session_id="origin", new_session_id=f"fork-{steps}", min_seq=steps)
        raw.unary("ForkSession", fork, session_pb2.ForkSessionResponse)
        export = session_pb2.ExportSessionRequest(session_id="origin", min_seq=steps)
        data = raw.unary("ExportSession", export, session_pb2.ExportSessionResponse).data
        imported = session_pb2.ImportSessionRequest(session_id=f"import-{steps}", data=data)
        raw.unary("ImportSession", imported, session_pb2.ImportSessionResponse)
        stepped(raw, handle, inputs[steps : steps + 3], steps + 1)
    for name in ("fork", "import"):
        for steps in (0, 3):
            (other,), seqs, _ = opened(raw, f"{name}-{steps}")
            assert seqs == [steps]
            assert stepped(raw, other, inputs[steps:], steps + 1).tobytes() == outputs[steps:].tobytes()


def test_sessions_that_leave_the_arena_come_back_with_them(
    server_with: Callable, connect: Callable, tmp_path: pathlib.Path
) -> None:
    flags = ("--models", str(models_in(tmp_path)), "--arena-slots-max", "4", "--batch-rows-max", "4")
    inputs = robots.some(3)
    with server_with(*flags) as server:
        raw, other = connect(server), connect(server)
        own, *_ = opened(raw, *(f"own-{n}" for n in range(8)), constants=constants())
        plain, *_ = opened(other, *(f"plain-{n}" for n in range(8)), client_id=6)
        for seq in range(1, 4):
            for handles, client in ((own, raw), (plain, other)):
                client.steps(handles, [seq] * 8, inputs[seq - 1].tobytes() * 8)
                expected = robots.run(inputs, *((RATE, GAIN) if client is raw else ()))[0][seq - 1]
                assert answers(client, handles, seq) == [expected.tobytes()] * 8


@pytest.mark.single_redis("it loses what it has")
@pytest.mark.parametrize("durability", [1, 2])
@pytest.mark.parametrize("slots", [64, 4])
def test_a_redis_that_loses_everything_before_the_first_step_is_told_them_again(
    server_with: Callable, connect: Callable, tmp_path: pathlib.Path, redis_process: Any, slots: int, durability: int
) -> None:
    """What no slot holds is written back with its first step."""
    flags = ("--models", str(models_in(tmp_path)), "--redis-url", redis_process.url, "--arena-slots-max", str(slots),
             "--batch-rows-max", "4")  # fmt: skip
    inputs = robots.some(2)
    outputs, state = robots.run(inputs, RATE, GAIN)
    with server_with(*flags) as server:
        raw = connect(server)
        handles, *_ = opened(raw, *(f"s{n}" for n in range(12)), constants=constants(), durability=durability)
        redis_process.lose_data()
        redis_process.start()
        for seq in (1, 2):
            raw.steps(handles, [seq] * 12, inputs[seq - 1].tobytes() * 12)
            assert answers(raw, handles, seq) == [outputs[seq - 1].tobytes()] * 12
        for n in range(12):
            assert state_of(raw, f"s{n}", min_seq=2).tobytes() == state.tobytes()
