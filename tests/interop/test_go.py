"""grpc-go against the bare wire: its own interop client, unmodified, and a program for what that leaves out."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from interop.process import InteropServer

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)
pytestmark = pytest.mark.timeout(900)  # the first of them builds the programs

CASES = (
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "unimplemented_method",
    "unimplemented_service",
    "pick_first_unary",
    "rpc_soak",
    "channel_soak",
)
LEFT_OUT = {
    "custom_metadata": "the wire sends no metadata of a call's own; large_metadata below shows that a client's comes whole",
    "*_creds, *_credentials, oauth2_auth_token": "they need accounts of a cloud",
    "orca_per_rpc, orca_oob": "load reports, which this service does not send",
}


def run(command: list[str | Path], **more: Any) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, **more)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_interop_case(programs: Path, interop_server: InteropServer, case: str) -> None:
    port = str(interop_server.port)
    run([programs / "client", "-server_host", "127.0.0.1", "-server_port", port, "-test_case", case])
    interop_server.until(lambda counters: counters["calls"] == 0)


@pytest.mark.parametrize("case", ["large_unary", "ping_pong", "cancel_after_first_response"])
def test_interop_case_with_tls(programs: Path, certificates: Any, case: str) -> None:
    certificate, key = certificates.issue("server")
    command: list[str | Path] = [programs / "client", "-server_host", "127.0.0.1", "-test_case", case, "-use_tls"]
    with InteropServer("--tls", str(certificate), str(key)) as server:
        run([*command, "-server_port", str(server.port), "-use_test_ca", "-ca_file", certificates.ca("ca")])


@pytest.mark.parametrize("case", ["gzip", "large_metadata"])
def test_case_of_our_own(programs: Path, interop_server: InteropServer, case: str) -> None:
    run([programs / "interop", interop_server.address, case])
    interop_server.until(lambda counters: counters["calls"] == 0)


def test_clients_do_not_notice_that_their_server_is_replaced(programs: Path) -> None:
    with InteropServer() as server:
        command = [programs / "interop", server.address, "replaced"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as caller:
            assert caller.stdout is not None
            assert caller.stdout.readline() == b"begun\n"
            for _ in range(3):
                server.tell("replace")
                time.sleep(0.3)
            said, _ = caller.communicate(timeout=30)
        assert (caller.returncode, said) == (0, b"4 servers\n")
        server.until(lambda counters: counters["connections"] == 0)
