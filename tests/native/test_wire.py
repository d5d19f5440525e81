"""The native wire with gRPC's own client: what it brings, what it refuses, and how far it lets anybody go."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from wire_loop import NONE, WAIT_S, Loop, channel, code_of, frame, native, stream, unary

from engram.v1 import stream_pb2

MISSING = "this server asks for a token: metadata authorization: Bearer TOKEN"


# What comes, and what goes


def test_steps_of_many_streams_come_as_columns_and_their_outputs_go_back(loops: Callable[..., Loop]) -> None:
    loop = loops(head=[("engram-server", "here")])
    with channel(loop) as made:
        sent = [
            [frame([k, k + 1], [1, 2], bytes([k]) * (8 * (k + 1)), flags=b"\0\1", timeout_ms=k) for _ in range(3)]
            for k in range(20)
        ]
        calls = [stream(made, iter(requests), timeout=WAIT_S) for requests in sent]
        for k, call in enumerate(calls):
            outputs = [response.outputs for response in call]
            assert b"".join(one.handles for one in outputs) == np.array([k, k + 1] * 3, np.uint32).tobytes()
            assert b"".join(one.outputs for one in outputs) == bytes([k]) * (8 * (k + 1)) * 3
            assert (call.code(), dict(call.initial_metadata())["engram-server"]) == (grpc.StatusCode.OK, "here")
    by_call = {row[0]: row for row in loop.rows}
    assert len(by_call) == 20
    assert sorted(row[1:] for row in by_call.values()) == [(k + 1, 2, NONE, 1, k, 4 * (k + 1)) for k in range(20)]


def test_frames_that_are_not_plain_steps_are_messages(loops: Callable[..., Loop]) -> None:
    loop = loops()
    requests = [
        stream_pb2.StreamRequest(open=stream_pb2.OpenFrame(request_id=3, model="m")),
        frame([1], [1], b"abcd", repeats=np.uint32(5).tobytes()),
        frame([1], [1], b"abcd", dtype="float32"),
        frame([1, 2], [1], b"abcd"),
        frame([], [], b""),
        stream_pb2.StreamRequest(acknowledge=stream_pb2.AcknowledgeFrame()),
    ]
    with channel(loop) as made:
        raw = made.stream_stream("/engram.v1.EngramService/Stream")
        data = [request.SerializeToString() for request in requests] + [b"\xff\xff", b""]
        assert list(raw(iter(data), timeout=WAIT_S)) == data, "the loop answers messages with themselves"
    assert loop.rows == []


def test_events_say_after_how_many_rows_they_came(loops: Callable[..., Loop]) -> None:
    loop = loops()
    close = stream_pb2.StreamRequest(close=stream_pb2.CloseFrame(request_id=1))
    with channel(loop) as made:
        list(stream(made, iter([frame([1, 2], [1, 1], b"ab"), close, frame([1], [2], b"c"), close]), timeout=WAIT_S))
    before = [event.rows_before for event in loop.events if event.kind == "message"]
    assert before == [2, 3]


def test_other_calls_bring_their_path_metadata_and_time(loops: Callable[..., Loop]) -> None:
    loop = loops()
    with channel(loop) as made:
        assert (
            unary(made, b"hello", metadata=[("traceparent", "00-1-2-01"), ("authorization", "Bearer secret")])
            == b"hello"
        )
    begin = loop.events[0]
    assert (begin.kind, begin.path, begin.identity) == ("begin", "/some.Service/Call", None)
    assert ("traceparent", "00-1-2-01") in begin.metadata
    assert "secret" not in str(begin.metadata), "a token stays in the wire"
    assert 0 < begin.timeout_ms <= WAIT_S * 1000
    assert loop.until(lambda: loop.kinds() == ["begin", "message", "half_close", "end"])


def test_a_status_comes_with_its_words_and_details(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        call = made.unary_unary("/some.Service/Call").future(b"x", timeout=WAIT_S)
        begin = loop.until(lambda: loop.events and loop.events[0])
        loop.wire.finish(begin.call, 9, "100 % wrong: naïve\n", b"\x08\x09\x12\x02no")
        assert (call.code(), call.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "100 % wrong: naïve\n")
        assert dict(call.trailing_metadata())["grpc-status-details-bin"] == b"\x08\x09\x12\x02no"
        loop.wire.finish(begin.call, 0)
        loop.wire.send(begin.call, b"nobody gets it", 1)
        loop.wire.send(12345, b"nor this")


# Ends


def test_a_call_ends_when_its_time_is_up_or_its_caller_cancels(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        assert code_of(lambda: unary(made, timeout=0.2))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        loop.until(lambda: loop.kinds().count("end") == 1)
        call = stream(made, iter([frame([1], [1], b"ab")]))
        loop.until(lambda: loop.rows)
        call.cancel()
        loop.until(lambda: loop.kinds().count("end") == 2)
        assert loop.wire.counters()["calls"] == 0


def test_a_peer_that_does_not_keep_its_time_is_told_by_the_server(loops: Callable[..., Loop]) -> None:
    """A client that says 200 ms and waits for longer: the server's own clock ends the call."""
    loop = loops(answers=False)
    with channel(loop) as made:
        call = made.unary_unary("/some.Service/Call")
        begun = time.monotonic()
        code, details = code_of(lambda: call(b"", metadata=[("grpc-timeout", "200m")]))
        assert (code, details) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the time of the call is up")
        assert 0.2 <= time.monotonic() - begun < WAIT_S


