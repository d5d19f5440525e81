"""Ports that are given to servers of one's own: not the kernel's to take, and no two processes' at once."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from engram_service.ports import blocks, free_port

KERNELS = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
MANY = 300
TAKE = (
    f"import json; from engram_service.ports import free_port; print(json.dumps([free_port() for _ in range({MANY})]))"
)


@pytest.mark.skipif(not KERNELS.exists(), reason="the kernel's range is told by Linux alone")
def test_they_are_not_the_kernels() -> None:
    lowest, highest = map(int, KERNELS.read_text().split())
    if not blocks(lowest, highest):
        pytest.skip("the kernel of this machine takes all ports")
    given = [free_port() for _ in range(MANY)]
    assert len(set(given)) == MANY
    assert not [port for port in given if lowest <= port <= highest]


@pytest.mark.skipif(sys.platform != "linux", reason="processes know of each other's on Linux alone")
def test_processes_do_not_share_them() -> None:
    commands = [
        subprocess.Popen([sys.executable, "-c", TAKE + "; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    given = {free_port() for _ in range(MANY)}
    for command in commands:
        assert command.stdout is not None
        theirs = set(json.loads(command.stdout.readline()))
        assert len(theirs) == MANY and not given & theirs
        given |= theirs
    for command in commands:
        command.communicate(b"\n")


def test_a_fork_has_its_own() -> None:
    ours, (reading, writing) = (
        {free_port() for _ in range(MANY)},
        os.pipe(),
    )  # what a child had is free again after its end
    if (child := os.fork()) == 0:
        os.write(writing, json.dumps([free_port() for _ in range(MANY)]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = json.loads(os.read(reading, 1 << 16))
    assert not ours & set(theirs)


def test_one_in_use_is_not_given() -> None:
    with contextlib.ExitStack() as stack:
        held = {free_port()}
        for port in range(max(held) + 1, max(held) + 5):  # those that would be next
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind(("", port))
                held.add(port)
        assert not held & {free_port() for _ in range(20)}


def test_blocks_keep_out_of_any_range() -> None:
    usual = blocks(32_768, 60_999)
    assert len(usual) > 50 and max(block[-1] for block in usual) + 10_000 < 32_768
    buses = {port + 10_000 for block in usual for port in block}
    assert not buses & {port for block in usual for port in block}, (
        "a cluster node's bus has its port ten thousand above"
    )
    for lowest, highest in ((15_000, 64_000), (1024, 12_000), (10_300, 20_000)):
        found = blocks(lowest, highest)
        assert found and not [port for block in found for port in block if lowest <= port <= highest]
    assert blocks(1024, 65_535) == []
