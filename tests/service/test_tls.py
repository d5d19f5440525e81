"""TLS: who is let in, certificates that change while the server runs, and a Redis that asks for a user, TLS and a certificate.

The Redis that tests have may be built without TLS, so a small TLS end stands before it; what the server speaks is the same. A cluster
tells the addresses of its nodes, so there nothing can stand before them: that test needs a Redis with TLS.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from redises import RedisCluster, speaks_tls
from wires import TlsEnd

import engram
from engram_models import LSTM, Hopfield, write_bundle

QUICK = ("--shipped-models", "false", "--batch-rows-max", "32", "--tokens-poll-s", "0.1")
SOON_S = 10.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models")
    write_bundle(path, "lstm", "1", LSTM(3, 4))
    write_bundle(path, "net", "1", Hopfield(16, "hebb"))
    return path


def credentials(ca: pathlib.Path, pair: tuple[pathlib.Path, pathlib.Path] | None = None) -> grpc.ChannelCredentials:
    cert, key = (path.read_bytes() for path in pair) if pair else (None, None)
    return grpc.ssl_channel_credentials(ca.read_bytes(), private_key=key, certificate_chain=cert)


def answers(server: Any, with_credentials: grpc.ChannelCredentials | None) -> bool:
    options = [("grpc.use_local_subchannel_pool", 1)]
    if with_credentials is None:
        channel = grpc.insecure_channel(server.address, options=options)
    else:
        channel = grpc.secure_channel(server.address, with_credentials, options=options)
    with channel:
        try:
            channel.unary_unary("/engram.v1.EngramService/GetServer")(b"", timeout=3)
        except grpc.RpcError:
            return False
    return True


def served_name(server: Any, ca: pathlib.Path) -> str:
    """Who the server says it is to a connection that is made now."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", server.port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as end,
    ):
        certificate: Any = end.getpeercert()
    return str(certificate["subject"][0][0][1])


def comes_to_serve(server: Any, ca: pathlib.Path, name: str) -> bool:
    """The native wire looks at the files a few times a second."""
    deadline = time.monotonic() + 5
    while served_name(server, ca) != name and time.monotonic() < deadline:
        time.sleep(0.05)
    return served_name(server, ca) == name


