"""Models of several inputs and outputs, of every dtype, and with constants: by name here, one row of bytes on the wire."""

from __future__ import annotations

import asyncio
import json
import pathlib
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from typing import Any

import fake_peer
import numpy as np
import pytest
from bundles import DTYPES, FRAME, RATE, write_arm, write_loud, write_mirror

import engram
from engram._commands.rows import JSON, Rows, line_of
from engram._commands.text import TextError
from engram._commands.values import constant_of
from engram._tensors import DictCodec, codec_of
from engram._types import TensorSpec
from engram.v1 import model_pb2, stream_pb2

OBS, GAP, SEEN = TensorSpec("obs", "float32", (3,)), TensorSpec("gap", "float64", ()), TensorSpec("seen", "bool", (2,))
ROW = {"obs": [1, 2, 3], "gap": 0.5, "seen": [True, False]}
QUICK = {"backoff_initial_s": 0.02, "backoff_max_s": 0.2}


def codec(*specs: TensorSpec) -> DictCodec:
    made = codec_of(specs or (OBS, GAP, SEEN), "input", "arm")
    assert isinstance(made, DictCodec)
    return made


# Rows as bytes


def test_a_row_is_its_tensors_in_the_declared_order() -> None:
    packed = np.float32([1, 2, 3]).tobytes() + np.float64(0.5).tobytes() + b"\1\0"
    rows = codec()
    assert rows.nbytes == len(packed) == 22
    assert rows.one(ROW) == packed == rows.one(dict(reversed(ROW.items())))
    assert rows.many({name: [value] * 4 for name, value in ROW.items()}).tobytes() == 4 * packed
    assert rows.many([ROW] * 4, 4).tobytes() == 4 * packed
    back = rows.given(rows.decode(packed, 1)[0])
    assert list(back) == ["obs", "gap", "seen"] and back["gap"] == 0.5 and back["obs"].tolist() == [1, 2, 3]
    back = rows.given(rows.decode(2 * packed, 2))
    assert back["gap"].tolist() == [0.5, 0.5] and back["seen"].dtype == np.bool_ and back["obs"].flags.writeable
    assert {name: values.shape for name, values in rows.given(rows.empty(0)).items()} == {
        "obs": (0, 3), "gap": (0,), "seen": (0, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match="reshape"):
        rows.decode(packed[:-1], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_goes_both_ways(dtype: str) -> None:
    rows = codec(OBS, TensorSpec("x", dtype, (2, 2)))
    given: Any = [[True, False], [True, True]] if dtype == "bool" else [[1, 2], [3, 100]]
    for x in (given, np.array(given, "float32" if dtype == "bfloat16" else dtype)):
        back = rows.given(rows.decode(rows.one({"obs": [0, 0, 0], "x": x}), 1)[0])["x"]
        assert back.tolist() == given and back.dtype == ("float32" if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"obs": [1, 2, 3]}, "the input of arm lacks 'gap', 'seen'; it is a dict of 'obs', 'gap', 'seen'"),
        ({**ROW, "mask": 1}, "the input of arm has 'mask', which the model does not take; it is a dict of 'obs'"),
        ({**ROW, "obs": [1, 2]}, r"input 'obs' must be float32\[3\]; got int64\[2\]"),
        ({**ROW, "gap": [0.5]}, r"input 'gap' must be one float64; got float64\[1\]"),
        ({**ROW, "seen": [2, 0]}, r"input 'seen': 2 at \[0\] does not fit bool"),
        ({**ROW, "obs": np.array([1, 2, 3])}, "input 'obs' .*int64, which does not convert safely"),
        (np.zeros(3), r"must be a dict of arrays by name, 'obs', 'gap', 'seen'; got an array \[3\]"),
        ([1, 2, 3], "must be a dict of arrays by name, .*; got list"),
    ],
)
def test_what_is_wrong_is_said_of_the_tensor(given: Any, said: str) -> None:
    with pytest.raises(engram.InvalidInputError, match=said):
        codec().one(given)