def test_a_call_that_is_finished_while_its_caller_goes_on_has_its_status(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        for _ in range(20):
            call = stream(made, iter(lambda: time.sleep(0.2) or frame([1], [1], b"x"), None), timeout=WAIT_S)
            begin = loop.until(lambda: next((event for event in loop.events[::-1] if event.kind == "begin"), None))
            loop.events.clear()
            loop.wire.finish(begin.call, 9, "that is all")
            assert code_of(lambda call=call: list(call)) == (grpc.StatusCode.FAILED_PRECONDITION, "that is all")


def test_half_of_a_stream_may_be_closed_while_answers_are_under_way(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        call = stream(made, iter([frame([1], [1], b"ab")]), timeout=WAIT_S)
        half = loop.until(lambda: next((event for event in loop.events if event.kind == "half_close"), None))
        columns = np.array([half.call], np.uint32), np.ones(1, np.uint32), np.ones(1, np.uint64)
        loop.wire.answer(*columns, np.frombuffer(b"cd", np.uint8), np.array([1], np.uint64))
        loop.wire.finish(half.call)
        (response,) = list(call)
        assert (response.outputs.outputs, response.outputs.durable_seqs) == (b"cd", np.uint64(1).tobytes())


# Unary steps

STEP = "/engram.v1.EngramService/Step"


def steps_of(loop: Loop, count: int) -> list[Any]:
    found = loop.until(lambda: [event for event in loop.events if event.kind == "step"][count - 1 :])
    return [event for event in loop.events if event.kind == "step"] if found else []


@pytest.mark.parametrize("relay", [None, "/nowhere"])
def test_a_unary_step_is_one_event_and_one_answer(loops: Callable[..., Loop], relay: str | None) -> None:
    loop = loops(answers=False, head=[("engram-server", "here")], relay=relay)
    loop.wire.set_tokens({hashlib.sha256(b"one").digest(): 5})
    with channel(loop, **{"grpc.max_receive_message_length": -1}) as made:
        metadata = [("traceparent", "00-1-2-01"), ("x", "y"), ("authorization", "Bearer one")]
        for count, nbytes in enumerate((0, 5, 3_000_000), 1):
            data = bytes(nbytes)
            waiting = made.unary_unary(STEP).future(data, timeout=WAIT_S, metadata=metadata)
            step = steps_of(loop, count)[-1]
            assert (step.path, step.identity, step.metadata) == (STEP, 5, [("traceparent", "00-1-2-01")])
            assert (step.data, step.peer[:15]) == (data, "ipv4:127.0.0.1:")
            assert 0 < step.timeout_ms <= WAIT_S * 1000 + 100, "gRPC rounds up to 100 ms"
            loop.wire.respond(step.call, data + b"!")
            assert (waiting.result(), waiting.code()) == (data + b"!", grpc.StatusCode.OK)
            loop.until(lambda count=count: loop.kinds() == ["step", "end"] * count)
            loop.until(lambda count=count: loop.wire.counters()["answers"] == count)
        loop.wire.respond(step.call, b"nobody gets it")
    counters = loop.wire.counters()
    assert (counters["steps"], counters["answers"], counters["rows"], counters["calls"]) == (3, 3, 0, 0)


def test_a_unary_step_may_fail_be_cancelled_and_be_late(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        step = made.unary_unary(STEP)
        failing = step.future(b"x", timeout=WAIT_S)
        event = steps_of(loop, 1)[-1]
        loop.wire.finish(event.call, 9, "no", b"\x08\x09\x12\x02no")
        loop.wire.respond(event.call, b"too late")
        assert (failing.code(), failing.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "no")
        cancelled = step.future(b"x")
        event = steps_of(loop, 2)[-1]
        cancelled.cancel()
        loop.until(lambda: loop.kinds() == ["step", "end"] * 2)
        loop.wire.respond(event.call, b"too late")
        assert code_of(lambda: step(b"x", timeout=0.2))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        loop.until(lambda: loop.kinds() == ["step", "end"] * 3)
    assert loop.wire.counters()["answers"] == 0


def test_a_unary_step_has_one_message(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        for messages in ([], [b"a", b"b"], [b"", b""]):
            call = made.stream_stream(STEP)(iter(messages), timeout=WAIT_S)
            code, words = code_of(lambda call=call: list(call))
            assert (code, "one message" in words) == (grpc.StatusCode.INTERNAL, True)
        held = made.stream_stream(STEP)(iter(lambda: time.sleep(0.3) or b"x", None), timeout=WAIT_S)
        assert code_of(lambda: list(held))[0] is grpc.StatusCode.INTERNAL
        open_end = made.stream_stream(STEP)(_one_then_silence())
        time.sleep(0.3)
        open_end.cancel()
        loop.until(lambda: loop.wire.counters()["calls"] == 0)
    assert loop.events == [], "Python hears of none of them"
    assert loop.wire.counters()["refused_message"] == 4


def _one_then_silence() -> Iterator[bytes]:
    yield b"one"
    time.sleep(5)


# Counters


def test_what_is_counted(loops: Callable[..., Loop]) -> None:
    loop = loops()
    assert all(type(value) is int and value == 0 for value in loop.wire.counters().values())
    with channel(loop) as made:
        going = threading.Event()

        def requests() -> Iterator[stream_pb2.StreamRequest]:
            yield frame([1, 2], [1, 1], bytes(100_000))
            going.wait(WAIT_S)

        call = stream(made, requests(), timeout=WAIT_S)
        assert len(next(call).outputs.outputs) == 100_000
        # What is sent is counted a moment after it is gone.
        counters = loop.until(lambda: (now := loop.wire.counters())["bytes_out"] > 100_000 and now["answers"] and now)
        assert (counters["streams"], counters["rows"], counters["answers"]) == (1, 2, 2)
        assert 100_000 < counters["bytes_in"] < 110_000
        assert counters["bytes_out"] < 110_000
        going.set()
        assert list(call) == []
    host, port = loop.address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(PREFACE + h2_frame(1, 5, 1, HEAD.replace(b"application/grpc", b"application/json")))
        loop.until(lambda: loop.wire.counters()["refused_head"] == 1)
    loop.until(lambda: loop.wire.counters()["streams"] == 0)
    assert loop.wire.counters()["inbox_age_ms"] == 0


def test_what_is_not_taken_has_a_depth_and_an_age() -> None:
    wire = native.Wire()
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    wire.listen(listener.detach())
    with grpc.insecure_channel(address) as made:
        call = stream(made, iter([frame([1, 2], [1, 1], bytes(1000))]))
        deadline = time.monotonic() + WAIT_S
        while wire.counters()["inbox_age_ms"] < 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        counters = wire.counters()
        assert (counters["inbox_rows"], counters["inbox_events"], counters["inbox_nbytes"]) == (2, 2, 1000)
        wire.take()
        counters = wire.counters()
        assert [counters[f"inbox_{name}"] for name in ("rows", "events", "nbytes", "age_ms")] == [0, 0, 0, 0]
        assert counters["rows"] == 2
        call.cancel()
    wire.close()


# Tokens


def test_calls_without_a_good_token_are_refused_and_streams_end_with_theirs(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    table = {hashlib.sha256(token).digest(): number for number, token in enumerate((b"one", b"two"))}
    loop.wire.set_tokens(table)
    with channel(loop) as made:
        for metadata in (
            (),
            (("authorization", "Bearer three"),),
            (("authorization", "one"),),
            (("authorization", "Bearer "),),
        ):
            code, details = code_of(lambda metadata=metadata: unary(made, metadata=metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            missing = metadata != (("authorization", "Bearer three"),)
            assert details == (MISSING if missing else "this token is not known, or was revoked")
        calls = [stream(made, iter([]), metadata=[("authorization", f"bearer {token}")]) for token in ("one", "two")]
        loop.until(lambda: {event.identity for event in loop.events if event.kind == "begin"} == {0, 1})
        counters = loop.wire.counters()
        assert (counters["unauthenticated"], counters["refused_no_token"], counters["refused_unknown_token"]) == (
            4,
            3,
            1,
        )
        loop.wire.set_tokens({hashlib.sha256(b"two").digest(): 1})
        assert code_of(lambda: next(calls[0])) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "the call's token is not valid any more",
        )
        assert loop.wire.counters()["refused_token_revoked"] == 1
        loop.wire.finish(next(event.call for event in loop.events if event.identity == 1))
        assert list(calls[1]) == []


# Limits


def test_messages_are_limited_packed_and_unpacked(loops: Callable[..., Loop]) -> None:
    loop = loops(message_nbytes=100_000)
    with channel(loop, **{"grpc.max_receive_message_length": -1}) as made:
        assert len(unary(made, bytes(100_000))) == 100_000
        for data, compression in ((bytes(100_001), None), (bytes(200_000_000), grpc.Compression.Gzip)):
            code, details = code_of(lambda data=data, packed=compression: unary(made, data, compression=packed))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "at most 100000" in details
        assert len(unary(made, bytes(90_000), compression=grpc.Compression.Gzip)) == 90_000
        assert unary(made, b"on the same connection") == b"on the same connection"


def test_a_stream_is_read_no_further_than_its_rows_may_be_under_way(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False, rows=100)
    sent = 0

    def requests() -> Iterator[stream_pb2.StreamRequest]:
        nonlocal sent
        for seq in range(1, 20_001):
            sent = seq
            yield frame([1], [seq], bytes(1000))

    with channel(loop) as made:
        call = stream(made, requests(), timeout=60)
        loop.until(lambda: len(loop.rows) >= 100)
        time.sleep(0.5)
        taken, seen = len(loop.rows), sent
        assert taken < 400, "what one DATA frame brings is read"
        time.sleep(0.5)
        assert (len(loop.rows), sent) == (taken, seen), "and the client's window is full"
        loop.answers = True
        rows = np.array(loop.rows, np.uint64)
        loop.wire.answer(
            rows[:, 0].astype(np.uint32), rows[:, 1].astype(np.uint32), rows[:, 2].copy(), np.zeros(len(rows), np.uint8), np.empty(0, np.uint64)
        )  # fmt: skip
        seqs = np.concatenate([np.frombuffer(response.outputs.seqs, np.uint64) for response in call])
        assert seqs.tolist() == list(range(1, 20_001))


def test_rows_of_a_stream_go_back_in_one_frame_wherever_they_stand(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made:
        calls = [stream(made, iter([frame([1, 2], [seq, seq], bytes(8))]), timeout=WAIT_S) for seq in (5, 6)]
        loop.until(lambda: len(loop.rows) == 4 and loop.kinds().count("half_close") == 2)
        rows = np.array(loop.rows, np.uint64)[[3, 0, 1, 2]]
        streams = rows[:, 0].astype(np.uint32)
        outputs = rows[:, 1].astype(np.uint8)[:, None]  # its handle
        loop.wire.answer(
            streams, rows[:, 1].astype(np.uint32), rows[:, 2].copy(), outputs, rows[:, 2].copy()
        )  # fmt: skip
        for number in np.unique(streams).tolist():
            loop.wire.finish(number)
        for call, seq in zip(calls, (5, 6), strict=True):
            (response,) = call
            handles = np.frombuffer(response.outputs.handles, np.uint32)
            assert sorted(handles.tolist()) == [1, 2]
            assert np.frombuffer(response.outputs.outputs, np.uint8).tolist() == handles.tolist()
            assert np.frombuffer(response.outputs.seqs, np.uint64).tolist() == [seq, seq]
            assert np.frombuffer(response.outputs.durable_seqs, np.uint64).tolist() == [seq, seq]


def test_who_does_not_read_answers_is_not_read(loops: Callable[..., Loop]) -> None:
    """Its answers wait for its window, count as rows under way, and so bound what is kept for it."""
    loop = loops(rows=50)

    def requests() -> Iterator[stream_pb2.StreamRequest]:
        for seq in range(1, 2001):
            yield frame([1], [seq], bytes(20_000))

    with channel(loop) as made:
        call = stream(made, requests(), timeout=60)
        loop.until(lambda: len(loop.rows) >= 50)
        time.sleep(0.5)
        taken = len(loop.rows)
        assert taken < 1500, "gRPC's client reads ahead, but not without end"
        time.sleep(0.5)
        assert len(loop.rows) == taken
        assert sum(len(response.outputs.seqs) // 8 for response in call) == 2000


def test_connections_beyond_the_limit_are_turned_away(loops: Callable[..., Loop]) -> None:
    loop = loops(connections=3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            assert unary(stack.enter_context(channel(loop)), b"x") == b"x"
        assert code_of(lambda: unary(stack.enter_context(channel(loop)), timeout=2))[0] in (
            grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
        )  # fmt: skip
        assert loop.wire.counters()["connections"] == 3
    loop.until(lambda: loop.wire.counters()["connections"] == 0)
    with channel(loop) as made:
        assert unary(made, b"again") == b"again"


def test_connections_that_say_nothing_or_nonsense_are_let_go(loops: Callable[..., Loop]) -> None:
    loop = loops(handshake_s=0.3)
    host, port = loop.address.split(":")
    silent = socket.create_connection((host, int(port)))
    for nonsense in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(60),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4000,
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(WAIT_S)
            connection.sendall(nonsense)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
    silent.settimeout(WAIT_S)
    while silent.recv(4096):  # the server's settings may come first
        pass
    with channel(loop) as made:
        assert unary(made, b"others") == b"others"
    assert loop.wire.counters()["failed"] >= 3


def test_idle_connections_are_let_go(loops: Callable[..., Loop]) -> None:
    loop = loops(idle_s=0.3, keepalive_s=0.1)
    with channel(loop) as made, channel(loop) as other:
        assert unary(made, b"x") == b"x"
        held = other.stream_stream("/some.Service/Other")(iter(lambda: time.sleep(30) or b"", None))
        loop.until(lambda: loop.wire.counters()["calls"] == 1)
        loop.until(lambda: loop.wire.counters()["connections"] == 1)
        time.sleep(0.5)
        assert loop.wire.counters()["connections"] == 1, "a call keeps its connection"
        assert unary(made, b"and connects anew") == b"and connects anew"
        held.cancel()


# Sockets


def test_tls_and_clients_certificates_that_change(loops: Callable[..., Loop], certificates: Any) -> None:
    loop = loops()
    ca, (server, key) = certificates.ca("ca"), certificates.issue("localhost")
    client, client_key = certificates.issue("client")
    loop.wire.set_tls(server.read_bytes(), key.read_bytes())

    def answers(*own: bytes) -> bytes:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *own)
        address = loop.address.replace("127.0.0.1", "localhost")
        with grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)]) as made:
            return unary(made, b"x", timeout=3)

    assert answers() == b"x"
    with channel(loop) as plain:
        assert code_of(lambda: unary(plain, timeout=2))[0] in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
    loop.wire.set_tls(server.read_bytes(), key.read_bytes(), ca.read_bytes())
    assert code_of(answers)[0] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert answers(client_key.read_bytes(), client.read_bytes()) == b"x"
    for bad in (
        (b"", key.read_bytes()),
        (server.read_bytes(), b"no key"),
        (b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", key.read_bytes()),
    ):
        with pytest.raises(ValueError, match=r"certificate|key"):
            loop.wire.set_tls(*bad)
    assert answers(client_key.read_bytes(), client.read_bytes()) == b"x", "what was there before stays"
    host, port = loop.address.split(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(client, client_key)
    with (
        socket.create_connection((host, int(port))) as plain_socket,
        context.wrap_socket(plain_socket, server_hostname="localhost") as wrapped,
    ):
        assert (wrapped.selected_alpn_protocol(), wrapped.version()) == ("h2", "TLSv1.3")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((host, int(port))) as plain_socket,
        context.wrap_socket(plain_socket, server_hostname="localhost") as wrapped,
    ):
        assert wrapped.version() == "TLSv1.2"
    counters = loop.until(lambda: (now := loop.wire.counters())["tls_1_2"] and now)
    assert counters["tls_1_3"] >= 4
    assert counters["tls_failed"] >= 2


@pytest.mark.parametrize("kind", ["unix", "ipv6"])
def test_other_sockets(loops: Callable[..., Loop], tmp_path: Path, kind: str) -> None:
    options = {}
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "wire"))
        listener.listen()
        loop = loops(listener)
        loop.address = f"unix:{tmp_path}/wire"
        options["grpc.default_authority"] = "localhost"  # gRPC's own is the path, which HTTP does not allow
    else:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        loop = loops(listener)
        loop.address = loop.address.replace("127.0.0.1", "[::1]")
    with channel(loop, **options) as made:
        assert unary(made, b"x") == b"x"


def test_a_drained_wire_finishes_what_it_has_and_takes_no_more(loops: Callable[..., Loop]) -> None:
    loop = loops(answers=False)
    with channel(loop) as made, channel(loop) as other:
        call = stream(made, iter([frame([1], [1], b"ab")]), timeout=WAIT_S)
        half = loop.until(lambda: next((event for event in loop.events if event.kind == "half_close"), None))
        loop.wire.drain()
        time.sleep(0.2)
        assert code_of(lambda: unary(other, timeout=2))[0] in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
        loop.wire.answer(
            np.array([half.call], np.uint32),
            np.ones(1, np.uint32),
            np.ones(1, np.uint64),
            np.zeros(2, np.uint8),
            np.empty(0, np.uint64),
        )
        loop.wire.finish(half.call)
        assert len(list(call)) == 1
        loop.until(lambda: loop.wire.counters()["connections"] == 0)


# Bytes that no gRPC client sends


def h2_frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", number) + payload


HEAD = b"\x83\x86" + b"".join(
    b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
    for name, value in (
        (b":path", b"/engram.v1.EngramService/Stream"),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
    )
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + h2_frame(4, 0, 0)


def floods() -> dict[str, bytes]:
    opened = h2_frame(1, 4, 1, HEAD)
    return {
        "resets": b"".join(
            h2_frame(1, 4, 2 * n + 1, HEAD) + h2_frame(3, 0, 2 * n + 1, bytes([0, 0, 0, 8])) for n in range(20_000)
        ),
        "continuations": h2_frame(1, 0, 1, HEAD) + h2_frame(9, 0, 1, b"\0\x01a\x01b" * 20) * 20_000,
        "settings": h2_frame(4, 0, 0, b"\0\3\0\0\0\1") * 50_000,
        "pings": h2_frame(6, 0, 0, bytes(8)) * 50_000,
        "empty data": opened + h2_frame(0, 0, 1) * 50_000,
        "window of nothing": opened + h2_frame(8, 0, 1, bytes(4)),
        "data for nobody": h2_frame(0, 0, 77, bytes(100)) * 1000,
        "a length that lies": opened + h2_frame(0, 0, 1, b"\0\xff\xff\xff\xff" + bytes(1000)),
        "a bomb": opened + h2_frame(0, 0, 1, b"\1\0\0\4\0" + gzip.compress(bytes(1 << 20))),
    }


@pytest.mark.parametrize("kind", list(floods()))
def test_floods_cost_a_connection_at_most(loops: Callable[..., Loop], kind: str) -> None:
    loop = loops(handshake_s=2.0)
    host, port = loop.address.split(":")
    with socket.create_connection((host, int(port))) as connection, channel(loop) as made:
        connection.settimeout(WAIT_S)
        reader = threading.Thread(target=_read_all, args=(connection,))
        reader.start()
        with contextlib.suppress(OSError):
            connection.sendall(PREFACE + floods()[kind])
        assert unary(made, b"others are served") == b"others are served"
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        reader.join()
        assert unary(made, b"then, too") == b"then, too"
    loop.until(lambda: loop.wire.counters()["connections"] == 0)
    assert loop.wire.counters()["calls"] == 0
    assert loop.wire.counters()["refused_resets"] == (kind in ("resets", "continuations", "empty data"))


def test_calls_that_are_let_go_at_once_are_bounded_however_quickly_they_are_looked_at(
    loops: Callable[..., Loop],
) -> None:
    loop = loops(resets=10, calls=5)
    host, port = loop.address.split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port))) as connection, channel(loop) as made:
        connection.settimeout(WAIT_S)
        reader = threading.Thread(target=_read_all, args=(connection,))
        reader.start()
        connection.sendall(PREFACE)
        with contextlib.suppress(OSError):
            for n in range(500):
                connection.sendall(h2_frame(1, 4, 2 * n + 1, HEAD))
                loop.until(lambda: loop.wire.counters()["calls"] > 0 or not reader.is_alive())
                connection.sendall(h2_frame(3, 0, 2 * n + 1, bytes([0, 0, 0, 8])))
                loop.until(lambda: loop.wire.counters()["calls"] == 0)
                if not reader.is_alive():
                    break
        assert n <= 10 * (1 + time.monotonic() - began) + 1
        assert loop.wire.counters()["refused_resets"] == 1
        assert unary(made, b"others are served") == b"others are served"
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        reader.join()


def _read_all(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass
