"""The SDK and its commands against a real server with a real Redis."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from chaos.proxy import Wires
from redises import free_port

import engram
from engram_models import shipped_models_dir

MODEL = "digits-reader"
PATIENT = engram.ClientOptions(backoff_initial_s=0.02, backoff_max_s=0.3)


def digits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 8), np.float32)


@pytest.mark.promise(5)
def test_every_way_to_step_gives_the_same_bits(shared_server) -> None:
    X = digits(100)

    async def main() -> None:
        async with engram.AsyncClient(shared_server.address) as client:
            a, b, c, d = await client.open_many(MODEL, 4)
            stepped = np.array([await a.step(x) for x in X])
            run = await b.run(X)
            assert stepped.dtype == np.float32
            assert stepped.shape == (100, 10)
            assert (stepped == run).all()
            await c.prefill(X[:-1])
            assert (await c.step(X[-1]) == run[-1]).all()
            streamed = [y async for y in d.stream(iter(X))]
            assert (np.array(streamed) == run).all()
            assert [s.seq for s in (a, b, c, d)] == [100] * 4
            state = await a.state()
            assert {name: values.shape for name, values in state.items()} == {"h0": (96,), "c0": (96,)}
            other = await b.state()
            assert all((values == other[name]).all() for name, values in state.items())

    asyncio.run(main())


@pytest.mark.promise(2)
@pytest.mark.parametrize("durability", ["step", "interval"])
def test_kill_the_server_and_carry_on(server, durability: str) -> None:
    X = digits(3000)

    async def main() -> None:
        async with engram.AsyncClient(server.address, PATIENT) as client:
            sessions = await client.open_many(MODEL, 8, durability=durability)
            runs = [asyncio.create_task(session.run(X)) for session in sessions]
            alone = await client.open(MODEL, durability=durability)
            steps = []
            for kill in range(2):
                steps += [await alone.step(x) for x in X[100 * kill : 100 * kill + 100]]
                await asyncio.to_thread(server.restart)
            results = await asyncio.gather(*runs)
            reference = await (await client.open(MODEL)).run(X)
            for Y in results:
                assert (reference == Y).all()
            assert (np.array(steps) == reference[:200]).all()

    asyncio.run(asyncio.wait_for(main(), 100))


def test_drain_and_restart_are_not_noticed(server) -> None:
    X = digits(3000)

    async def main() -> None:
        async with engram.AsyncClient(server.address, PATIENT) as client:
            session = await client.open(MODEL, "drained")
            run = asyncio.create_task(session.run(X))
            await asyncio.sleep(0.3)

            def bounce() -> int:
                code = server.stop()
                server.start()
                return code

            assert await asyncio.to_thread(bounce) == 0
            reference = await (await client.open(MODEL)).run(X)
            assert (await run == reference).all()

    asyncio.run(asyncio.wait_for(main(), 100))


def test_bad_input_is_refused_here_or_there_and_harms_nobody(shared_server) -> None:
    async def main() -> None:
        async with engram.AsyncClient(shared_server.address) as client:
            session, other = await client.open_many(MODEL, 2)
            for bad, reason in [
                (np.zeros(7, np.float32), "INVALID_INPUT_WIDTH"),
                (np.zeros((1, 8), np.float32), "INVALID_INPUT_WIDTH"),
                (np.zeros(8, np.complex64), "INVALID_INPUT_DTYPE"),
                (np.zeros(8, np.int64), "INVALID_INPUT_DTYPE"),
                (["a"] * 8, "INVALID_INPUT_DTYPE"),
                ([[1, 2], [3]], "INVALID_INPUT_WIDTH"),
                (np.full(8, np.nan, np.float32), "NON_FINITE_INPUT"),
            ]:
                with pytest.raises(engram.InvalidInputError) as caught:
                    await session.step(bad)
                assert caught.value.reason == reason
                assert isinstance(caught.value, ValueError)
            X = digits(2)
            X[1] = np.inf
            with pytest.raises(engram.InvalidInputError) as failed:
                await client.step_many([other, session], X)
            assert list(failed.value.rows) == [1]
            assert (session.seq, other.seq) == (0, 1)
            assert session.model.name == MODEL
            await session.step(np.zeros(8))
            await session.step([0, 1, 2, 3, 4, 5, 6, 7])
            with pytest.raises(engram.FailedPreconditionError):
                await session.generate(3)
            for work, kind in [
                (client.open("no-such-model"), engram.NotFoundError),
                (client.open(MODEL, version="99"), engram.NotFoundError),
                (client.open(MODEL, "white space"), engram.InvalidInputError),
                (client.open(MODEL, durability="sometimes"), engram.InvalidInputError),
                (client.sessions.get("no-such-session"), engram.NotFoundError),
                (client.sessions.import_(b"garbage"), engram.InvalidInputError),
            ]:
                with pytest.raises(kind):
                    await work

    asyncio.run(main())


def test_newest_open_wins_and_the_other_is_told(shared_server) -> None:
    async def main() -> None:
        async with engram.AsyncClient(shared_server.address) as one, engram.AsyncClient(shared_server.address) as two:
            first, quiet = await one.open(MODEL, "contested"), await one.open(MODEL, "uncontested")
            y = await first.step(digits(1)[0])
            second = await two.open(MODEL, "contested")
            assert second.seq == 1
            with pytest.raises(engram.TakenOverError):
                await first.step(digits(1)[0])
            assert (await quiet.step(digits(1)[0]) == y).all()
            await second.step(digits(1)[0])
            back = await one.open(MODEL, "contested")
            assert back.seq == 2
            await two.sessions.close("contested")
            with pytest.raises(engram.SessionClosedError):
                await back.step(digits(1)[0])

    asyncio.run(main())


def test_management(shared_server) -> None:
    async def main() -> None:
        async with engram.AsyncClient(shared_server.address) as client:
            session = await client.open(MODEL, "managed")
            assert await client.open(MODEL, "managed") is session
            X = digits(12)
            reference = await session.run(X)
            fork = await session.fork("managed-2")
            assert fork.seq == 12
            assert (await fork.step(X[0]) == await session.step(X[0])).all()
            data = await client.sessions.export("managed")
            imported = await client.sessions.import_(data, "managed-3")
            assert (imported.id, imported.seq, imported.model) == ("managed-3", 13, MODEL)
            names = {info.id async for info in client.sessions.list(MODEL)}
            assert {"managed", "managed-2", "managed-3"} <= names
            await session.detach()
            with pytest.raises(engram.SessionClosedError):
                await session.step(X[0])
            again = await client.open(MODEL, "managed")
            assert again.seq == 13
            await again.close()
            await again.close()
            with pytest.raises(engram.NotFoundError):
                await client.sessions.get("managed")
            fresh = await client.open(MODEL, "managed")
            assert fresh.seq == 0
            assert (await fresh.run(X) == reference).all()
            shipped = {path.parent.parent.name for path in shipped_models_dir().glob("*/*/model.toml")}
            assert {model.name for model in await client.models.list()} == shipped
            assert (await client.models.get(MODEL)).inputs[0].shape == (8,)
            assert (await client.models.reload())[1] == []
            assert (await client.server()).version == engram.__version__

    asyncio.run(main())


def test_a_thousand_opens_at_once(shared_server) -> None:
    async def main() -> None:
        async with engram.AsyncClient(shared_server.address) as client:
            sessions = await asyncio.gather(*(client.open(MODEL) for _ in range(1000)))
            X = digits(1000)
            at_once = await asyncio.gather(*(session.step(x) for session, x in zip(sessions, X, strict=True)))
            alone = await client.open(MODEL)
            assert (await alone.step(X[700]) == at_once[700]).all()
            await client.close_many(sessions)

    asyncio.run(main())


def test_blocking_client_from_many_threads(shared_server) -> None:
    X = digits(30)
    with engram.Client(shared_server.address) as client:
        sessions = client.open_many(MODEL, 8)
        results: dict[int, np.ndarray] = {}

        def work(number: int) -> None:
            results[number] = np.array([sessions[number].step(x) for x in X])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reference = client.open(MODEL).run(X)
        assert all((results[i] == reference).all() for i in range(8))
        streamed = list(client.open(MODEL).stream(x for x in X))
        assert (np.array(streamed) == reference).all()
        assert (client.step_many(sessions, X[:8]).shape) == (8, 10)
        assert sum(1 for _ in client.sessions.list()) >= 10
        client.close_many(sessions)
    with pytest.raises(engram.ClientClosedError):
        client.server()


@pytest.mark.promise(4)
@pytest.mark.parametrize("durability", ["step", "interval"])
def test_a_step_behind_a_wire_that_fails_is_applied_once(shared_server, durability: str) -> None:
    """The wire holds everything back, or loses it: the step is late, or was never there."""
    X = digits(6)
    wires = Wires()
    port = free_port()
    proxy = wires.proxy(port, shared_server.port)

    def failing(session: engram.BlockingSession, x: np.ndarray, cut: bool) -> engram.EngramError:
        proxy.hold(True)
        with pytest.raises(engram.DeadlineExceededError) as caught:
            session.step(x, timeout=0.2)
        assert (caught.value.applied, session.in_doubt) == (None, True)
        if cut:
            proxy.cut()
        proxy.heal()
        return caught.value

    try:
        with engram.Client(f"127.0.0.1:{port}", PATIENT) as client:
            reference = client.open(MODEL).run(X)
            session = client.open(MODEL, durability=durability)
            for t, cut in ((0, False), (1, True)):
                error = failing(session, X[t], cut)
                assert (session.step(X[t]) == reference[t]).all()
                assert (error.applied, session.seq) == (False, t + 1)
            error = failing(session, X[2], cut=False)
            settled = session.settle()
            assert (settled.applied, settled.seq, error.applied) == (1, 3, True)
            assert (settled.outputs[0] == reference[2]).all()
            error = failing(session, X[5], cut=True)
            assert (session.settle().applied, error.applied, session.seq) == (0, False, 3)
            error = failing(session, X[3], cut=False)
            assert (session.step(X[4]) == reference[4]).all()
            assert (error.applied, error.seq, session.seq) == (True, 4, 5)
            session.close()
    finally:
        proxy.close()
        wires.stop()


def test_stream_does_not_wait_for_the_source(shared_server) -> None:
    async def main() -> None:
        async with engram.AsyncClient(shared_server.address) as client:
            session = await client.open(MODEL)
            gate = asyncio.Event()

            async def slow():
                yield digits(1)[0]
                await gate.wait()
                yield digits(1)[0]
                raise RuntimeError("the source broke")

            outputs = session.stream(slow())
            await asyncio.wait_for(anext(outputs), 5)
            gate.set()
            await asyncio.wait_for(anext(outputs), 5)
            with pytest.raises(RuntimeError, match="the source broke"):
                await anext(outputs)
            async for _ in session.stream(digits(100)):
                break
            seq = session.seq
            await session.step(digits(1)[0])
            assert session.seq > seq

    asyncio.run(main())


# The command line


def command(server, *arguments: str, **options) -> subprocess.Popen:
    line = [sys.executable, "-m", "engram", *arguments, "--address", server.address]
    return subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def csv(x: np.ndarray) -> str:
    return ",".join(str(value) for value in x) + "\n"


def test_stream_command_answers_each_line_at_once_and_carries_on(shared_server) -> None:
    X = digits(6)
    with engram.Client(shared_server.address) as client:
        reference = client.open(MODEL).run(X)
    process = command(shared_server, "stream", MODEL, "--session", "piped")
    for x, y in zip(X[:3], reference[:3], strict=True):
        process.stdin.write(csv(x))
        process.stdin.flush()
        assert (np.array(process.stdout.readline().split(","), np.float32) == y).all()
    process.stdin.write(json.dumps({"x": X[3].tolist()}) + "\n\n")
    process.stdin.flush()
    assert (np.array(json.loads(process.stdout.readline()), np.float32) == reference[3]).all()
    process.stdin.close()
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    process = command(shared_server, "stream", MODEL, "--session", "piped", "--json")
    out, err = process.communicate("".join(map(csv, X[4:])), timeout=20)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["seq"] for line in lines] == [5, 6]
    assert (np.array(lines[1]["output"], np.float32) == reference[5]).all()
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("bad", ["1,2,3", "nan,0,0,0,0,0,0,0", "[1, 2", '{"y": 1, "z": 2}', "a,b,c,d,e,f,g,h"])
def test_stream_command_bad_line(shared_server, bad: str) -> None:
    process = command(shared_server, "stream", MODEL)
    out, err = process.communicate(csv(digits(1)[0]) * 2 + bad + "\n" + csv(digits(1)[0]), timeout=20)
    assert process.returncode == 1
    assert len(out.splitlines()) == 2
    assert "line 3" in err
    assert "Traceback" not in err


def test_stream_command_interrupted_and_closed_pipe(shared_server) -> None:
    # Tests that run in the background have SIGINT ignored, and children inherit that.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command(shared_server, "stream", MODEL, preexec_fn=heeded)
    process.stdin.write(csv(digits(1)[0]))
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert "Traceback" not in process.stderr.read()
    process.stdin.close()
    process = command(shared_server, "stream", MODEL)
    process.stdout.close()
    process.stdin.write(csv(digits(1)[0]))
    process.stdin.flush()
    time.sleep(0.1)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_sessions_command(shared_server, tmp_path) -> None:
    with engram.Client(shared_server.address) as client:
        client.open(MODEL, "from-shell").run(digits(3))

    def call(*arguments: str) -> str:
        process = command(shared_server, "sessions", *arguments)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
        return out

    assert "from-shell" in call("list")
    assert "from-shell" in [info["id"] for info in json.loads(call("list", "--json", "--model", MODEL))]
    assert json.loads(call("show", "from-shell", "--json"))["seq"] == 3
    assert "from-shell" in call("show", "from-shell")
    assert set(json.loads(call("state", "from-shell", "--json"))) == {"h0", "c0"}
    assert json.loads(call("fork", "from-shell", "from-shell-2", "--json"))["id"] == "from-shell-2"
    call("export", "from-shell", str(tmp_path / "session"))
    assert json.loads(call("import", str(tmp_path / "session"), "--session", "from-shell-3", "--json"))["seq"] == 3
    assert json.loads(call("close", "from-shell", "from-shell-2", "--json")) == {
        "closed": ["from-shell", "from-shell-2"]
    }
    process = command(shared_server, "sessions", "show", "from-shell")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "SESSION_NOT_FOUND" in err


def test_no_server_is_one_line() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "engram", "sessions", "list", "--address", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert "127.0.0.1:1" in process.stderr
