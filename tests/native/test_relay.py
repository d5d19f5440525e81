"""Calls that the native wire relays to a server of grpc.aio behind it: what gets there, what comes back, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from wire_loop import WAIT_S, Loop, channel, code_of, stream

LARGE = 4_000_000


class Behind(threading.Thread):
    """A server of grpc.aio with methods that echo, wait, fail and tell what they see."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.metadata: list[dict[str, str | bytes]] = []
        self.peers: list[str] = []
        self.left: list[float | None] = []  # time of the calls
        self.cancelled: list[str] = []
        self.received = 0  # messages of Both
        self.ended = 0  # calls of Both
        self._serving = threading.Event()
        self.start()
        assert self._serving.wait(WAIT_S)

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._server = server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", 2 * LARGE), ("grpc.max_send_message_length", 2 * LARGE)]
        )
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
            "Wait": grpc.unary_unary_rpc_method_handler(self._wait),
            "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "Count": grpc.unary_stream_rpc_method_handler(self._count),
            "Both": grpc.stream_stream_rpc_method_handler(self._both),
            "First": grpc.stream_stream_rpc_method_handler(self._first),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Behind", handlers),))
        service = health.aio.HealthServicer()
        await service.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        reflection.enable_server_reflection(["grpc.health.v1.Health", reflection.SERVICE_NAME], server)
        server.add_insecure_port(f"unix:{self.path}")
        await server.start()
        self._health = service
        self._serving.set()
        await self._ending.wait()
        await server.stop(0)

    def set_health(self, status: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._health.set("", status), self._loop).result(WAIT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self.join()

    def _see(self, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.left.append(context.time_remaining())

    async def _echo(self, request: bytes, context: Any) -> bytes:
        self._see(context)
        context.set_trailing_metadata((("behind", "trailing"),))
        await context.send_initial_metadata((("behind", "initial"),))
        return request

    async def _wait(self, request: bytes, context: Any) -> bytes:
        self._see(context)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.append(request.decode())
            raise
        return b""

    async def _fail(self, request: bytes, context: Any) -> bytes:
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason="NO", domain="test", metadata={"x": "y" * 1000}))
        status = status_pb2.Status(code=9, message="100 % wrong: naïve\n", details=[info])
        await context.abort_with_status(rpc_status.to_status(status))
        return b""

    async def _count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        count, nbytes = map(int, request.split())
        try:
            for number in range(count):
                self.received = number
                yield bytes([number % 256]) * nbytes
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append("Count")
            raise

    async def _both(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self._see(context)
        try:
            async for request in requests:  # ends as well where the call is cancelled
                self.received += 1
                yield request
        finally:
            self.ended += 1

    async def _first(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answers the first message, and reads no more."""
        async for request in requests:
            yield request
            break
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "one is enough")


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Behind]:
    made = Behind(tmp_path / "behind")
    yield made
    made.close()


@pytest.fixture
def relays(loops: Callable[..., Loop], behind: Behind) -> Callable[..., Loop]:
    def make(*arguments: Any, **options: Any) -> Loop:
        return loops(*arguments, **{"relay": str(behind.path), **options})

    return make


def call(made: grpc.Channel, method: str, data: bytes = b"", **more: Any) -> bytes:
    return bytes(made.unary_unary(f"/test.Behind/{method}")(data, **{"timeout": WAIT_S, **more}))


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


# What gets there, and what comes back


def test_calls_of_every_kind_are_answered_by_the_server_behind(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays()
    with channel(loop) as made:
        response, done = made.unary_unary("/test.Behind/Echo").with_call(
            b"hello", metadata=[("x", "y"), ("z-bin", b"\0\xff")], timeout=WAIT_S
        )
        assert response == b"hello"
        assert dict(done.initial_metadata())["behind"] == "initial"
        assert dict(done.trailing_metadata())["behind"] == "trailing"
        seen = behind.metadata[0]
        assert (seen["x"], seen["z-bin"]) == ("y", b"\0\xff")
        assert behind.left[0] is not None and 0 < behind.left[0] <= WAIT_S
        assert list(made.unary_stream("/test.Behind/Count")(b"300 10", timeout=WAIT_S)) == [
            bytes([number % 256]) * 10 for number in range(300)
        ]
        sent = [bytes([k]) * k for k in range(200)]
        assert list(made.stream_stream("/test.Behind/Both")(iter(sent), timeout=WAIT_S)) == sent
        assert code_of(lambda: call(made, "Nothing"))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert loop.events == [], "Python hears nothing of them"
    counters = loop.wire.counters()
    assert (counters["relayed"], counters["relayed_ever"]) == (0, 4)


def test_reflection_and_health_are_answered(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays()
    with channel(loop) as made:
        found = ProtoReflectionDescriptorDatabase(made)
        assert "grpc.health.v1.Health" in list(found.get_services())
        assert found.FindFileContainingSymbol("grpc.health.v1.Health").package == "grpc.health.v1"
        stub = health_pb2_grpc.HealthStub(made)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        behind.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    until(lambda: loop.wire.counters()["relayed"] == 0)


def test_errors_come_with_their_details(relays: Callable[..., Loop]) -> None:
    with channel(relays()) as made, pytest.raises(grpc.RpcError) as caught:
        call(made, "Fail")
    error: Any = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "100 % wrong: naïve\n")
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    assert (info.reason, info.metadata["x"]) == ("NO", "y" * 1000)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_refused(relays: Callable[..., Loop], compression: Any) -> None:
    """Whoever is behind would unpack them without a limit of the wire's."""
    with channel(relays()) as made:
        with pytest.raises(grpc.RpcError) as caught:
            call(made, "Echo", bytes(1000), compression=compression)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert call(made, "Echo", b"plain") == b"plain"


def test_an_answer_before_the_end_of_the_question_is_whole(relays: Callable[..., Loop]) -> None:
    def requests() -> Iterator[bytes]:
        yield b"one"
        time.sleep(2)
        yield b"two"

    with channel(relays()) as made:
        responses = made.stream_stream("/test.Behind/First")(requests(), timeout=WAIT_S)
        assert next(responses) == b"one"
        assert code_of(lambda: next(responses)) == (grpc.StatusCode.OUT_OF_RANGE, "one is enough")


@pytest.mark.promise(10)
def test_the_server_behind_knows_who_calls_and_no_client_can_say_it(
    relays: Callable[..., Loop], behind: Behind
) -> None:
    loop = relays()
    names = ("engram-identity", "engram-peer", "engram-tls")
    forged = [(name, "forged") for name in (*names, *names)]
    with channel(loop) as made:
        call(made, "Echo", metadata=[*forged, ("authorization", "Bearer one")])
        seen = behind.metadata[-1]
        assert {"engram-identity", "engram-tls", "authorization"}.isdisjoint(seen), "there is no table, and no TLS"
        assert str(seen["engram-peer"]).startswith("ipv4:127.0.0.1:")
        loop.wire.set_tokens({digest("one"): 7})
        call(made, "Echo", metadata=[*forged, ("authorization", "Bearer one")])
        seen = behind.metadata[-1]
        assert seen["engram-identity"] == "7"
        assert {"engram-tls", "authorization"}.isdisjoint(seen)


def test_tls_is_told(relays: Callable[..., Loop], behind: Behind, certificates: Any) -> None:
    loop = relays()
    ca, (server, key) = certificates.ca("ca"), certificates.issue("localhost")
    loop.wire.set_tls(server.read_bytes(), key.read_bytes())
    address = loop.address.replace("127.0.0.1", "localhost")
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes())) as made:
        call(made, "Echo", metadata=[("engram-tls", "forged")])
    assert behind.metadata[-1]["engram-tls"] == "TLSv1.3"


