"""The public surface: names, import cost, the pure parts."""

from __future__ import annotations

import asyncio
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

import engram
from engram import _errors
from engram._arrays import RowCodec
from engram._status import of_rpc_error, read_details
from engram._types import TensorSpec

NAMES = {
    "AbortedError", "AccessDeniedError", "AlreadyExistsError", "AsyncClient", "BlockingSession", "Client", "ClientClosedError", "ClientOptions", "CloseIncompleteError",
    "DataLossError", "DeadlineExceededError", "EngramError", "FailedPreconditionError", "InternalError", "InvalidInputError", "ModelInfo", "NotFoundError", "Patterns", "Recall",
    "Recreation",
    "ResourceExhaustedError", "ServerInfo", "Session", "SessionClosedError", "SessionInfo", "Settled", "Stored", "TakenOverError", "TensorSpec", "UnavailableError",
    "UnsupportedError", "__version__",
}  # fmt: skip


def test_exported_names() -> None:
    assert set(engram.__all__) == NAMES
    assert all(getattr(engram, name) is not None for name in NAMES)
    assert set(dir(engram)) == NAMES
    with pytest.raises(AttributeError):
        _ = engram.no_such_name  # type: ignore[attr-defined]


def test_every_error_is_exported() -> None:
    tree = {kind for kind in vars(_errors).values() if isinstance(kind, type) and issubclass(kind, engram.EngramError)}
    assert tree == {getattr(engram, kind.__name__) for kind in tree}


def test_blocking_client_has_the_same_names() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert names(engram.Client) ^ names(engram.AsyncClient) == {"aclose", "close", "options"}
    assert names(engram.BlockingSession) == names(engram.Session)
    from engram import _blocking_manage, _manage

    assert names(_blocking_manage.BlockingSessions) == names(_manage.Sessions)
    assert names(_blocking_manage.BlockingModels) == names(_manage.Models)


def test_import_is_cheap() -> None:
    code = "import sys, time; t = time.perf_counter(); import engram; t = time.perf_counter() - t; print(t);"
    code += "engram.AsyncClient; assert not {'torch', 'redis', 'engram_service', 'engram_models'} & set(sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 0.5


def codec(dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> RowCodec:
    return RowCodec(TensorSpec("x", dtype, shape), "the input")


@pytest.mark.parametrize(
    "given", [[1, 2, 3], np.array([1.0, 2, 3]), np.array([1, 2, 3], np.float16), np.array([1, 2, 3], np.int8)]
)
def test_safe_conversions(given: object) -> None:
    assert codec().one(given) == np.array([1, 2, 3], np.float32).tobytes()


def test_unsafe_conversions_say_what_was_expected() -> None:
    with pytest.raises(engram.InvalidInputError, match=r"float32\[3\]; got int64"):
        codec().one(np.array([1, 2, 3]))
    with pytest.raises(engram.InvalidInputError, match=r"float32\[5, 3\]; got float64\[4, 3\]"):
        codec().many(np.zeros((4, 3)), 5)
    with pytest.raises(engram.InvalidInputError, match="int64"):
        codec("int64").one(np.array([1.5, 2, 3]))


def test_bfloat16_rounds_to_nearest_even() -> None:
    rows = codec("bfloat16")
    values = np.array([1.0, 1.00390625, 1.01171875], np.float32)
    assert rows.decode(rows.one(values), 1)[0].tolist() == [1.0, 1.0, 1.015625]
    assert np.isnan(rows.decode(rows.one([np.nan, 0, 0]), 1)[0][0])


def test_status_details() -> None:
    from google.protobuf import any_pb2, duration_pb2

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    info = field(1, b"QUEUE_FULL") + field(2, b"engram") + field(3, field(1, b"limit") + field(2, b"7"))
    retry = field(1, duration_pb2.Duration(seconds=1, nanos=500_000_000).SerializeToString())
    anys = [any_pb2.Any(type_url=f"type.googleapis.com/google.rpc.{name}", value=value).SerializeToString()
            for name, value in (("ErrorInfo", info), ("RetryInfo", retry))]  # fmt: skip
    status = b"\x08\x08" + field(2, b"full") + b"".join(field(3, data) for data in anys)
    details = read_details(status)
    assert (details.reason, details.retry_after, details.metadata) == ("QUEUE_FULL", 1.5, {"limit": "7"})
    for cut in range(len(status)):
        read_details(status[:cut])
    assert read_details(b"\xff" * 20).reason == ""


def test_a_call_that_nobody_here_has_cancelled_was_lost_on_its_way() -> None:
    nothing = grpc.aio.Metadata()
    error = of_rpc_error(grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, nothing, nothing, "CANCELLED"))
    assert isinstance(error, engram.UnavailableError) and error.reason == "CONNECTION_LOST"


def test_command_line_is_quick_and_says_what_there_is() -> None:
    code = "import sys; from engram._cli import main; sys.argv = ['engram', '--help']\ntry: main()\n"
    code += "finally: assert not {'torch', 'redis', 'numpy', 'grpc'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stream " in done.stdout
    assert "one output line for each" in done.stdout
    assert subprocess.run([sys.executable, "-m", "engram"], capture_output=True, check=False).returncode == 2
    assert subprocess.run([sys.executable, "-m", "engram", "no-such"], capture_output=True, check=False).returncode == 2
    version = subprocess.run([sys.executable, "-m", "engram", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"engram {engram.__version__}\n"


NO_SECONDS = [float("nan"), float("inf"), -float("inf"), -0.5, 1e12, "5"]


@pytest.mark.parametrize("seconds", NO_SECONDS, ids=str)
def test_options_are_finite_numbers(seconds: Any) -> None:
    for item in fields(engram.ClientOptions):
        if item.name.endswith("_s"):
            options = engram.ClientOptions(**{item.name: seconds})
            with pytest.raises(engram.InvalidInputError, match=f"^{item.name} = "):
                engram.AsyncClient("127.0.0.1:1", options)
        elif item.name.endswith("_max"):
            with pytest.raises(engram.InvalidInputError, match=f"^{item.name} = "):
                engram.AsyncClient("127.0.0.1:1", engram.ClientOptions(**{item.name: seconds}))


@pytest.mark.parametrize("seconds", NO_SECONDS, ids=str)
def test_timeouts_are_finite_numbers(seconds: Any) -> None:
    """Refused before anything is sent: there is no server."""

    async def ask(call: Callable[[engram.AsyncClient], Any]) -> None:
        client = engram.AsyncClient("127.0.0.1:1")
        try:
            with pytest.raises(engram.InvalidInputError, match=r"timeout = .*None for no limit"):
                await call(client)
        finally:
            await client.aclose()

    for call in (
        lambda client: client.open("m", timeout=seconds),
        lambda client: client.server(timeout=seconds),
        lambda client: client.sessions.get("s", timeout=seconds),
    ):
        asyncio.run(ask(call))


def test_files_of_a_client_are_regular(tmp_path: pathlib.Path) -> None:
    """They are read on its event loop, again for each connection: a pipe would hold up every session."""
    pipe = tmp_path / "ca.pem"
    os.mkfifo(pipe)
    with (
        pytest.raises(engram.InvalidInputError, match=r"ca_file = .*: not a regular file"),
        engram.Client("127.0.0.1:1", ca_file=str(pipe)),
    ):
        pass
    done = subprocess.run(
        [sys.executable, "-m", "engram", "sessions", "list", "--address", "127.0.0.1:1", "--token-file", str(pipe)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "not a regular file" in done.stderr and "Traceback" not in done.stderr
