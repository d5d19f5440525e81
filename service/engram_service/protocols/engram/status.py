"""Refusals as gRPC statuses with google.rpc details: ErrorInfo always, RetryInfo where there is a time to wait."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from engram_service.errors import ServiceError

DOMAIN = "engram"


async def abort(context: grpc.aio.ServicerContext[Any, Any], refusal: ServiceError) -> NoReturn:
    """Ends the call with the refusal's status, reason and hints."""
    await context.abort_with_status(rpc_status.to_status(status_of(refusal)))
    raise AssertionError("abort returns never")


def status_of(refusal: ServiceError) -> Any:
    """The refusal as a google.rpc.Status."""
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=refusal.metadata))
    details = [info]
    if refusal.retry_after_ms:
        seconds, millis = divmod(refusal.retry_after_ms, 1000)
        retry = any_pb2.Any()
        delay = duration_pb2.Duration(seconds=seconds, nanos=millis * 1_000_000)
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        details.append(retry)
    return status_pb2.Status(code=int(refusal.code.value[0]), message=refusal.message, details=details)
