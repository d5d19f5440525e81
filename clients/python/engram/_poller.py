"""gRPC's one poller of this process: who may use it, and how several event loops share it. Used by _link.py and _loop_thread.py.

gRPC for asyncio has one thread that polls, and every event loop on which there is a channel reads what it found from one
socket. So there are three things to see to:

    a fork            the thread is not in the child, nor are those of gRPC's core, which end some time after the last channel.
                      Where no client is open, gRPC is taken down before the fork, its last thread is waited for, and the
                      child begins anew; else the child is told at its first use, for it would wait for ever
    several loops     a loop may find that another was quicker, or what is meant for one that has ended: no error of anybody's
    patched threads   gevent and eventlet replace threads by what a wait in gRPC would stop altogether
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc.aio

from engram._errors import FailedPreconditionError

_POLLER = "_poll_wrapper"  # part of the name of gRPC's thread
_TASKS = "/proc/self/task"  # Linux alone has it; elsewhere the core's threads are not seen
# What the core calls its threads, cut to the 15 characters that the kernel keeps.
_CORE = frozenset(("event_engine", "lifeguard", "grpc_global_tim", "grpc_shutdown"))
_END_S = 5.0
_PATCHED = (("gevent.monkey", "is_module_patched", "threading"), ("eventlet.patcher", "is_monkey_patched", "thread"))


class _Process:
    """What this process knows of itself."""

    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # whoever has channels open
        self.forks = 0  # between the first process and this one
        self.broken = False  # gRPC was in use when this process was forked
        self.held = False
        self.lock = (
            threading.RLock()
        )  # from before a fork until after it, for another thread may fork, or open a client
        self.ending = False  # threads of gRPC's core may be there of channels that were ours
        self.lasting = False  # some of its threads were there when this process was forked


_process = _Process()


def enter(user: Any) -> None:
    """`user` is about to open channels. Raises FailedPreconditionError where it cannot."""
    refuse_patched_threads()
    if _process.broken:
        raise _forked(
            "this process was forked from one with an Engram client, or other gRPC, in use, whose threads are not here"
        )
    with _process.lock:
        _process.users.add(user)
        _process.ending = True


def leave(user: Any) -> None:
    """`user` has closed its channels."""
    _process.users.discard(user)


def mark() -> int:
    """Another one in a process that was forked."""
    return _process.forks


def check(made: int) -> None:
    """Raises FailedPreconditionError for what was made where `mark` was another."""
    if made != _process.forks:
        raise _forked("this client was made before this process was forked; its connection is the parent's")


def refuse_patched_threads() -> None:
    """Raises FailedPreconditionError where threads are not threads."""
    for module, function, name in _PATCHED:
        if (patcher := sys.modules.get(module)) is not None and getattr(patcher, function)(name):
            library = module.partition(".")[0]
            message = (
                f"{library} has replaced the threads of this process, and gRPC for asyncio needs real ones: it would hang."
                f" Use Engram in a process of its own that is not patched"
            )
            raise FailedPreconditionError(message, reason="PATCHED_THREADS")


@contextmanager
def bound(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """For making a channel on a loop: gRPC's reader of its poller, if it is added now, is added with patience."""
    add_reader = loop.add_reader

    def add_patient(fd: Any, take: Callable[..., object], *args: Any) -> None:
        add_reader(fd, _take, take, *args)

    try:
        loop.add_reader = add_patient  # type: ignore[assignment, method-assign]
    except AttributeError:  # a loop of another make, whose methods are its own
        yield
        return
    try:
        yield
    finally:
        del loop.add_reader


def _take(take: Callable[..., object], *args: Any) -> None:
    # Each event comes with one byte, and one byte is read for at least one event: what is left over is read next.
    with suppress(BlockingIOError):  # another loop has read the byte, and sees to the event
        try:
            take(*args)
        except RuntimeError as error:
            if "closed" not in str(error):
                raise  # else it was for a loop that has ended, where nobody waits any more


def _forked(why: str) -> FailedPreconditionError:
    advice = "make clients after the fork, close them before it, or start processes with `spawn` or `forkserver`"
    return FailedPreconditionError(f"{why}; {advice}", reason="FORKED")


# Forks


class _NoLoop:
    """Stands for a loop while gRPC is held over a fork: nothing is read on it."""

    def add_reader(self, fd: Any, *_: Any) -> None: ...

    def remove_reader(self, fd: Any) -> None: ...


_no_loop: Any = _NoLoop()


def _polling() -> bool:
    return any(_POLLER in thread.name for thread in threading.enumerate())


def _tasks() -> list[str]:
    """The threads of this process, Python's and others'."""
    with suppress(OSError):
        return os.listdir(_TASKS)
    return []


def _core_threads() -> bool:
    """Whether threads of gRPC's core are there. They hold locks, and what is given to them the child would wait for."""
    for task in _tasks():
        with suppress(OSError), open(f"{_TASKS}/{task}/comm") as name:  # it may have ended
            if name.read().rstrip() in _CORE:
                return True
    return False


def _await_core() -> None:
    """Until the core's threads have ended. Closed channels leave them to end by themselves, and nothing of gRPC's waits
    for it. Others' channels may keep them: they are not waited for again until a client has been open."""
    deadline = time.monotonic() + _END_S
    while _process.ending and _core_threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    _process.ending = False


def before_fork() -> None:
    """What is to be done before each fork."""
    _process.lock.acquire()
    if not _process.users:
        if _polling():
            gc.collect()  # closed clients may wait for the collector, and hold the poller meanwhile
        if not _polling():
            _await_core()
    if _process.users or _polling():
        # In the child nothing may take the poller down: it would wait for a thread that is not there.
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(_no_loop)
        try:
            grpc.aio.init_grpc_aio()
        finally:
            asyncio._set_running_loop(running)
        _process.held = True
    else:
        _process.lasting = _core_threads()


def _in_parent() -> None:
    held, _process.held, _process.lasting = _process.held, False, False
    try:
        if held:
            grpc.aio.shutdown_grpc_aio()
    finally:
        _process.lock.release()


def _in_child() -> None:
    _process.forks += 1
    _process.users = weakref.WeakSet()
    # gRPC's own handlers of forks, where they are not switched off, have begun the core's threads anew by now.
    begun = _process.lasting and len(_tasks()) > 1
    _process.broken |= _process.held or (_process.lasting and not begun)
    _process.held = _process.lasting = _process.ending = False
    _process.lock.release()


os.register_at_fork(before=before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
