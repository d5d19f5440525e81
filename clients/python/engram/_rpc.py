"""The wire: channels and calls, typed. The only module of the SDK that makes gRPC objects; _link.py uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from engram._errors import EngramError, InvalidInputError, UnavailableError
from engram._files import read_file
from engram._options import ClientOptions
from engram._poller import bound
from engram.v1 import stream_pb2

SERVICE = "/engram.v1.EngramService/"
_INT_MAX = (1 << 31) - 1  # of gRPC's options
_PEM_BYTES_MAX = 4 << 20

StreamCall: TypeAlias = "grpc.aio.StreamStreamCall[stream_pb2.StreamRequest, stream_pb2.StreamResponse]"
_Response = TypeVar("_Response", bound=Message)


def open_channel(address: str, options: ClientOptions) -> grpc.aio.Channel:
    """A channel of its own connection to one server."""
    keepalive_ms = min(int(options.keepalive_s * 1000), _INT_MAX)
    arguments: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", options.message_bytes_max),
        ("grpc.max_send_message_length", -1),
        # Channels otherwise share connections, and with them the waits after failures of one another.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        # gRPC's own rule is to use the environment's proxy for whatever no_proxy does not name, this machine too.
        ("grpc.enable_http_proxy", int(options.proxied(address))),
    ]
    if not options.encrypted and ("," in address or address.startswith("unix")):
        arguments.append(("grpc.default_authority", "localhost"))  # gRPC's own would be none that HTTP/2 knows
    credentials = _credentials(options) if options.encrypted else None
    with bound(asyncio.get_running_loop()):
        if credentials is not None:
            return grpc.aio.secure_channel(address, credentials, options=arguments)
        return grpc.aio.insecure_channel(address, options=arguments)


def _credentials(options: ClientOptions) -> grpc.ChannelCredentials:
    if options.credentials is not None:
        return options.credentials
    return grpc.ssl_channel_credentials(
        root_certificates=_content("ca_file", options.ca_file),
        private_key=_content("key_file", options.key_file),
        certificate_chain=_content("cert_file", options.cert_file),
    )


def _content(name: str, path: str | None) -> bytes | None:
    try:
        return read_file(path, _PEM_BYTES_MAX) if path else None
    except OSError as error:
        raise InvalidInputError(f"{name} = {path!r}: {error.strerror}", reason="INVALID_ARGUMENT") from error


def _asked(token: Callable[[], str]) -> str:
    try:
        return token()
    except EngramError:
        raise
    except Exception as error:  # the caller's own function: it may fail now and not later
        raise UnavailableError(
            f"the token's function failed: {type(error).__name__}", reason="TOKEN_UNAVAILABLE"
        ) from error


def _metadata(options: ClientOptions) -> tuple[tuple[str, str], ...]:
    token = _asked(options.token) if callable(options.token) else options.token
    if token and not (token.isascii() and token.isprintable()):
        raise InvalidInputError("token: not printable ASCII", reason="INVALID_ARGUMENT")
    return (*options.metadata, ("authorization", f"Bearer {token}")) if token else tuple(options.metadata)


def open_stream(channel: grpc.aio.Channel, options: ClientOptions) -> StreamCall:
    """Begins EngramService.Stream."""
    multi = channel.stream_stream(
        SERVICE + "Stream",
        request_serializer=stream_pb2.StreamRequest.SerializeToString,
        response_deserializer=stream_pb2.StreamResponse.FromString,
    )
    return cast(StreamCall, multi(metadata=_metadata(options)))


async def let_in(call: StreamCall) -> str | None:
    """Waits until the server has let the stream in, which its metadata says; the address at which it wants to be found again, or
    "". Raises grpc.aio.AioRpcError where it has not let it in; None where it ended the stream without a word."""
    await call.wait_for_connection()
    told = dict(await call.initial_metadata())
    if "engram-server" in told:
        return str(told.get("engram-address", ""))
    await call.read()  # raises what the status says
    return None


async def call_unary(
    channel: grpc.aio.Channel,
    method: str,
    request: Message,
    response_type: type[_Response],
    timeout_s: float | None,
    options: ClientOptions,
) -> _Response:
    """One unary call. Raises grpc.aio.AioRpcError."""
    multi = channel.unary_unary(
        SERVICE + method,
        request_serializer=type(request).SerializeToString,
        response_deserializer=response_type.FromString,
    )
    response: _Response = await multi(request, timeout=timeout_s, metadata=_metadata(options))
    return response
