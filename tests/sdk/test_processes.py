"""Clients in forked processes, on several event loops, and where threads were replaced: they work, or say at their first use
why they cannot; they do not hang, and gRPC writes nothing to stderr."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from typing import Any

import pytest

import engram

_SEES_THREADS = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="gRPC's core is seen on Linux alone")

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
    forked = "FailedPreconditionError FORKED"
    expected = [forked] * 4 + ["None", engram.__version__, engram.__version__]
    assert done.stdout.splitlines() == [*expected, forked, "None"], (done.stdout, done.stderr)


@_SEES_THREADS
@pytest.mark.parametrize("used", [True, False])
def test_a_child_where_others_use_grpc_is_told(shared_server: Any, used: bool) -> None:
    """Whether or not there was a client before: the threads of the other's channel are not in the child."""
    done = script(
        shared_server,
        f"""
        import grpc
        channel = grpc.insecure_channel(sys.argv[1])
        channel.unary_unary("/engram.v1.EngramService/GetServer")(b"", timeout=10)
        if {used}:
            ask()
        print(in_child(ask))
        print(in_child(lambda: in_child(ask)))
        channel.close()
        ask()
        print(in_child(ask))
        """,
    )
    forked = "FailedPreconditionError FORKED"
    assert (done.stdout.splitlines(), done.stderr) == ([forked, forked, engram.__version__], "")


@_SEES_THREADS
def test_a_fork_waits_for_the_threads_that_closed_clients_leave(shared_server: Any) -> None:
    """They end soon, but not at once; another's channel makes it a second here."""
    done = script(
        shared_server,
        """
        import threading, grpc
        channel = grpc.insecure_channel(sys.argv[1])
        channel.unary_unary("/engram.v1.EngramService/GetServer")(b"", timeout=10)
        ask()
        threading.Timer(1.0, channel.close).start()
        print(in_child(ask))
        """,
    )
    assert (done.stdout.split(), done.stderr) == ([engram.__version__], "")


def test_threads_that_fork_at_the_same_time(shared_server: Any) -> None:
    """What is held for one's fork is held until each has forked, and let go of after."""
    done = script(
        shared_server,
        """
        import threading
        def fork_all():
            said = []
            def forks():
                for _ in range(4):
                    said.append(in_child(ask))
            threads = [threading.Thread(target=forks) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(len(said), *set(said))
        with engram.Client(sys.argv[1]) as client:
            client.server()
            fork_all()
        fork_all()
        """,
    )
    expected = ["12 FailedPreconditionError FORKED", f"12 {engram.__version__}"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


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
            except engram.FailedPreconditionError as error:
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
                with pytest.raises(engram.FailedPreconditionError, match=module.partition(".")[0]) as caught:
                    kind("127.0.0.1:1")
                assert caught.value.reason == "PATCHED_THREADS"
            elif kind is engram.AsyncClient:
                kind("127.0.0.1:1")
