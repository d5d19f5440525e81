"""gRPC's interop cases, and what they leave out, with gRPC's Python client (its C core) against the bare wire."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from interop.process import WAIT_S, InteropServer

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

SERVICE = "/grpc.testing.TestService/"
ECHO = "x-grpc-test-echo"
LARGE_REQUEST, LARGE_RESPONSE = 271828, 314159
TURNS = ((31415, 27182), (9, 8), (2653, 1828), (58979, 45904))  # sizes of answer and request of gRPC's ping_pong
pb: Any = grpc.protos("interop/testing.proto")


class Client:
    """The stubs of grpc.testing.TestService, and one of a method that is not there."""

    def __init__(self, channel: grpc.Channel) -> None:
        def method(kind: Any, name: str, response: Any, service: str = SERVICE) -> Any:
            return kind(service + name, lambda message: message.SerializeToString(), response.FromString)

        self.empty = method(channel.unary_unary, "EmptyCall", pb.Empty)
        self.unary = method(channel.unary_unary, "UnaryCall", pb.SimpleResponse)
        self.input = method(channel.stream_unary, "StreamingInputCall", pb.StreamingInputCallResponse)
        self.output = method(channel.unary_stream, "StreamingOutputCall", pb.StreamingOutputCallResponse)
        self.duplex = method(channel.stream_stream, "FullDuplexCall", pb.StreamingOutputCallResponse)
        self.no_method = method(channel.unary_unary, "UnimplementedCall", pb.Empty)
        self.no_service = method(channel.unary_unary, "UnimplementedCall", pb.Empty, "/grpc.testing.Unimplemented/")


@contextlib.contextmanager
def connected(server: InteropServer, **options: int) -> Iterator[Client]:
    pairs = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{name}", value) for name, value in options.items())]
    with grpc.insecure_channel(server.address, options=pairs) as channel:
        yield Client(channel)


@pytest.fixture
def client(interop_server: InteropServer) -> Iterator[Client]:
    with connected(interop_server) as made:
        yield made


def turn(answer: int, nbytes: int = 0) -> Any:
    return pb.StreamingOutputCallRequest(response_parameters=[{"size": answer}], payload={"body": bytes(nbytes)})


def simple(response: int, nbytes: int = 0, **more: Any) -> Any:
    return pb.SimpleRequest(response_size=response, payload={"body": bytes(nbytes)}, **more)


def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


# The cases of gRPC's interop-test-descriptions


def test_empty_unary(client: Client) -> None:
    assert client.empty(pb.Empty(), timeout=WAIT_S) == pb.Empty()


def test_large_unary(client: Client) -> None:
    response = client.unary(simple(LARGE_RESPONSE, LARGE_REQUEST), timeout=WAIT_S)
    assert len(response.payload.body) == LARGE_RESPONSE


def test_client_compressed_unary(client: Client) -> None:
    """Without its probe: the wire does not tell whether a message came compressed, so none is refused for it."""
    for compression in (grpc.Compression.Gzip, grpc.Compression.NoCompression):
        request = simple(LARGE_RESPONSE, LARGE_REQUEST)
        assert len(client.unary(request, timeout=WAIT_S, compression=compression).payload.body) == LARGE_RESPONSE
    code, details = status_of(lambda: client.unary(simple(8), timeout=WAIT_S, compression=grpc.Compression.Deflate))
    assert (code, "gzip" in details) == (grpc.StatusCode.UNIMPLEMENTED, True), details


def test_client_streaming(client: Client) -> None:
    requests = [pb.StreamingInputCallRequest(payload={"body": bytes(nbytes)}) for nbytes in (27182, 8, 1828, 45904)]
    assert client.input(iter(requests), timeout=WAIT_S).aggregated_payload_size == 74922


def test_client_compressed_streaming(client: Client) -> None:
    requests = [pb.StreamingInputCallRequest(payload={"body": bytes(nbytes)}) for nbytes in (27182, 45904)]
    response = client.input(iter(requests), timeout=WAIT_S, compression=grpc.Compression.Gzip)
    assert response.aggregated_payload_size == 73086


def test_server_streaming(client: Client) -> None:
    request = pb.StreamingOutputCallRequest(response_parameters=[{"size": size} for size, _ in TURNS])
    assert [len(one.payload.body) for one in client.output(request, timeout=WAIT_S)] == [size for size, _ in TURNS]


def test_ping_pong(client: Client) -> None:
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = client.duplex(iter(requests.get, None), timeout=WAIT_S)
    for answer, nbytes in TURNS:
        requests.put(turn(answer, nbytes))
        assert len(next(call).payload.body) == answer
    requests.put(None)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_empty_stream(client: Client) -> None:
    call = client.duplex(iter([]), timeout=WAIT_S)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_cancel_after_begin(interop_server: InteropServer, client: Client) -> None:
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = client.input.future(iter(requests.get, None))
    interop_server.until(lambda counters: counters["calls"] == 1)
    call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED
    interop_server.until(lambda counters: counters["calls"] == 0)
    requests.put(None)


def test_cancel_after_first_response(interop_server: InteropServer, client: Client) -> None:
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = client.duplex(iter(requests.get, None), timeout=WAIT_S)
    requests.put(turn(*TURNS[0]))
    assert len(next(call).payload.body) == TURNS[0][0]
    call.cancel()
    assert status_of(lambda: next(call))[0] is grpc.StatusCode.CANCELLED
    interop_server.until(lambda counters: counters["calls"] == 0)
    requests.put(None)


@pytest.mark.parametrize("timeout_s", [0.001, 0.2])
def test_timeout_on_sleeping_server(interop_server: InteropServer, client: Client, timeout_s: float) -> None:
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    requests.put(pb.StreamingOutputCallRequest(payload={"body": bytes(27182)}))  # which asks for no answer
    call = client.duplex(iter(requests.get, None), timeout=timeout_s)
    assert status_of(lambda: next(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    interop_server.until(lambda counters: counters["calls"] == 0)
    requests.put(None)


@pytest.mark.parametrize(
    "words", ["test status message", "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"]
)
def test_status_code_and_message_and_special_status_message(client: Client, words: str) -> None:
    status = pb.EchoStatus(code=2, message=words)
    assert status_of(lambda: client.unary(simple(0, response_status=status), timeout=WAIT_S)) == (
        grpc.StatusCode.UNKNOWN,
        words,
    )
    request = pb.StreamingOutputCallRequest(response_status=status)
    assert status_of(lambda: next(client.duplex(iter([request]), timeout=WAIT_S))) == (grpc.StatusCode.UNKNOWN, words)


def test_custom_metadata_comes_whole(client: Client) -> None:
    """What of custom_metadata the wire can do: it sends no metadata of a call's own, so what came is in the answer's body."""
    for size in (20, 5_000, 14_000):
        sent = "v" * size
        response = client.unary(simple(0), timeout=WAIT_S, metadata=[(ECHO, sent), ("x-other-bin", b"\xab\xab\xab")])
        assert response.payload.body.decode() == sent


def test_unimplemented_method_and_service(client: Client) -> None:
    for call in (client.no_method, client.no_service):
        assert status_of(lambda call=call: call(pb.Empty(), timeout=WAIT_S))[0] is grpc.StatusCode.UNIMPLEMENTED


# Beyond them


def test_too_much_metadata_costs_the_call(interop_server: InteropServer, client: Client) -> None:
    """Far too much, the connection: whose header never ends is not read to its end."""
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    held = client.duplex(iter(requests.get, None), timeout=WAIT_S)
    interop_server.until(lambda counters: counters["calls"] == 1)
    for size, beside in ((17_000, True), (30_000, True), (1_000_000, False)):
        with pytest.raises(grpc.RpcError):
            client.unary(simple(0), timeout=WAIT_S, metadata=[(ECHO, "v" * size)])
        assert len(client.unary(simple(7), timeout=WAIT_S, wait_for_ready=True).payload.body) == 7
        assert held.is_active() is beside, "a call on the same connection"
    requests.put(None)


def test_a_server_answers_a_clients_pings(interop_server: InteropServer) -> None:
    """Ten of them and more, on a connection with nothing else; a client that got no answer would give the connection up."""
    options = {
        "keepalive_time_ms": 100,
        "keepalive_timeout_ms": 1000,
        "keepalive_permit_without_calls": 1,
        "http2.max_pings_without_data": 0,
    }
    with connected(interop_server, **options) as client:
        assert len(client.unary(simple(1), timeout=WAIT_S).payload.body) == 1
        before = interop_server.counters()["accepted"]
        time.sleep(1.5)
        assert len(client.unary(simple(1), timeout=WAIT_S).payload.body) == 1
        assert interop_server.counters()["accepted"] == before, "it is the same connection"


def test_a_server_asks_whether_its_client_is_there() -> None:
    """Its own pings do not disturb a client that waits, and idle time does not count while there is a call."""
    with InteropServer(keepalive_s=0.1, idle_s=0.5) as server, connected(server) as client:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        call = client.duplex(iter(requests.get, None), timeout=WAIT_S)
        for _ in range(2):
            requests.put(turn(10))
            assert len(next(call).payload.body) == 10
            time.sleep(0.8)
        assert server.counters()["accepted"] == 1
        requests.put(None)
        assert list(call) == []


def test_clients_do_not_notice_that_their_server_is_replaced() -> None:
    """GOAWAY: calls that are there go on, the next ones connect anew, and none is lost."""
    with InteropServer() as server, connected(server) as client:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stream = client.duplex(iter(requests.get, None), timeout=60)
        servers: list[str] = []
        failures: list[str] = []
        ended = threading.Event()

        def call() -> None:
            while not ended.is_set():
                try:
                    servers.append(client.unary(simple(0, fill_server_id=True), timeout=WAIT_S).server_id)
                except grpc.RpcError as error:
                    failures.append(str(error))

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for replacements in range(1, 4):
            requests.put(turn(1000))
            assert len(next(stream).payload.body) == 1000
            server.tell("replace")
            deadline = time.monotonic() + WAIT_S
            while f"wire {replacements}" not in servers[-50:] and time.monotonic() < deadline:
                time.sleep(0.01)
        requests.put(turn(2000))
        assert len(next(stream).payload.body) == 2000
        ended.set()
        for caller in callers:
            caller.join()
        requests.put(None)
        assert list(stream) == []
        assert (stream.code(), failures) == (grpc.StatusCode.OK, [])
        assert set(servers) == {f"wire {k}" for k in range(4)}
        server.until(lambda counters: counters["connections"] == 1)


def test_a_drained_server_ends_what_it_has_and_takes_no_more() -> None:
    with InteropServer() as server, connected(server) as client:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stream = client.duplex(iter(requests.get, None), timeout=WAIT_S)
        requests.put(turn(10))
        next(stream)
        server.tell("drain")
        server.until(lambda counters: counters["connections"] == 1)
        requests.put(turn(20))
        assert len(next(stream).payload.body) == 20
        code, _ = status_of(lambda: client.unary(simple(0), timeout=1))
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        requests.put(None)
        assert list(stream) == []
        server.until(lambda counters: counters["connections"] == 0)
