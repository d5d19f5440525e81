"""What a caller whom nobody knows can have the server do, through its wire: little memory, little work, nothing to others."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from http2 import Connection, headers, message

from engram.v1 import session_pb2, stream_pb2

ServerProcess = Any
Connect = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("server_wire")  # servers are asked for by their names

TOKEN = "engram_" + "5" * 40
BEARER = ("authorization", f"Bearer {TOKEN}")
SERVICE = "/engram.v1.EngramService/"
HEALTH = "/grpc.health.v1.Health/Check"
UNPACKED = 60 << 20
GROWTH_MAX = 120 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from engram_models import shipped_models_dir

    path = tmp_path_factory.mktemp("models")
    (path / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    return path


@pytest.fixture(scope="module")
def guarded(
    server_type: Any, models: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that wants tokens."""
    directory = tmp_path_factory.mktemp("guarded")
    tokens = directory / "tokens.toml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    rights = '["read", "step", "manage", "operate"]'
    tokens.write_text(f'[tokens.one]\ntenant = "acme"\nrights = {rights}\nsha256 = "{digest}"\n')
    with server_type(directory, "--models", str(models), "--tokens-file", str(tokens)) as server:
        yield server


@pytest.fixture(scope="module")
def open_server(
    server_type: Any, models: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """One without."""
    with server_type(tmp_path_factory.mktemp("open"), "--models", str(models)) as server:
        yield server


@pytest.fixture
def connection() -> Iterator[Callable[[ServerProcess], Connection]]:
    made: list[Connection] = []

    def make(server: ServerProcess) -> Connection:
        made.append(Connection(server.port))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Memory:
    """The most that a server has while the context lasts, beyond what it had before."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._before = self._most = server.resident_nbytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._server.resident_nbytes())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self._most - self._before


def packed(window_bits: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window_bits)
    return packer.compress(bytes(UNPACKED)) + packer.flush()


GZIP, DEFLATE = packed(31), packed(15)


@pytest.mark.parametrize("which", ["guarded", "open_server"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "snappy", "identity", ""])
def test_no_compressed_message_is_unpacked(
    which: str, encoding: str, request: pytest.FixtureRequest, connection: Callable[..., Connection]
) -> None:
    """Whoever sends it, with a true header or a false one, in a unary call or a stream: not even one that is known."""
    server = request.getfixturevalue(which)
    more = [BEARER] if which == "guarded" else []
    more += [("grpc-encoding", encoding)] if encoding else []
    data = message(DEFLATE if encoding == "deflate" else GZIP, compressed=True)
    methods = ("GetServer", "Stream", "Recall") * 4
    peers = [connection(server) for _ in methods]  # a message is as large as a connection's window
    with Memory(server) as memory:
        calls = [
            (peer, peer.call(headers(SERVICE + method, *more), data))
            for peer, method in zip(peers, methods, strict=True)
        ]
        assert all(peer.wait(call) for peer, call in calls), "each has its answer"
    assert memory.grown < GROWTH_MAX
    if encoding in ("gzip", "deflate"):
        # The native wire, whose headers are compressed, unpacks gzip of callers that it knows, as far as messages may be large.
        native = "native wire" in server.log.read_text()
        assert native or all(b"grpc-status\x0212" in peer.text for peer in peers), "UNIMPLEMENTED"


def test_a_client_that_compresses_is_told_so(open_server: ServerProcess) -> None:
    with open_server.channel() as channel:
        ask = channel.unary_unary(f"{SERVICE}GetServer")
        for kind in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            with pytest.raises(grpc.RpcError) as caught:
                ask(session_pb2.StepRequest(inputs=[0.0] * 10_000).SerializeToString(), compression=kind, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert "ompression" in caught.value.details()
        ask(b"", timeout=20)


def test_nothing_of_a_call_is_read_before_its_caller_is_known(guarded: ServerProcess) -> None:
    data = bytes(30 << 20)
    with Memory(guarded) as memory, guarded.channel() as channel:
        calls = [
            channel.stream_stream(SERVICE + method)(iter([data]), timeout=30)
            for method in ("ImportSession", "Stream", "Step", "Nothing") * 3
        ]
        codes = {call.code() for call in calls}
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}
    assert memory.grown < GROWTH_MAX


def test_little_is_read_of_who_asks_for_health(guarded: ServerProcess, connection: Callable[..., Connection]) -> None:
    """Health is open to all: huge requests to it do not stay, and nobody else's question waits for those that never end."""
    peer = connection(guarded)
    with Memory(guarded) as memory, guarded.channel() as channel:
        ask = channel.unary_unary(HEALTH)
        huge = [ask.future(bytes(30 << 20), timeout=30) for _ in range(12)]
        stalled = [peer.call(headers(HEALTH), message(bytes(1000))[:100], end=False) for _ in range(12)]
        with guarded.channel() as other:
            asked = health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert asked.status == health_pb2.HealthCheckResponse.SERVING
        assert all(peer.wait(call) for call in stalled), "what does not come is not waited for"
        for call in huge:
            assert call.code() in (
                grpc.StatusCode.OK,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
    assert memory.grown < 2 * GROWTH_MAX, "one at a time"


def test_health_tells_what_there_is(guarded: ServerProcess) -> None:
    with guarded.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving, unknown = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckRequest(service="nothing")
        for name in ("", "engram.v1.EngramService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20).status == serving
        deadline = time.monotonic() + 10.0  # what huge requests of other tests were answered is over by then
        while (code := _code_of(lambda: health.Check(unknown, timeout=20))) is grpc.StatusCode.OK:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert code is grpc.StatusCode.NOT_FOUND
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=20) for name in ("", "nothing")]
        assert [next(watch).status for watch in watches] == [serving, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
        for watch in watches:
            watch.cancel()


def _code_of(work: Callable[[], Any]) -> grpc.StatusCode:
    try:
        work()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


def test_headers_are_bounded(guarded: ServerProcess, connection: Callable[..., Connection]) -> None:
    with guarded.channel() as channel:
        ask = channel.unary_unary(f"{SERVICE}GetServer")
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"", metadata=[BEARER, ("x-large", "x" * (1 << 20))], timeout=20)
        # UNAVAILABLE: the native wire ends the connection of whoever sends so many bytes of headers.
        codes = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        assert caught.value.code() in codes
        ask(b"", metadata=[BEARER], timeout=20)
    peer = connection(guarded)
    with Memory(guarded) as memory:
        for _ in range(50):
            peer.call(headers(SERVICE + "GetServer", *((f"x-{n}", "x" * 12_000) for n in range(1))))
    assert memory.grown < GROWTH_MAX


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("which", ["guarded", "open_server"])
def test_a_flood_of_calls_does_not_become_work(
    which: str, reset: bool, request: pytest.FixtureRequest, connection: Callable[..., Connection]
) -> None:
    """Thousands of calls that are reset at once, or that nobody may make: few of them reach a handler, the others are refused by
    gRPC, or the connection is ended. Others are served meanwhile."""
    server = request.getfixturevalue(which)
    before = _looked_at(server)
    peers = [connection(server) for _ in range(3)]
    block = headers(SERVICE + "Stream")
    calls = 3000
    began = time.monotonic()
    for _ in range(calls // 10):
        for peer in peers:
            with contextlib.suppress(ConnectionError):  # the native wire has had enough of it
                for _ in range(10):
                    peer.call(block, end=False, reset=reset)
    with server.channel() as channel:
        metadata = [BEARER] if which == "guarded" else []
        channel.unary_unary(f"{SERVICE}GetServer")(b"", metadata=metadata, timeout=20)
    # Of calls that are looked at before they are reset, the native wire lets 200 through, and 200 a second.
    slow = 3 * 200 * (1 + time.monotonic() - began) if reset else 0
    assert _looked_at(server) - before < max(3 * calls / 5, slow), "of nine thousand"
    if not all(peer.closed for peer in peers):
        assert peers[0].wait(2 * calls - 1)
        assert all(len(peer.refused) > calls / 2 for peer in peers)
        assert sum(map(len, (peer.refused for peer in peers))) < 3 * calls, "though some are"


def _looked_at(server: ServerProcess) -> int:
    """Calls that Python has looked at: what the native wire itself refuses counts as denied too."""
    series = server.series()
    denied = sum(count for name, count in series.items() if name.startswith("engram_calls_denied_total"))
    denied -= sum(series.get(f'engram_wire_refused_total{{reason="token_{why}"}}', 0) for why in ("missing", "unknown"))
    return int(denied) + server.log.read_text().count("stream opened")


def test_few_calls_without_a_token_are_answered_at_once(guarded: ServerProcess) -> None:
    """What a client does whose token has just expired."""
    deadline = time.monotonic() + 10.0  # floods of other tests are over by then
    with guarded.channel() as channel:
        ask = channel.unary_unary(f"{SERVICE}GetServer")
        while True:
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                ask(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            if time.monotonic() - begun < 0.5:
                return
            assert time.monotonic() < deadline


def test_a_connection_has_so_many_calls_and_waits_with_more(
    server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    with server_with("--connection-calls-max", "3", "--calls-max", "2") as server:
        raw = connect(server)
        raw.open("held")
        wait = session_pb2.GetSessionStateRequest(session_id="held", min_seq=9).SerializeToString()
        with server.channel() as first, server.channel() as second:
            waiting = [
                one.unary_unary(f"{SERVICE}GetSessionState").future(wait, timeout=20) for one in (first, first, second)
            ]
            refused = next(call for call in _ended(waiting))
            status = rpc_status.from_call(refused)
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and len(status.details) == 2, (
                "it says when to retry"
            )
            assert sum(not call.done() for call in waiting) == 2
            assert len(raw.step(0, 1)) == 40, "a stream is none of these calls"
            for call in waiting:
                call.cancel()


def _ended(calls: list[Any]) -> Iterator[Any]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        yield from (call for call in calls if call.done())
        time.sleep(0.01)


def test_a_drain_ends_though_calls_are_kept_back_and_watched(
    server_with: Callable[..., ServerProcess], connection: Callable[..., Connection]
) -> None:
    with server_with() as server:
        peer = connection(server)
        watch = health_pb2.HealthCheckRequest().SerializeToString()
        for _ in range(5):
            peer.call(headers("/grpc.health.v1.Health/Watch"), message(watch))
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                peer.call(headers(SERVICE + "Stream"), end=False, reset=True)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 10


def test_a_frame_beyond_all_limits_is_resource_exhausted(open_server: ServerProcess, connect: Connect) -> None:
    raw = connect(open_server)
    raw.send(steps=stream_pb2.StepsFrame(inputs=bytes(33 << 20)))
    with pytest.raises(grpc.RpcError) as caught:
        raw.next()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