@pytest.mark.parametrize("kind", ["unix", "ipv6"])
def test_peers_are_spelled_as_grpc_does(relays: Callable[..., Loop], behind: Behind, tmp_path: Path, kind: str) -> None:
    options = {}
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "wire"))
        listener.listen()
        loop = relays(listener)
        loop.address = f"unix:{tmp_path}/wire"
        options["grpc.default_authority"] = "localhost"
    else:
        loop = relays(socket.create_server(("::1", 0), family=socket.AF_INET6))
        loop.address = loop.address.replace("127.0.0.1", "[::1]")
    with channel(loop, **options) as made:
        call(made, "Echo")
        under_way = stream(made, iter([]))
        begin = loop.until(lambda: loop.events and loop.events[0])
        assert list(under_way) == []
    for peer in (behind.metadata[-1]["engram-peer"], begin.peer):
        assert str(peer).startswith("unix:" if kind == "unix" else "ipv6:%5B::1%5D:")


# Flow


def test_large_messages_pass_both_ways(relays: Callable[..., Loop]) -> None:
    with channel(relays(), **{"grpc.max_receive_message_length": -1}) as made:
        sent = [bytes([k]) * LARGE for k in range(5)]
        assert list(made.stream_stream("/test.Behind/Both")(iter(sent), timeout=60)) == sent


def test_who_does_not_read_is_not_read_and_holds_up_nobody(relays: Callable[..., Loop], behind: Behind) -> None:
    """The windows fill up, from the caller to the handler behind; other calls on the same connection go on."""
    with channel(relays(), **{"grpc.max_receive_message_length": -1}) as made:
        slow = made.unary_stream("/test.Behind/Count")(b"50 1000000", timeout=60)
        assert len(next(slow)) == 1_000_000
        time.sleep(0.5)
        sent = behind.received
        time.sleep(0.3)
        assert behind.received == sent < 40
        data = bytes(LARGE)
        assert call(made, "Echo", data) == data
        assert sum(map(len, slow)) == 49_000_000


def test_more_calls_than_one_connection_carries(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays(relayed=250)
    with channel(loop) as made:
        calls = [made.unary_unary("/test.Behind/Wait").future(b"") for _ in range(250)]
        until(lambda: len(behind.metadata) == 250)
        assert loop.wire.counters()["relayed"] == 250
        code, words = code_of(lambda: call(made, "Echo"))
        assert (code, "call again" in words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest()).status == 1
        for one in calls:
            one.cancel()
        until(lambda: loop.wire.counters()["relayed"] == 0 and len(behind.cancelled) == 250)
        assert call(made, "Echo", b"again") == b"again"


# Ends


def test_a_cancel_reaches_the_handler(relays: Callable[..., Loop], behind: Behind) -> None:
    with channel(relays()) as made:
        waiting = made.unary_unary("/test.Behind/Wait").future(b"waited")
        until(lambda: behind.metadata)
        waiting.cancel()
        until(lambda: behind.cancelled == ["waited"])
        open_end = made.stream_stream("/test.Behind/Both")(_one_then_silence(), timeout=60)
        assert next(open_end) == b"one"
        open_end.cancel()
        until(lambda: behind.ended == 1)


def _one_then_silence() -> Iterator[bytes]:
    yield b"one"
    time.sleep(30)


def test_a_cancel_while_the_handler_has_no_window(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays()
    with channel(loop) as made:
        slow = made.unary_stream("/test.Behind/Count")(b"1000 1000000")
        next(slow)
        slow.cancel()
        until(lambda: loop.wire.counters()["relayed"] == 0)
        assert call(made, "Echo", b"x") == b"x"


def test_time_is_up_on_both_sides(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays()
    with channel(loop) as made:
        assert code_of(lambda: call(made, "Wait", b"a", timeout=0.3))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: behind.cancelled == ["a"])
        begun = time.monotonic()
        waiting = made.unary_unary("/test.Behind/Wait")
        code, _ = code_of(lambda: waiting(b"b", metadata=[("grpc-timeout", "200m")]))  # and does not keep to it
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.2 <= time.monotonic() - begun < WAIT_S
        until(lambda: behind.cancelled == ["a", "b"])
    assert loop.wire.counters()["relayed"] == 0


def test_a_server_that_goes_and_comes_back(loops: Callable[..., Loop], tmp_path: Path) -> None:
    loop = loops(relay=str(tmp_path / "behind"))
    with channel(loop) as made:
        code, words = code_of(lambda: call(made, "Echo"))
        assert (code, words) == (
            grpc.StatusCode.UNAVAILABLE,
            "what answers this call is not there just now; call again",
        )
        for _ in range(3):
            behind = Behind(tmp_path / "behind")
            assert call(made, "Echo", b"back") == b"back"
            waiting = made.unary_unary("/test.Behind/Wait").future(b"")
            both = made.stream_stream("/test.Behind/Both")(_one_then_silence(), timeout=60)
            assert next(both) == b"one"
            until(lambda behind=behind: len(behind.metadata) == 3)
            behind.close()
            for result in (waiting.result, lambda both=both: next(both)):
                assert code_of(result)[0] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert code_of(lambda: call(made, "Echo"))[0] is grpc.StatusCode.UNAVAILABLE
        assert loop.wire.counters()["relayed"] == 0


def test_a_connection_that_breaks_ends_its_calls_unavailable(loops: Callable[..., Loop], tmp_path: Path) -> None:
    """A listener that takes connections, reads and falls dead."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "behind"))
    listener.listen()
    loop = loops(relay=str(tmp_path / "behind"))
    with channel(loop) as made:
        waiting = made.unary_unary("/test.Behind/Wait").future(b"", timeout=WAIT_S)
        connection, _ = listener.accept()
        connection.recv(10)
        time.sleep(0.2)
        connection.close()
        code, words = code_of(waiting.result)
        assert (code, "call again" in words) == (grpc.StatusCode.UNAVAILABLE, True)
    listener.close()


def test_a_drained_wire_finishes_relayed_calls(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays()
    with channel(loop) as made:
        going = threading.Event()

        def requests() -> Iterator[bytes]:
            yield b"one"
            going.wait(WAIT_S)
            yield b"two"

        both = made.stream_stream("/test.Behind/Both")(requests(), timeout=WAIT_S)
        assert next(both) == b"one"
        loop.wire.drain()
        time.sleep(0.3)
        going.set()
        assert list(both) == [b"two"]
        loop.until(lambda: loop.wire.counters()["connections"] == 0)


# Limits and tokens


def test_messages_are_limited_by_what_they_say_of_themselves(relays: Callable[..., Loop], behind: Behind) -> None:
    loop = relays(message_nbytes=100_000)
    with channel(loop) as made:
        assert len(call(made, "Echo", bytes(100_000))) == 100_000
        code, words = code_of(lambda: call(made, "Echo", bytes(100_001)))
        assert (code, words) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "a message has 100001 bytes; at most 100000 are taken",
        )
        both = made.stream_stream("/test.Behind/Both")(iter([b"x", bytes(100_001)]), timeout=WAIT_S)
        assert code_of(lambda: list(both))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        until(lambda: loop.wire.counters()["relayed"] == 0)


def test_tokens(relays: Callable[..., Loop], behind: Behind) -> None:
    refusals = {
        name: (16, words, status_pb2.Status(code=16, message=words).SerializeToString())
        for name, words in (("TOKEN_MISSING", "a token, please"), ("TOKEN_UNKNOWN", "who?"), ("TOKEN_REVOKED", "gone"))
    }
    loop = relays(refusals=refusals)
    loop.wire.set_tokens({digest("one"): 0, digest("two"): 1})
    with channel(loop) as made:
        for metadata, words in (
            ((), "a token, please"),
            ((("authorization", "one"),), "a token, please"),
            ((("authorization", "Bearer "),), "a token, please"),
            ((("authorization", "Bearer three"),), "who?"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(made, "Echo", metadata=metadata)
            error: Any = caught.value
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, words)
            status = rpc_status.from_call(error)
            assert status is not None and status.message == words
        assert behind.metadata == []
        stub = health_pb2_grpc.HealthStub(made)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == 1, "health is open to all"
        assert stub.Check(health_pb2.HealthCheckRequest()).status == 1
        waiting = {
            token: made.unary_unary("/test.Behind/Wait").future(
                token.encode(), metadata=[("authorization", f"bearer {token}")]
            )
            for token in ("one", "two")
        }
        until(lambda: len(behind.metadata) == 2)
        loop.wire.set_tokens({digest("two"): 1})
        assert code_of(waiting["one"].result) == (grpc.StatusCode.UNAUTHENTICATED, "gone")
        until(lambda: behind.cancelled == ["one"])
        assert not waiting["two"].done()
        behind.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert next(watch).status == 2, "and goes on"
        for one in (waiting["two"], watch):
            one.cancel()


def test_what_cannot_be(loops: Callable[..., Loop]) -> None:
    with pytest.raises(ValueError, match="TOKEN_MISSING"):
        loops(relay="/nowhere", refusals={"NO_SUCH": (16, "", b"")})
    with pytest.raises(ValueError, match="out of range"):
        loops(relay="/nowhere", relayed=0)


def test_paths_that_no_client_sends(relays: Callable[..., Loop]) -> None:
    with channel(relays()) as made:
        for path in ("/engram.v1.EngramService/Stream?x=y", "/grpc.health.v1.Health/", "/a?b=c#d", "/%00/x"):
            with contextlib.suppress(ValueError):
                code = code_of(lambda path=path: made.unary_unary(path)(b"", timeout=WAIT_S))[0]
                assert code is grpc.StatusCode.UNIMPLEMENTED, path
