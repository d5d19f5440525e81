"""How the SDK and its commands are let in: tokens that change, TLS, and what is never sent in plain text."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import engram
from engram_models import LSTM, write_bundle
from engram_service.auth.tokens import digest_of, new_token

QUICK = ("--shipped-models", "false", "--batch-rows-max", "32", "--tokens-poll-s", "0.1")
PATIENT = engram.ClientOptions(backoff_initial_s=0.02, backoff_max_s=0.3)
ONES = np.ones(3, np.float32)


def write_tokens(path: pathlib.Path, **tokens: str) -> None:
    tables = [
        f'[tokens.{name}]\ntenant = "acme"\nrights = ["read", "step", "manage"]\nsha256 = "{digest_of(token)}"\n'
        for name, token in tokens.items()
    ]
    new = path.with_suffix(".new")
    new.write_text("\n".join(tables))
    new.replace(path)


@pytest.fixture
def guarded(
    server_type: Any, certificates: Any, tmp_path: pathlib.Path
) -> Iterator[tuple[Any, pathlib.Path, pathlib.Path, str]]:
    """A server behind TLS and tokens; its CA, its tokens file, and a token."""
    from grpc import ssl_channel_credentials

    torch.manual_seed(1)
    write_bundle(tmp_path / "models", "lstm", "1", LSTM(3, 4))
    token, path, ca = new_token(), tmp_path / "tokens.toml", certificates.ca("ca")
    write_tokens(path, first=token)
    cert, key = certificates.issue("server")
    flags = (
        "--models",
        str(tmp_path / "models"),
        "--tokens-file",
        str(path),
        "--tls-cert",
        str(cert),
        "--tls-key",
        str(key),
    )
    server = server_type(tmp_path, *flags, *QUICK)
    server.credentials = ssl_channel_credentials(ca.read_bytes())
    with server:
        yield server, ca, path, token


async def step_for_ever(session: engram.Session) -> None:
    while True:
        await session.step(ONES)


def test_a_token_that_is_replaced_is_not_noticed(guarded: tuple[Any, pathlib.Path, pathlib.Path, str]) -> None:
    server, ca, path, first = guarded
    held = {"token": first}

    async def main() -> None:
        async with engram.AsyncClient(server.address, PATIENT, token=lambda: held["token"], ca_file=str(ca)) as client:
            session = await client.open("lstm", "kept")
            await session.step(ONES)
            second = new_token()
            write_tokens(path, first=first, second=second)
            await asyncio.sleep(0.5)
            held["token"] = second
            write_tokens(path, second=second)  # the stream that the first token opened is ended
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                await session.step(ONES)
            assert (await client.sessions.get("kept")).seq == session.seq
            assert "TOKEN_UNKNOWN" in server.log.read_text()
            write_tokens(path, third=new_token())
            with pytest.raises(engram.AccessDeniedError) as denied:
                await step_for_ever(session)
            assert denied.value.reason == "TOKEN_UNKNOWN"

    with contextlib.suppress(engram.CloseIncompleteError):  # where the last step was under way, its fate stays open
        asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.promise(10)
def test_a_client_that_is_not_let_in_is_told_at_once(guarded: tuple[Any, pathlib.Path, pathlib.Path, str]) -> None:
    server, ca, _, _ = guarded
    for token, reason in ((None, "TOKEN_MISSING"), (new_token(), "TOKEN_UNKNOWN")):
        began = time.monotonic()
        with (
            pytest.raises(engram.AccessDeniedError) as denied,
            engram.Client(server.address, token=token, ca_file=str(ca)),
        ):
            pass
        assert denied.value.reason == reason
        assert time.monotonic() - began < 5.0

    def broken() -> str:
        raise OSError("no vault")

    impatient = engram.ClientOptions(connect_timeout_s=0.5)
    with (
        pytest.raises(engram.UnavailableError, match="OSError"),
        engram.Client(server.address, impatient, token=broken, ca_file=str(ca)),
    ):
        pass
    with (
        pytest.raises(engram.InvalidInputError, match="ASCII"),
        engram.Client(server.address, token="a\nb", ca_file=str(ca)),
    ):
        pass
    with pytest.raises(engram.InvalidInputError, match="ca_file"), engram.Client(server.address, ca_file="/none"):
        pass


def test_the_commands_take_token_and_ca_from_flags_and_environment(
    guarded: tuple[Any, pathlib.Path, pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    server, ca, _, token = guarded
    file = tmp_path / "token"
    file.write_text(token + "\n")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "engram", *arguments, "--address", server.address],
            input="1,1,1\n", capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=60,
        )  # fmt: skip

    done = run("stream", "lstm", "--session", "s", "--token-file", str(file), "--ca", str(ca))
    assert done.returncode == 0 and len(done.stdout.split(",")) == 4, done.stderr
    done = run("sessions", "list", "--json", ENGRAM_TOKEN=token, ENGRAM_CA=str(ca))
    assert done.returncode == 0 and '"s"' in done.stdout, done.stderr
    done = run("sessions", "list", ENGRAM_TOKEN_FILE=str(file), ENGRAM_CA=str(ca))
    assert done.returncode == 0, done.stderr
    done = run("sessions", "list", ENGRAM_CA=str(ca))
    assert done.returncode == 1 and "TOKEN_MISSING" in done.stderr
    done = run("sessions", "list", "--token-file", "/none")
    assert done.returncode == 1 and "--token-file /none" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "address", ["example.org:50051", "10.0.0.7:50051", "dns:///example.org:50051", "[2001:db8::1]:1"]
)
def test_a_token_does_not_leave_the_machine_in_plain_text(address: str) -> None:
    with pytest.raises(engram.InvalidInputError) as refused:
        engram.AsyncClient(address, token="secret")
    assert refused.value.reason == "TOKEN_IN_PLAIN_TEXT" and "secret" not in str(refused.value)
    with pytest.raises(engram.InvalidInputError):
        engram.Client(["127.0.0.1:1", address], token=lambda: "secret")
    engram.AsyncClient(address, token="secret", tls=True)
    engram.AsyncClient(address, engram.ClientOptions(token_in_plain_text=True), token="secret")


@pytest.mark.parametrize("address", ["127.0.0.1:50051", "localhost:50051", "[::1]:50051", "unix:/run/engram.sock"])
def test_on_the_machine_it_may(address: str) -> None:
    assert "secret" not in repr(engram.AsyncClient(address, token="secret").options)


def test_a_certificate_has_a_key() -> None:
    with pytest.raises(engram.InvalidInputError, match="both or neither"):
        engram.AsyncClient("localhost:1", cert_file="cert.pem")