def test_rows_of_tensors_are_equally_many() -> None:
    good = {name: [value] * 3 for name, value in ROW.items()}
    with pytest.raises(engram.InvalidInputError, match=r"input 'gap' must be float64\[3\]; got float64\[2\]"):
        codec().many({**good, "gap": [0.5, 0.5]})
    with pytest.raises(engram.InvalidInputError, match=r"input 'obs' must be float32\[2, 3\]; got int64\[3, 3\]"):
        codec().many(good, 2)
    with pytest.raises(engram.InvalidInputError, match="must be 2 dicts; got 3"):
        codec().many([ROW] * 3, 2)


def test_a_single_input_is_no_dict() -> None:
    single = codec_of([OBS], "input", "cell")
    for call in (single.one, single.many):
        with pytest.raises(
            engram.InvalidInputError, match="the input of cell is not of numbers: dict; give the array alone"
        ):
            call({"obs": [1, 2, 3]})
    with pytest.raises(engram.EngramError, match="cell has no input"):
        codec_of([], "input", "cell")


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [("int8", -128, 128), ("uint8", 255, -1), ("int16", 32767, 2**15), ("int32", -(2**31), 2**31), ("bool", 1, 2)],
)
def test_whole_numbers_of_python_go_where_they_fit(dtype: str, good: int, bad: int) -> None:
    single = codec_of([TensorSpec("n", dtype, ())], "input", "cell")
    assert single.decode(single.one(good), 1)[0] == good
    with pytest.raises(engram.InvalidInputError, match=f"{bad} does not fit {dtype}"):
        single.one(bad)
    with pytest.raises(engram.InvalidInputError, match="does not convert safely"):
        single.one(np.int64(good))


# Constants, before a server


class Arm(fake_peer.Echo):
    """A model of two inputs, and outputs that are the same bytes; with constants."""

    latest = "1"

    def model(self) -> model_pb2.Model:
        def spec(name: str, dtype: str, *shape: int, role: str = "") -> model_pb2.TensorSpec:
            return model_pb2.TensorSpec(name=name, dtype=dtype, shape=shape, role=role)

        return model_pb2.Model(
            name="arm", version=self.latest, fingerprint="f",
            inputs=[spec("obs", "float32", 3), spec("gap", "bool")],
            outputs=[spec("act", "float32", 3), spec("held", "bool")],
            state=[
                spec("h", "float32", 2, role="recurrent"), spec("sr", "int64", role="constant"),
                spec("gains", "float32", 2, role="constant"), spec("mode", "int8", 1, role="constant"),
            ],
        )  # fmt: skip

    def _steps(self, frame: stream_pb2.StepsFrame, names: list[str]) -> list[stream_pb2.StreamResponse]:
        answer = stream_pb2.OutputsFrame(handles=frame.handles, seqs=frame.seqs, outputs=frame.inputs)
        return [stream_pb2.StreamResponse(outputs=answer)]


def with_arm(work: Any) -> None:
    async def main() -> None:
        peer = Arm()
        await peer.start()
        try:
            async with engram.AsyncClient(f"127.0.0.1:{peer.port}", engram.ClientOptions(**QUICK)) as client:
                await work(peer, client)
        finally:
            await peer.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_constants_are_sent_as_the_model_has_them() -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        assert [spec.name for spec in (await client.models.get("arm")).constants] == ["sr", "gains", "mode"]
        await client.open("arm", "plain")
        given = {"mode": 3, "sr": np.int64(8000)}
        await client.open("arm", "one", constants=given)
        await client.open("arm", "two", constants={"gains": [1, 0.5]})
        assert [[(one.name, one.data) for one in frame.constants] for frame in peer.opens] == [
            [],
            [("sr", (8000).to_bytes(8, "little")), ("mode", b"\3")],
            [("gains", np.float32([1, 0.5]).tobytes())],
        ]

    with_arm(work)


