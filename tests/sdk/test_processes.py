"""Clients in forked processes, on several event loops, and where threads were replaced: they work, or say at their first use
why they cannot; they do not hang, and gRPC writes nothing to stderr."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from typing import Any

import pytest

import engram

_FORK = """
import os, sys, select
import engram

def in_child(work):
    '''What it returns or raises, in a forked process.'''
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__} {getattr(error, 'reason', '')}"
        os.write(writer, said.encode())
        os._exit(0)
    ready, _, _ = select.select([reader], [], [], 15)
    said = os.read(reader, 1000).decode() if ready else "hangs"
    os.kill(child, 9)
    os.waitpid(child, 0)
    return said

def ask():
    with engram.Client(sys.argv[1]) as client:
        return client.server(timeout=10).version
"""


def script(server: Any, code: str) -> subprocess.CompletedProcess[str]:
    program = _FORK + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, server.address], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_client_in_a_child_of_closed_clients_works(shared_server: Any) -> None:
    """Blocking and asynchronous ones, several times, and the parent goes on."""
    done = script(
        shared_server,
        """
        import asyncio
        def parent():
            ask()
            async def main():
                async with engram.AsyncClient(sys.argv[1]) as client:
                    session = await client.open("digits-reader")
                    await session.step([0] * 8)
                    await session.close()
            asyncio.run(main())
        for _ in range(3):
            parent()
            print(in_child(ask), in_child(lambda: in_child(ask)))
        """,
    )
    assert done.stdout.split() == [engram.__version__] * 6, (done.stdout, done.stderr)


def test_a_child_of_an_open_client_is_told_at_once(shared_server: Any) -> None:
    done = script(
        shared_server,
        """
        import asyncio
        with engram.Client(sys.argv[1]) as client:
            session = client.open("digits-reader")
            print(in_child(ask))
            print(in_child(lambda: session.step([0] * 8)))
            print(in_child(client.server))
            print(in_child(lambda: client.open("digits-reader")))
            print(in_child(client.close))
            session.step([0] * 8)
            print(client.server().version)
        print(in_child(ask))

        async def main():
            async with engram.AsyncClient(sys.argv[1]) as client:
                session = await client.open("digits-reader")
                print(in_child(lambda: asyncio.new_event_loop().run_until_complete(session.step([0] * 8))))
                print(in_child(lambda: asyncio.new_event_loop().run_until_complete(client.aclose())))
                await session.step([0] * 8)
        asyncio.run(main())
        """,
    )
    forked = "FailedPrecondition FORKED"
    expected = [forked] * 4 + ["None", engram.__version__, engram.__version__]
    assert done.stdout.splitlines() == [*expected, forked, "None"], (done.stdout, done.stderr)


def test_worker_pools_of_forked_processes(shared_server: Any) -> None:
    done = script(
        shared_server,
        """
        import multiprocessing
        def work(number):
            return ask()
        ask()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(*pool.map_async(work, range(4)).get(20))
        """,
    )
    assert done.stdout.split() == [engram.__version__] * 4, (done.stdout, done.stderr)


def test_event_loops_side_by_side_and_one_after_the_other(shared_server: Any) -> None:
    """Of three threads two make new loops all the time: what gRPC has for one that ended troubles nobody."""
    done = script(
        shared_server,
        """
        import asyncio, threading
        answered = []
        async def main(steps):
            async with engram.AsyncClient(sys.argv[1]) as client:
                session = await client.open("digits-reader")
                for _ in range(steps):
                    await session.step([0] * 8, timeout=20)
                    answered.append(1)
        def turns(count, steps):
            for _ in range(count):
                asyncio.run(main(steps))
        threads = [threading.Thread(target=turns, args=each) for each in ((8, 20), (8, 20), (1, 160))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(answered))
        """,
    )
    assert (done.stdout.strip(), done.stderr) == ("480", "")


def test_a_client_is_of_one_event_loop(shared_server: Any) -> None:
    done = script(
        shared_server,
        """
        import asyncio, threading
        client = engram.AsyncClient(sys.argv[1])
        async def begin():
            await client.connect()
            return await client.open("digits-reader")
        first = asyncio.new_event_loop()
        session = first.run_until_complete(begin())
        def other(work):
            try:
                asyncio.run(work)
            except engram.FailedPrecondition as error:
                print(error.reason)
        async def call(function, *args):
            await function(*args)
        for function, *args in ((session.step, [0] * 8), (session.close,), (client.server,), (client.open, "digits-reader"),
                                (client.step_many, [session], [[0] * 8]), (client.connect,), (client.aclose,),
                                (session.state,)):
            other(call(function, *args))
        print(first.run_until_complete(session.step([0] * 8)).shape)
        first.run_until_complete(client.aclose())
        """,
    )
    assert done.stdout.splitlines() == ["OTHER_EVENT_LOOP"] * 8 + ["(10,)"], (done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("module", "function"), [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")]
)
def test_patched_threads_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
    """A stand-in for the library, which would patch the tests' own process."""
    for patched in (True, False):
        stand_in = types.SimpleNamespace(**{function: lambda name, patched=patched: patched})
        monkeypatch.setitem(sys.modules, module, stand_in)
        for kind in (engram.AsyncClient, engram.Client):
            if patched:
                with pytest.raises(engram.FailedPrecondition, match=module.partition(".")[0]) as caught:
                    kind("127.0.0.1:1")
                assert caught.value.reason == "PATCHED_THREADS"
            elif kind is engram.AsyncClient:
                kind("127.0.0.1:1")
