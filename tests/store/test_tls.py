"""TLS to Redis: whom a line trusts and what it says of others, certificates that change, and peers that hang. What else commits go
through over TLS is in test_faults.py and test_acknowledgement.py.

The Redis is one that speaks TLS itself, where the one here is built with it, else a TLS end stands before it.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redises import RedisCluster, speaks_tls
from wires import TlsEnd

from engram_service.store import Store, StoreSettings, StoreUnavailableError, TlsFiles, Verdict
from engram_service.store.lines import NativeLine, PythonLine, line_of
from engram_service.store.tls import TlsConnection

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

MakeHolder = Callable[..., Any]
OpenStore = Callable[..., Store]
Pair = tuple[pathlib.Path, pathlib.Path]
OK = Verdict.OK


class TlsRedis:
    """A Redis over TLS, on the same port after a restart; its own certificate can be changed."""

    def __init__(self, start_redis: Any, port: int, pair: Pair, client_ca: pathlib.Path | None) -> None:
        self.port = port
        self._end: TlsEnd | None = None
        if speaks_tls():
            ca = client_ca or pair[0]
            self.process = start_redis(
                "--tls-port", str(port), "--tls-cert-file", str(pair[0]), "--tls-key-file", str(pair[1]), "--tls-ca-cert-file",
                str(ca), "--tls-auth-clients", "no" if client_ca is None else "yes",
            )  # fmt: skip
        else:
            self.process = start_redis()
            self._end = TlsEnd(self.process.socket, pair, client_ca)
            self.port = self._end.port

    def close(self) -> None:
        if self._end is not None:
            self._end.close()


@pytest.fixture
def tls_redis(start_redis: Any, free_port: Callable[[], int]) -> Iterator[Callable[..., TlsRedis]]:
    started: list[TlsRedis] = []

    def make(pair: Pair, client_ca: pathlib.Path | None = None) -> TlsRedis:
        started.append(TlsRedis(start_redis, free_port(), pair, client_ca))
        return started[-1]

    yield make
    for one in started:
        one.close()


def connected(port: int, host: str = "127.0.0.1", timeout_s: float = 5.0, **files: pathlib.Path) -> str:
    """What is said of a connection that a line makes; "" where there is nothing to say."""
    options: dict[str, Any] = {f"ssl_{name}": str(path) for name, path in files.items()}
    connection = TlsConnection(host=host, port=port, socket_timeout=timeout_s, protocol=2, **options)
    try:
        connection.connect()
        connection.send_command("PING")
        assert connection.read_response() == b"PONG"
    except redis.exceptions.RedisError as error:
        return str(error)
    finally:
        connection.disconnect()
    return ""


def native_line(store: Store) -> NativeLine:
    line = line_of(store._committers)
    assert isinstance(line, NativeLine)
    line.open()
    return line


def committed(owner: Any, line: NativeLine, seq: int) -> None:
    """By the line alone: nothing of it is left to the committers."""
    left: list[Any] = []
    committers = owner.store._committers
    real, committers.go_on = committers.go_on, left.append
    try:
        commit = owner.commit_by_line(line, seq)
        assert left == []
        assert commit.wait() == [OK] * len(owner.ids)
    finally:
        committers.go_on = real


def test_whom_a_line_trusts(tls_redis: Any, certificates: Any) -> None:
    ca, other = certificates.ca("ca"), certificates.ca("other")
    redis = tls_redis(certificates.issue("redis"))
    assert connected(redis.port, ca_certs=ca) == ""
    assert connected(redis.port, "localhost", ca_certs=ca) == ""
    both = ca.with_name("both.pem")
    both.write_text(other.read_text() + ca.read_text())
    assert connected(redis.port, ca_certs=both) == ""
    for files in ({"ca_certs": other}, {}):
        said = connected(redis.port, **files)
        assert "127.0.0.1" in said and "certificate verify failed: it is signed by no CA that is trusted here" in said


def test_the_systems_authorities_are_trusted_as_python_trusts_them(
    tls_redis: Any, certificates: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    redis = tls_redis(certificates.issue("redis"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca("ca")))
    assert connected(redis.port) == "" and connected(redis.port, ca_certs=certificates.ca("other")) == ""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert "no CA" in connected(redis.port)
    shutil.copy(certificates.ca("ca"), tmp_path / "5ed36f99.0")
    assert connected(redis.port) == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dates": ("20200101000000Z", "20200201000000Z")}, "certificate expired"),
        ({"dates": ("20900101000000Z", "20910101000000Z")}, "certificate not valid yet"),
        ({"good_for": "DNS:elsewhere"}, 'not valid for name "127.0.0.1"'),
        ({"good_for": "DNS:127.0.0.1"}, "not valid for name"),
    ],
)
def test_certificates_that_are_refused(tls_redis: Any, certificates: Any, fields: Any, words: str) -> None:
    redis = tls_redis(certificates.issue("wrong", **fields))
    said = connected(redis.port, ca_certs=certificates.ca("ca"))
    assert "certificate verify failed" in said and words in said


def signed_by_itself(directory: pathlib.Path) -> Pair:
    path, key = directory / "own.pem", directory / "own.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(path)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return path, key


def test_a_certificate_that_has_signed_itself_is_trusted_where_it_is_given(
    tls_redis: Any, certificates: Any, tmp_path: pathlib.Path
) -> None:
    pair = signed_by_itself(tmp_path)
    redis = tls_redis(pair)
    assert connected(redis.port, "localhost", ca_certs=pair[0]) == ""
    assert "not valid for name" in connected(redis.port, "127.0.0.1", ca_certs=pair[0])
    assert "not among those that are trusted" in connected(redis.port, "localhost", ca_certs=certificates.ca("ca"))
    assert "not among those that are trusted" in connected(redis.port, "localhost")
    (tmp_path / "other").mkdir()
    namesake = signed_by_itself(tmp_path / "other")  # of another key
    assert "certificate verify failed" in connected(redis.port, "localhost", ca_certs=namesake[0])


def test_a_certificate_that_is_given_is_not_trusted_for_longer_than_it_says(tls_redis: Any, certificates: Any) -> None:
    for dates, words in (
        (("20200101000000Z", "20200201000000Z"), "expired"),
        (("20900101000000Z", "20910101000000Z"), "not valid yet"),
    ):
        pair = certificates.issue("given", dates=dates)
        assert words in connected(tls_redis(pair).port, ca_certs=pair[0])


def test_a_redis_that_wants_a_certificate(tls_redis: Any, certificates: Any, tmp_path: pathlib.Path) -> None:
    clients, ca = certificates.ca("clients"), certificates.ca("ca")
    redis = tls_redis(certificates.issue("redis"), clients)
    (cert, key), wrong = certificates.issue("engram", "clients"), certificates.issue("intruder", "stranger")
    assert connected(redis.port, ca_certs=ca, certfile=cert, keyfile=key) == ""
    together = tmp_path / "together.pem"
    together.write_text(cert.read_text() + key.read_text())
    assert connected(redis.port, ca_certs=ca, certfile=together) == ""
    assert "CertificateRequired" in connected(redis.port, ca_certs=ca)
    said = connected(redis.port, ca_certs=ca, certfile=wrong[0], keyfile=wrong[1])
    assert "the other end of TLS refuses the connection" in said
    assert "certificate and key" in connected(redis.port, ca_certs=ca, certfile=cert, keyfile=wrong[1])
    assert f"{tmp_path}/none: No such file" in connected(redis.port, ca_certs=tmp_path / "none")
    assert "there is no certificate in it" in connected(redis.port, ca_certs=key)


def test_files_are_read_anew_for_each_connection(
    open_store: OpenStore,
    tls_redis: Any,
    certificates: Any,
    holder: MakeHolder,
    tmp_path: pathlib.Path,
    eventually: Any,
) -> None:
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "redis.pem", "redis.key"))

    def install(authority: str) -> None:
        shutil.copy(certificates.ca(authority), ca)
        for source, target in zip(certificates.issue("redis", authority), (cert, key), strict=True):
            shutil.copy(source, target)

    install("first")
    redis = tls_redis((cert, key))
    if redis._end is not None:
        pytest.skip("the Redis here is built without TLS")
    store = open_store(f"rediss://127.0.0.1:{redis.port}", tls=TlsFiles(ca=str(ca)))
    owner, line = holder(store, "a", "b").claim(), native_line(store)
    committed(owner, line, 1)
    install("second")
    redis.process.kill()
    redis.process.start()
    assert owner.commit_by_line(line, 2).wait() == [OK, OK], "by the committers, for the line is cut"
    owner.commit_by_line(line, 3).wait()
    eventually(lambda: line._ways[""].link.is_open)
    committed(owner, line, 4)
    assert owner.stored() == [4, 4]


def test_a_user_and_a_password(
    open_store: OpenStore, tls_redis: Any, certificates: Any, holder: MakeHolder, caplog: Any
) -> None:
    redis = tls_redis(certificates.issue("redis"))
    redis.process.client.execute_command("ACL", "SETUSER", "engram", "on", ">pass word", "~*", "&*", "+@all")
    redis.process.client.execute_command("ACL", "SETUSER", "default", "off")
    files = TlsFiles(ca=str(certificates.ca("ca")))
    store = open_store(f"rediss://engram:pass%20word@127.0.0.1:{redis.port}", tls=files)
    owner = holder(store, "a").claim()
    committed(owner, native_line(store), 1)
    assert "pass word" not in caplog.text


def test_a_paused_redis_in_the_middle_of_a_commit(
    open_store: OpenStore, tls_redis: Any, certificates: Any, holder: MakeHolder
) -> None:
    """More than any buffer on the way takes: it is sent in several rounds, as the descriptor says, and nothing waits for Redis."""
    redis = tls_redis(certificates.issue("redis"))
    store = open_store(f"rediss://127.0.0.1:{redis.port}", tls=TlsFiles(ca=str(certificates.ca("ca"))))
    from engram_service.store import RecordLayout

    layout = RecordLayout("0123456789abcdef" * 2, 3 << 20, 12)
    owner = holder(store, "a", "b", "c", "d", "e", "f", "g", "h", layout=layout).claim()
    line = native_line(store)
    redis.process.pause()
    try:
        commit, job = owner.begun(1)
        begun = time.monotonic()
        line.send(job)
        assert not line.ready(0.002) and not line.ready(0.0)
        assert time.monotonic() - begun < 0.3
        assert line.wants_write()
    finally:
        redis.process.go_on()
    import select

    poll = select.poll()
    while not line.ready(0.0):
        poll.register(line.waits_on(), select.POLLIN | (select.POLLOUT if line.wants_write() else 0))
        assert poll.poll(5000)
    line.finish()
    assert commit.wait() == [OK] * 8 and owner.stored() == [1] * 8


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port where connections are made, and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_handshake_that_hangs_is_given_up() -> None:
    with silent() as port:
        begun = time.monotonic()
        assert connected(port, timeout_s=0.3) == "Timeout connecting to server"
        assert 0.25 < time.monotonic() - begun < 2


def test_a_peer_that_trickles_its_handshake_is_given_up() -> None:
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            end, _ = listener.accept()
            with end, contextlib.suppress(OSError):
                for byte in b"\x16\x03\x03\x40\x00" + b"\x02\x00\x30\x00" * 10:
                    end.sendall(bytes([byte]))
                    time.sleep(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        begun = time.monotonic()
        assert connected(listener.getsockname()[1], timeout_s=0.5) == "Timeout connecting to server"
        assert time.monotonic() - begun < 2
        thread.join()


def test_a_peer_that_hangs_does_not_hold_the_loop(
    open_store: OpenStore, tls_redis: Any, certificates: Any, holder: MakeHolder, eventually: Any
) -> None:
    """A line whose connection is gone leaves commits to the committers until another one has been opened, not by itself."""
    redis = tls_redis(certificates.issue("redis"))
    store = open_store(f"rediss://127.0.0.1:{redis.port}", tls=TlsFiles(ca=str(certificates.ca("ca"))))
    owner, line = holder(store, "a").claim(), native_line(store)
    committed(owner, line, 1)
    redis.process.pause()
    try:
        commits = [owner.commit_by_line(line, 2, wait_s=0.3)]
        begun = time.monotonic()
        other = holder(store, "b")
        job = other.begun(1)[1]
        line.send(job)
        assert line.ready(0.0)
        line.finish()
        assert time.monotonic() - begun < 0.2
    finally:
        redis.process.go_on()
    assert commits[0].wait() == [OK]

    def back() -> bool:
        owner.commit_by_line(line, 3).wait()
        return line._ways[""].link.is_open

    eventually(back)
    committed(owner, line, 4)


def test_redis_killed_and_back(
    open_store: OpenStore, tls_redis: Any, certificates: Any, holder: MakeHolder, eventually: Any
) -> None:
    redis = tls_redis(certificates.issue("redis"))
    store = open_store(f"rediss://127.0.0.1:{redis.port}", tls=TlsFiles(ca=str(certificates.ca("ca"))))
    redis.process.client.config_set("appendfsync", "always")
    owner, line = holder(store, *(f"s{n}" for n in range(300))).claim(), native_line(store)
    committed(owner, line, 1)
    redis.process.kill()
    stuck = owner.commit_by_line(line, 2)
    time.sleep(0.3)
    assert not stuck.settled
    redis.process.start()
    assert stuck.wait() == [OK] * 300

    def back() -> bool:
        owner.commit_by_line(line, 3).wait()
        return line._ways[""].link.is_open

    eventually(back)
    committed(owner, line, 4)
    assert owner.stored() == [4] * 300


def test_a_certificate_that_python_takes_and_the_extension_does_not_is_told_once(
    open_store: OpenStore, tls_redis: Any, certificates: Any, holder: MakeHolder, eventually: Any, caplog: Any
) -> None:
    """Commits go by the committers, as they do where the event loop has no way of its own."""
    cert, key = certificates.issue("redis", good_for="email:redis@example.org")
    certificates._openssl("req", "-new", "-key", key.name, "-out", "cn.csr", "-subj", "/CN=localhost")
    certificates._openssl("x509", "-req", "-in", "cn.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                          "-out", cert.name)  # fmt: skip
    redis = tls_redis((cert, key))
    store = open_store(f"rediss://localhost:{redis.port}", tls=TlsFiles(ca=str(certificates.ca("ca"))))
    owner, line = holder(store, "a").claim(), native_line(store)
    for seq in range(1, 6):
        assert owner.commit_by_line(line, seq).wait() == [OK]
    eventually(lambda: "event loop" in caplog.text)
    assert caplog.text.count("event loop") == 1 and "certificate verify failed" in caplog.text


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("", NativeLine),
        ("?ssl_ca_certs=/tmp/ca.pem&ssl_certfile=/a&ssl_keyfile=/b&socket_keepalive=true", NativeLine),
        ("?ssl_cert_reqs=required&ssl_check_hostname=True", NativeLine),
        ("?ssl_cert_reqs=none", PythonLine),
        ("?ssl_check_hostname=False", PythonLine),
        ("?ssl_ciphers=DEFAULT", PythonLine),
        ("?ssl_ca_path=/etc/ssl", PythonLine),
    ],
)
@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
def test_what_a_url_asks_of_tls_decides_whose_it_is(scheme: str, asked: str, kind: type) -> None:
    committers: Any = SimpleNamespace(settings=StoreSettings(f"{scheme}://localhost:1{asked}"))
    assert type(line_of(committers)) is kind


def test_cluster_nodes(
    open_store: OpenStore, certificates: Any, holder: MakeHolder, tmp_path: pathlib.Path, eventually: Any
) -> None:
    if not speaks_tls():
        pytest.skip("the Redis here is built without TLS")
    cert, key = certificates.issue("redis")
    ca = certificates.ca("ca")
    cluster = RedisCluster(
        tmp_path, "--tls-cluster", "yes", "--tls-replication", "yes", "--tls-cert-file", str(cert), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(ca), "--port", "0",
    )  # fmt: skip
    try:
        cluster.start()
        mine = certificates.issue("engram")
        store = open_store(cluster.url, tls=TlsFiles(str(ca), str(mine[0]), str(mine[1])))
        owner, line = holder(store, *(f"s{n}" for n in range(60))).claim(), native_line(store)
        for seq in range(1, 6):
            committed(owner, line, seq)
        assert len(line._ways) == 3 and owner.stored() == [5] * 60
        cluster.processes[1].kill()
        stuck = owner.commit_by_line(line, 6)
        cluster.processes[1].start()
        assert stuck.wait() == [OK] * 60 and owner.stored() == [6] * 60
    finally:
        cluster.stop()


def test_a_self_made_certificate_and_whole_batches(
    open_store: OpenStore, tls_redis: Any, holder: MakeHolder, troubles: Any, tmp_path: pathlib.Path, certificates: Any
) -> None:
    pair = signed_by_itself(tmp_path)
    redis = tls_redis(pair)
    store = open_store(f"rediss://localhost:{redis.port}?ssl_ca_certs={pair[0]}")
    owner = holder(store, *(f"s{n}" for n in range(300))).claim()
    line = native_line(store)
    for seq in range(1, 6):
        assert owner.commit(seq) == [OK] * 300
        committed(owner, line, seq + 1)
    assert owner.stored() == [6] * 300
    holder(store, "s7").claim()
    assert [verdict is OK for verdict in owner.commit(7)] == [n != 7 for n in range(300)]
    distrustful = open_store(f"rediss://localhost:{redis.port}", start=False)
    told = troubles(distrustful)
    distrustful.start()
    assert "certificate" in told.told[0].lower()
    with pytest.raises(StoreUnavailableError, match=r"(?i)certificate"):
        distrustful.describe("s1")