def test_what_a_model_has_is_asked_where_it_is_not_known() -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        await client.open("arm")
        assert peer.described == 0  # who gives no constants asks for nothing
        await client.open("arm", constants={"sr": 8000}, version="1")
        assert peer.described == 0  # this version is known
        await client.open("arm", constants={"sr": 8000})
        assert peer.described == 1  # the latest may be another by now

    with_arm(work)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rate": 8000}, "model arm has no constant 'rate'; its constants are 'sr' .one int64., 'gains' .float32.2"),
        ({"sr": 8000.5}, "constant 'sr' of arm must be one int64; got float64"),
        ({"sr": [8000, 8000]}, r"constant 'sr' of arm must be one int64; got int64\[2\]"),
        ({"gains": [1]}, r"constant 'gains' of arm must be float32\[2\]; got int64\[1\]"),
        ({"mode": 200}, "constant 'mode' of arm: 200 at .0. does not fit int8"),
        ({"sr": "8000"}, "constant 'sr' of arm"),
        ([("sr", 8000)], "constants is a dict of values by name"),
    ],
)
def test_bad_constants_are_refused_before_anything_is_sent(given: Any, said: str) -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        with pytest.raises(engram.InvalidInputError, match=said) as caught:
            await client.open("arm", constants=given)
        assert peer.opens == [] and caught.value.reason == "INVALID_CONSTANT"

    with_arm(work)


def test_an_open_that_is_repeated_has_its_constants_again() -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        peer.faults.cut_opens = 2
        await client.open("arm", "one", constants={"sr": 8000})
        assert len(peer.opens) == 3
        assert {frame.constants[0].data for frame in peer.opens} == {(8000).to_bytes(8, "little")}

    with_arm(work)


def test_sessions_of_one_frame_have_the_same_constants() -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        rates = [8000, 16000, 8000, None]
        constants = [{} if rate is None else {"sr": rate} for rate in rates]
        sessions = await client.open_many("arm", ["a", "b", "c", "d"], constants=constants)
        assert [session.id for session in sessions] == ["a", "b", "c", "d"]
        groups = {
            tuple(frame.session_ids): [int.from_bytes(one.data, "little") for one in frame.constants]
            for frame in peer.opens
        }
        assert groups == {("a", "c"): [8000], ("b",): [16000], ("d",): []}
        peer.opens.clear()
        await client.open_many("arm", 3, constants={"sr": 8000})
        assert len(peer.opens) == 1 and len(peer.opens[0].constants) == 1
        with pytest.raises(engram.InvalidInputError, match="constants of 1 sessions for 2"):
            await client.open_many("arm", 2, constants=[{}])

    with_arm(work)


def test_dicts_in_every_call() -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        session, other = await client.open_many("arm", 2)
        buffer = np.float32([1, 2, 3])
        stepping = session.step({"obs": buffer, "gap": True})
        buffer.fill(9)  # copied when the call was made
        y = await stepping
        assert y["act"].tolist() == [1, 2, 3] and y["held"] and list(y) == ["act", "held"]
        many = {"obs": np.arange(6.0).reshape(2, 3), "gap": [False, True]}
        for Y in (await session.run(many), await client.step_many([session, other], many)):
            assert Y["act"].tolist() == [[0, 1, 2], [3, 4, 5]] and Y["held"].tolist() == [False, True]
        assert await session.prefill(many) is None
        rows = [{"obs": [n, n, n], "gap": n % 2 == 1} for n in range(5)]
        assert [y["act"].tolist()[0] async for y in session.stream(iter(rows))] == [0, 1, 2, 3, 4]
        assert [y["act"].tolist() async for y in session.stream(many)] == [[0, 1, 2], [3, 4, 5]]
        empty = await session.run({"obs": np.zeros((0, 3)), "gap": np.zeros(0, bool)})
        assert empty["act"].shape == (0, 3)
        with pytest.raises(engram.InvalidInputError, match="lacks 'gap'"):
            await session.step({"obs": [1, 2, 3]})
        with pytest.raises(engram.InvalidInputError, match="lacks 'gap'"):
            [y async for y in session.stream([{"obs": [1, 2, 3]}])]
        with pytest.raises(engram.FailedPreconditionError, match="cannot run on its own output"):
            await session.generate(3)
        settled = await session.settle()
        assert settled.applied == 0 and settled.outputs["act"].shape == (0, 3)

    with_arm(work)


