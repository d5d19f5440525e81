"""Clients of others against what serves here.

The bare native wire answers gRPC's own interop cases (server.py is grpc.testing.TestService on it): test_grpcio.py drives them with
gRPC's Python client, test_go.py with grpc-go's interop client; test_h2spec.py has the rules of HTTP/2.
`engram serve` answers what of the cases fits engram.v1 (test_engram.py), and grpcurl and ghz (test_tools.py), on each of its wires.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop.process import InteropServer
from interop.programs import ProgramsMissingError
from interop.programs import programs as built_programs

from engram_models import shipped_models_dir


@pytest.fixture(scope="module")
def interop_server() -> Iterator[InteropServer]:
    """One for all tests of a module that leave it alone."""
    pytest.importorskip("engram_native", reason="the extension is not built: make install builds it where cargo is")
    with InteropServer() as server:
        yield server


@pytest.fixture(scope="session")
def programs() -> Path:
    """Where the Go programs are."""
    try:
        return built_programs()
    except ProgramsMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engram_server(server_type: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`engram serve`, for all tests of a module."""
    directory = tmp_path_factory.mktemp("interop")
    (directory / "models").mkdir()
    (directory / "models" / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    with server_type(directory, "--models", str(directory / "models")) as server:
        yield server