def test_tls_and_a_certificate_that_is_renewed(
    server_type: Any, models: pathlib.Path, certificates: Any, tmp_path: pathlib.Path
) -> None:
    ca, stranger = certificates.ca("ca"), certificates.ca("stranger")
    cert, key = tmp_path / "tls.pem", tmp_path / "tls.key"

    def install(name: str) -> None:
        for source, target in zip(certificates.issue(name), (cert, key), strict=True):
            shutil.copy(source, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    install("first")
    server = server_type(tmp_path, "--models", str(models), "--tls-cert", str(cert), "--tls-key", str(key), *QUICK)
    server.credentials = credentials(ca)
    with server:
        assert answers(server, credentials(ca))
        assert not answers(server, credentials(stranger)), "a client does not talk to a server of another CA"
        assert not answers(server, None), "nor the server in plain text"
        assert served_name(server, ca) == "first"
        with engram.Client(server.address, ca_file=str(ca)) as client:
            session = client.open("lstm", "long-lived")
            session.step(np.ones(3, np.float32))
            install("second")
            assert comes_to_serve(server, ca, "second")
            session.step(np.ones(3, np.float32))
            cert.write_text("nonsense")
            deadline = time.monotonic() + 5
            while "stay in force" not in server.log.read_text() and time.monotonic() < deadline:
                served_name(server, ca)
            assert served_name(server, ca) == "second", "what cannot be used changes nothing"
            cert.unlink()
            os.mkfifo(cert)
            deadline = time.monotonic() + 5
            while "a named pipe" not in server.log.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert served_name(server, ca) == "second", "nor what would never be read to its end"
            install("third")
            assert comes_to_serve(server, ca, "third")
            session.step(np.ones(3, np.float32))
            assert session.seq == 3, "no connection was lost over it"
        with (
            pytest.raises(engram.UnavailableError),
            engram.Client(server.address, engram.ClientOptions(connect_timeout_s=2.0), tls=True),
        ):
            pass
        assert "stay in force" in server.log.read_text()
        assert "a named pipe, not a regular file" in server.log.read_text()


@pytest.mark.promise(10)
def test_mtls_lets_in_whom_the_client_ca_has_signed(
    server_type: Any, models: pathlib.Path, certificates: Any, tmp_path: pathlib.Path
) -> None:
    ca, clients = certificates.ca("ca"), certificates.ca("clients")
    cert, key = certificates.issue("server")
    good, bad = certificates.issue("client", "clients"), certificates.issue("intruder", "stranger")
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(clients))
    server = server_type(tmp_path, "--models", str(models), *flags, *QUICK)
    server.credentials = credentials(ca, good)
    with server:
        assert answers(server, credentials(ca, good))
        assert not answers(server, credentials(ca)), "no certificate"
        assert not answers(server, credentials(ca, bad)), "one of another CA"
        with engram.Client(server.address, ca_file=str(ca), cert_file=str(good[0]), key_file=str(good[1])) as client:
            client.open("lstm").step(np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tls-cert", "{here}"), "tls_cert and tls_key: give both"),
        (("--tls-cert", "{here}", "--tls-key", "{here}"), "not a PEM certificate"),
        (("--tls-cert", "/none", "--tls-key", "{here}"), "no such file"),
        (("--tls-client-ca", "{here}"), "give tls_cert"),
        (("--redis-tls-ca", "{here}", "--redis-url", "redis://127.0.0.1:1"), "rediss://"),
    ],
)
def test_files_that_cannot_be_used_stop_the_start(flags: tuple[str, ...], words: str, tmp_path: pathlib.Path) -> None:
    given = [flag.replace("{here}", __file__) for flag in flags]
    done = subprocess.run(
        [sys.executable, "-m", "engram", "serve", "--data-dir", str(tmp_path), *given],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


# Redis


PASSWORD = "p@ss/wörd:42"
ESCAPED = "p%40ss%2Fw%C3%B6rd%3A42"
# As docs/security.md gives it.
ACL = "~engram:* resetchannels -@all +@read +@write +@scripting +@connection +wait -@dangerous +info +client|id +client|kill"


@pytest.fixture
def guarded_redis(start_redis: Callable[..., Any], certificates: Any) -> Iterator[tuple[Any, TlsEnd]]:
    """A Redis whose only user may do what docs/security.md says, behind TLS that asks for a certificate."""
    process = start_redis()
    process.client.execute_command("ACL", "SETUSER", "engram", "on", f">{PASSWORD}", *ACL.split())
    process.client.execute_command("ACL", "SETUSER", "default", "off")
    certificates.ca("ca")
    end = TlsEnd(process.socket, certificates.issue("redis"), certificates.ca("servers"))
    yield process, end
    end.close()


def test_redis_with_a_user_tls_and_a_certificate(
    server_type: Any, models: pathlib.Path, certificates: Any, guarded_redis: tuple[Any, TlsEnd], tmp_path: pathlib.Path
) -> None:
    _, end = guarded_redis
    cert, key = certificates.issue("engram-server", "servers")
    url = f"rediss://engram:{ESCAPED}@127.0.0.1:{end.port}/0"
    files = ("--redis-tls-ca", str(certificates.ca("ca")), "--redis-tls-cert", str(cert), "--redis-tls-key", str(key))
    flags = ("--models", str(models), "--redis-url", url, *files, "--log-level", "debug", *QUICK)
    with server_type(tmp_path, *flags) as server, engram.Client(server.address) as client:
        # All that the server asks of Redis, so that the user's rights are enough.
        session = client.open("lstm", "acl")
        for _ in range(3):
            session.step(np.ones(3, np.float32))
        volatile = client.open("lstm", durability="interval")
        volatile.step(np.ones(3, np.float32))
        session.fork("forked").close()
        assert client.sessions.get("acl").seq == 3
        assert {info.id for info in client.sessions.list()} == {"acl", volatile.id}
        client.sessions.import_(client.sessions.export("acl"), "imported")
        client.sessions.move("imported", "1")
        client.sessions.close("imported")
        memory = client.open("net", "memory")
        memory.store(np.where(np.eye(16)[:2] > 0, 1, -1), ["one", "two"])
        assert memory.recall(np.where(np.eye(16)[0] > 0, 1, -1)).label in ("one", "two", "")
        memory.forget(["one"])
        server.kill()
        server.start()
        assert session.step(np.ones(3, np.float32)).shape == (4,)
        text = server.log.read_text()
        assert PASSWORD not in text and ESCAPED not in text and "p@ss" not in text


def test_a_redis_that_refuses_says_so_without_the_password(
    models: pathlib.Path, certificates: Any, guarded_redis: tuple[Any, TlsEnd], tmp_path: pathlib.Path
) -> None:
    _, end = guarded_redis
    cert, key = certificates.issue("engram-server", "servers")
    ca = certificates.ca("ca")
    pair = ("--redis-tls-cert", str(cert), "--redis-tls-key", str(key))

    def serve(url: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "engram",
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--redis-url",
            url,
        ]
        return subprocess.run(
            [*command, "--models", str(models), *QUICK, *flags], capture_output=True, text=True, check=False, timeout=60
        )

    wrong = serve(f"rediss://engram:hunter2@127.0.0.1:{end.port}", "--redis-tls-ca", str(ca), *pair)
    assert wrong.returncode == 1 and "refuses the credentials" in wrong.stderr
    unescaped = serve("redis://engram:hunter2/hunter2@127.0.0.1:1")
    assert unescaped.returncode == 1 and "%XX" in unescaped.stderr
    assert "hunter2" not in wrong.stderr + unescaped.stderr + wrong.stdout + unescaped.stdout


def test_a_redis_of_another_ca_or_without_our_certificate_is_not_used(
    server_type: Any, models: pathlib.Path, certificates: Any, guarded_redis: tuple[Any, TlsEnd], tmp_path: pathlib.Path
) -> None:
    _, end = guarded_redis
    url = f"rediss://engram:{ESCAPED}@127.0.0.1:{end.port}/0"
    with server_type(
        tmp_path, "--models", str(models), "--redis-url", url, "--redis-tls-ca", str(certificates.ca("ca")), *QUICK
    ) as server:
        deadline = time.monotonic() + SOON_S
        while not any(
            "store takes no writes" in line["message"] for line in map(json.loads, server.log.read_text().splitlines())
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert end.refused
        with (
            engram.Client(server.address) as client,
            pytest.raises((engram.UnavailableError, engram.DeadlineExceededError)),
        ):
            client.open("lstm", timeout=1.0)


@pytest.fixture
def tls_cluster(tmp_path: pathlib.Path, certificates: Any) -> Iterator[RedisCluster]:
    """A Redis Cluster that speaks TLS alone, and asks for a certificate."""
    if not speaks_tls():
        pytest.skip("the Redis here is built without TLS; Debian's redis-server has it")
    cert, key = certificates.issue("redis")
    cluster = RedisCluster(
        tmp_path, "--tls-cluster", "yes", "--tls-replication", "yes", "--tls-cert-file", str(cert), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(certificates.ca("ca")), "--port", "0",
    )  # fmt: skip
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_a_cluster_that_speaks_tls_alone(
    server_type: Any, models: pathlib.Path, certificates: Any, tls_cluster: RedisCluster, tmp_path: pathlib.Path
) -> None:
    cert, key = certificates.issue("engram-server")
    files = ("--redis-tls-ca", str(certificates.ca("ca")), "--redis-tls-cert", str(cert), "--redis-tls-key", str(key))
    flags = ("--models", str(models), "--redis-url", tls_cluster.url, *files, *QUICK)
    X = np.ones((60, 3), np.float32)
    with server_type(tmp_path, *flags) as server, engram.Client(server.address) as client:
        sessions = client.open_many("lstm", len(X))
        client.step_many(sessions, X)
        assert all(process.client.dbsize() for process in tls_cluster.processes)
        server.kill()
        server.start()
        after = client.step_many(sessions, X)
        whole = client.open("lstm")
        whole.step(X[0])
        assert (after == whole.step(X[0])).all()