def test_open_fates_of_dicts_are_settled() -> None:
    async def work(peer: Arm, client: engram.AsyncClient) -> None:
        session = await client.open("arm")
        x = {"obs": [1, 2, 3], "gap": True}
        for repeat in (False, True):
            peer.faults.stop_at = "applied"
            peer.faults.gate.clear()
            with pytest.raises(engram.DeadlineExceededError) as caught:
                await session.step(x, timeout=0.1)
            assert caught.value.applied is None and session.in_doubt
            peer.faults.gate.set()
            if repeat:
                outputs = await session.step(x)
                assert caught.value.applied is False
            else:
                settled = await session.settle()
                assert settled.applied == 1
                outputs = {name: values[0] for name, values in settled.outputs.items()}
            assert outputs["act"].tolist() == [1, 2, 3] and outputs["held"]
        assert session.seq == 2

    with_arm(work)


# Lines


def read(text: str, *specs: TensorSpec, header: str = "") -> Any:
    rows = Rows(specs or (OBS, GAP, SEEN))
    if header:
        assert rows.read(header) is None
    found = rows.read(text)
    assert found is not None
    value = found[0]
    return {name: one.tolist() for name, one in value.items()} if isinstance(value, dict) else value.tolist()


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("", '{"obs": [1, 2, 3], "gap": 0.5, "seen": [true, 0]}'),
        ("", "1,2,3,0.5,1,0"),
        ("", "[1, 2, 3, 0.5, 1, 0]"),
        ("obs.0,obs.1,obs.2,gap,seen.0,seen.1", "1,2,3,0.5,1,0"),
        ("seen.1,gap,obs.2,obs.1,seen.0,obs.0", "0,0.5,3,2,1,1"),
        ("seen.1\tgap\tobs.2\tobs.1\tseen.0\tobs.0", "0\t0.5\t3\t2\t1\t1"),
        ('"gap","seen.0","seen.1","obs.0","obs.1","obs.2"', "0.5,1,0,1,2,3"),
    ],
)
def test_lines_by_name_and_bare(header: str, text: str) -> None:
    assert read(text, header=header) == {"obs": [1, 2, 3], "gap": 0.5, "seen": [True, False]}


def test_lines_of_one_input() -> None:
    pair, scalar = TensorSpec("x", "float32", (2,)), TensorSpec("level", "int16", (1,))
    assert read("2,1", pair, header="x.1,x.0") == [1, 2] == read('{"x": [1, 2], "time": 7}', pair)
    assert read("7", scalar, header="level") == [7] == read("7", scalar, header="level.0") == read("7", scalar)
    assert read("1,2,3,4", TensorSpec("m", "float32", (2, 2)), header="m.0.0,m.1.0,m.0.1,m.1.1") == [[1, 3], [2, 4]]
    assert read("7", TensorSpec("3", "float32", ())) == 7  # a number is no name


@pytest.mark.parametrize(
    ("header", "text", "said"),
    [
        (
            "obs.0,obs.1,time",
            "",
            "column 3: 'time' is no input of the model; it takes 'obs.0', 'obs.1', 'obs.2', 'gap'",
        ),
        ("obs.0,obs.0", "", "column 2: 'obs.0' is there twice"),
        ("obs.0,obs.1,gap", "", "no column 'obs.2', 'seen.0', 'seen.1'"),
        ("gap,seen.0,seen.1,obs.0,obs.1,obs.2", "1,2,0,1,1,1", "column 2: the model takes bool, which 2 is not"),
        ("", "1,2,3", r"3 values, but the model takes 6 \(obs float32\[3\], gap one float64, seen bool\[2\]\)"),
        ("", '{"obs": [1, 2, 3], "gap": 1}', "no 'seen'; the model takes 'obs', 'gap', 'seen'"),
        ("", '{"obs": [1, 2, 3], "gap": 1, "seen": [0, 0], "x": 1}', "'x' is no input"),
        ("", '{"obs": [1, 2], "gap": 1, "seen": [0, 0]}', r'"obs": 2 values, but the model takes 3 \(float32\[3\]\)'),
        ("", '{"obs": [1, 2, "3"], "gap": 1, "seen": [0, 0]}', '"obs", column 3: "3" is not a JSON number'),
        ("", "1,x,3", "column 2: 'x' is not a number"),
    ],
)
def test_lines_that_do_not_fit_say_where(header: str, text: str, said: str) -> None:
    rows = Rows((OBS, GAP, SEEN))
    with pytest.raises(ValueError, match=said):
        list(map(rows.read, filter(None, (header, text))))


def test_only_the_first_line_has_names() -> None:
    rows = Rows((TensorSpec("x", "float32", (1,)),))
    assert rows.read("1") is not None
    with pytest.raises(TextError, match="'x' is not a number"):
        rows.read("x")


def test_outputs_as_lines() -> None:
    output = {"act": np.float32([0.5, 1]), "on": np.bool_(True)}
    assert line_of(output, ",") == '{"act": [0.5, 1.0], "on": true}\n'
    assert line_of(output, JSON, seq=3) == '{"seq": 3, "output": {"act": [0.5, 1.0], "on": true}}\n'
    assert line_of(np.array([True, False]), ",") == "1,0\n"
    assert line_of(np.float32(0.25), ",", time=0.032) == "0.032,0.25\n"
    assert json.loads(line_of(np.float32([0.25]), ",", 1, 0.032)) == {"seq": 1, "time": 0.032, "output": [0.25]}


def test_constants_of_arguments() -> None:
    for text, value in (
        ("sr=16000", ("sr", 16000)), ("g=1,0.5", ("g", [1, 0.5])), ("on=true", ("on", True)), ("m=[[1],[2]]", ("m", [[1], [2]])),
    ):  # fmt: skip
        assert constant_of(text) == value
    for text in ("sr", "sr=", "=1", "sr=x", "sr=nan", 'sr=["a"]', "sr=[1", "sr=1_000"):
        with pytest.raises(ValueError, match=r"\w"):
            constant_of(text)


# With a server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_type: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("several")
    for write in (write_arm, write_loud, write_mirror):
        write(path / "models")
    with server_type(path, "--models", str(path / "models")) as one:
        yield one


def test_steps_by_name(server: Any) -> None:
    rng = np.random.default_rng(3)
    X = {"obs": rng.integers(-9, 9, (40, 3)).astype(np.float32), "gap": rng.integers(1, 4, 40).astype(np.float32)}
    total = np.cumsum(X["obs"] * X["gap"][:, None], axis=0)
    with engram.Client(server.address) as client:
        info = client.models.get("arm")
        assert [spec.name for spec in info.inputs] == ["obs", "gap"] and [str(spec) for spec in info.outputs] == [
            "float32[3]", "one int64",
        ]  # fmt: skip
        assert [spec.name for spec in info.constants] == ["sr"] and "any number of rows" in info.batching
        session = client.open("arm", constants={"sr": 8000})
        y = session.step({"obs": X["obs"][0], "gap": X["gap"][0]})
        assert np.array_equal(y["act"], total[0] + 8000) and y["seen"] == 1
        Y = session.run({name: values[1:30] for name, values in X.items()})
        assert np.array_equal(Y["act"], total[1:30] + 8000) and Y["seen"].tolist() == list(range(2, 31))
        session.prefill({name: values[30:35] for name, values in X.items()})
        rest = list(session.stream({name: values[35:] for name, values in X.items()}))
        assert np.array_equal(np.stack([y["act"] for y in rest]), total[35:] + 8000)
        assert session.state()["sr"] == 8000 and session.state()["count"] == 40
        with pytest.raises(engram.InvalidInputError) as caught:
            session.step({"obs": [np.nan, 0, 0], "gap": 1})
        assert caught.value.reason == "NON_FINITE_INPUT" and "obs" in caught.value.message and session.seq == 40
        pair = [session, client.open("arm")]
        with pytest.raises(engram.InvalidInputError) as caught:
            client.step_many(pair, [{"obs": [np.inf, 0, 0], "gap": 1}, {"obs": [1, 1, 1], "gap": 1}])
        assert list(caught.value.rows) == [0] and caught.value.outputs["act"][1].tolist() == [RATE + 1] * 3
        with pytest.raises(engram.InvalidInputError) as caught:
            session.run({"obs": [[0, 0, 0], [np.nan, 0, 0]], "gap": [1, 1]})
        assert caught.value.outputs["seen"].tolist() == [41]


def test_constants_are_part_of_the_session(server: Any) -> None:
    with engram.Client(server.address) as client:
        sessions = client.open_many("arm", 3, constants=[{"sr": 8000}, {}, {"sr": 44100}])
        Y = client.step_many(sessions, {"obs": np.zeros((3, 3), np.float32), "gap": np.ones(3)})
        assert Y["act"][:, 0].tolist() == [8000, RATE, 44100]
        twin = sessions[0].fork()
        assert twin.step({"obs": [1, 1, 1], "gap": 1})["act"].tolist() == [8001] * 3
        name = sessions[2].id
        sessions[2].detach()
        with engram.Client(server.address) as other:
            again = other.open("arm", name, constants={"sr": 8000})  # it exists, and keeps its own
            assert again.state()["sr"] == 44100
        data = client.sessions.export(sessions[0].id)
        assert client.sessions.import_(data, f"{name}-copy").seq == 1
        assert client.sessions.state(f"{name}-copy")["sr"] == 8000


def test_every_dtype_through_a_server(server: Any) -> None:
    rng = np.random.default_rng(5)
    x: dict[str, Any] = {}
    for dtype in DTYPES:
        values = rng.integers(0, 2, (7, 2, 3)) if dtype == "bool" else rng.integers(-100, 100, (7, 2, 3))
        x[f"in_{dtype}"] = np.abs(values).astype("float32" if dtype == "bfloat16" else dtype)
    with engram.Client(server.address) as client:
        Y = client.open("mirror").run(x)
        assert list(Y) == [f"out_{dtype}" for dtype in DTYPES]
        for dtype in DTYPES:
            got, sent = Y[f"out_{dtype}"], x[f"in_{dtype}"]
            assert got.dtype == sent.dtype and np.array_equal(got, sent)


# The command


def stream(server: Any, *words: str, data: str = "") -> tuple[int, list[str], str]:
    done = subprocess.run(
        [sys.executable, "-m", "engram", "stream", *words, "--address", server.address], input=data, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_stream_by_name(server: Any) -> None:
    wanted = [{"act": [8001.0, 8002.0, 8003.0], "seen": 1}, {"act": [8002.0, 8004.0, 8006.0], "seen": 2}]
    for data in (
        2 * '{"gap": 0.5, "obs": [2, 4, 6]}\n',
        "gap,obs.2,obs.1,obs.0\n" + 2 * "0.5,6,4,2\n",
        2 * "2,4,6,0.5\n",
    ):
        status, lines, said = stream(server, "arm", "--constant", "sr=8000", data=data)
        assert (status, [json.loads(line) for line in lines], said) == (0, wanted, "")
    status, lines, said = stream(server, "arm", data="gap,obs.2\n1,2\n")
    assert (status, lines) == (1, []) and "line 1: no column 'obs.0', 'obs.1'" in said
    status, lines, said = stream(server, "arm", "--constant", "rate=8000", data="2,4,6,0.5\n")
    assert (status, lines) == (1, []) and "no constant 'rate'; its constants are 'sr' (one int64)" in said
    for words in (("--constant", "sr"), ("--constant", "sr=1", "--constant", "sr=2"), ("--channel", "1")):
        assert stream(server, "arm", *words)[0] == 2


def write_wav(path: pathlib.Path, samples: np.ndarray, rate: int = RATE, width: int = 2) -> str:
    """samples: -1 to 1, [n] or [n, channels]."""
    whole = np.round(samples * 2.0 ** (8 * width - 1)).clip(-(2.0 ** (8 * width - 1)), 2.0 ** (8 * width - 1) - 1)
    octets = whole.astype("<i8").reshape(-1, 1).view(np.uint8).reshape(-1, 8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((octets ^ 0x80 if width == 1 else octets).tobytes())
    return str(path)


SAMPLES = np.array([0.25, -0.5, 0.125, 0.75])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_wav_file_in_frames(server: Any, tmp_path: pathlib.Path, width: int) -> None:
    samples = np.repeat(SAMPLES, FRAME)[: -FRAME + 10]  # 10 samples of the last frame
    path = write_wav(tmp_path / "a.wav", samples, width=width)
    status, lines, said = stream(server, "loud", "--wav", path)
    assert (status, lines) == (0, ["0.000,0.25", "0.010,-0.5", "0.020,0.125", "0.030,0.75"])
    assert said == "engram stream: the last frame has 10 of 160 samples; the others are zeros\n"
    status, lines, _ = stream(server, "loud", "--wav", path, "--json")
    assert json.loads(lines[1]) == {"seq": 2, "time": 0.01, "output": -0.5}


def test_a_wav_file_of_another_rate(server: Any, tmp_path: pathlib.Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.zeros(FRAME), rate=8000)
    status, lines, said = stream(server, "loud", "--wav", path)
    assert (status, lines) == (1, []) and f"8000 samples a second, but sr of the session is {RATE}" in said
    assert f"sox {path} -r {RATE} out.wav" in said and "--constant sr=8000" in said
    assert stream(server, "loud", "--wav", path, "--constant", "sr=8000") == (0, ["0.000,0.0"], "")
    # A session that exists has the rate that it has.
    with engram.Client(server.address) as client:
        client.open("loud", "of-16000").detach()
    assert stream(server, "loud", "--wav", path, "--session", "of-16000", "--constant", "sr=8000")[0] == 1


def test_channels_are_chosen(server: Any, tmp_path: pathlib.Path) -> None:
    path = write_wav(tmp_path / "two.wav", np.stack([np.full(FRAME, 0.25), np.full(FRAME, 0.5)], axis=1))
    status, lines, said = stream(server, "loud", "--wav", path)
    assert (status, lines) == (1, []) and "2 channels; choose one with --channel 1 to 2" in said
    for channel, peak in ((1, 0.25), (2, 0.5)):
        assert stream(server, "loud", "--wav", path, "--channel", str(channel)) == (0, [f"0.000,{peak}"], "")
    assert "there is no channel 3" in stream(server, "loud", "--wav", path, "--channel", "3")[2]


def test_bad_wav_files(server: Any, tmp_path: pathlib.Path) -> None:
    whole = pathlib.Path(write_wav(tmp_path / "whole.wav", np.zeros(3 * FRAME))).read_bytes()
    floats = whole[:20] + b"\3\0" + whole[22:]
    no_rate = whole[:24] + bytes(4) + whole[28:]
    cases = {
        "none": (None, "No such file"), "empty": (b"", "ends within its header"), "text": (b"hello, world " * 9, "no WAV file"),
        "short": (whole[:30], ""), "float": (floats, "sox .* -e signed-integer -b 16"), "rate": (no_rate, "0 samples a second"),
        "silent": (pathlib.Path(write_wav(tmp_path / "s.wav", np.zeros(0))).read_bytes(), "there are no samples"),
    }  # fmt: skip
    for name, (data, said) in cases.items():
        path = tmp_path / f"{name}.wav"
        if data is not None:
            path.write_bytes(data)
        status, lines, got = stream(server, "loud", "--wav", str(path))
        assert (status, lines) == (1, []) and got.startswith(f"engram stream: {path}: ") and len(got.splitlines()) == 1
        assert re.search(said, got), got
    (tmp_path / "cut.wav").write_bytes(whole[:-FRAME])
    status, lines, got = stream(server, "loud", "--wav", str(tmp_path / "cut.wav"))
    assert (status, len(lines)) == (0, 3) and "it says that it has 480 samples, and ends after 400" in got
    status, lines, got = stream(server, "arm", "--wav", str(tmp_path / "whole.wav"))
    assert (status, lines) == (1, []) and "model arm takes obs float32[3], gap one float32; --wav is for" in got
    assert stream(server, "loud", "--wav", str(tmp_path))[0] == 1
