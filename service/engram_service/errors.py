"""What the server refuses, as one small tree. Every refusal carries its gRPC status code and its reason.

    ServiceError               the root: code, reason, message, retry_after_ms, metadata
      InvalidArgumentError     INVALID_ARGUMENT      the request can never succeed as it is
      NotFoundError            NOT_FOUND
      AlreadyExistsError       ALREADY_EXISTS
      FailedPreconditionError  FAILED_PRECONDITION   right request, wrong state
      AbortedError             ABORTED               someone else has the session now
      ResourceExhaustedError   RESOURCE_EXHAUSTED    a limit; try again after retry_after_ms
      DeadlineExceededError    DEADLINE_EXCEEDED
      UnavailableError         UNAVAILABLE           the store or this server is not there just now
      DataLossError            DATA_LOSS
      InternalError            INTERNAL
      UnauthenticatedError     UNAUTHENTICATED       no token, or none that is known
      PermissionDeniedError    PERMISSION_DENIED     a token without the right that the call needs

A refusal travels in two ways: protocols/engram/status.py turns it into a gRPC status with google.rpc details, and `detail()`
turns it into the ErrorDetail of a stream's row. Reasons are the names of engram.v1.ErrorReason without their prefix.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

from engram.v1 import error_pb2
from engram_service.auth.tenants import id_of


class ServiceError(Exception):
    """A request, or a row, that was not done; nothing of it was applied unless the subclass says otherwise."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, reason: str, message: str, *, retry_after_ms: int = 0, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def detail(self) -> error_pb2.ErrorDetail:
        """The refusal as a row's error inside a stream."""
        return error_pb2.ErrorDetail(
            code=int(self.code.value[0]),
            reason=self.reason,
            message=self.message,
            retry_after_ms=self.retry_after_ms,
            metadata=self.metadata,
        )


class InvalidArgumentError(ServiceError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(ServiceError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(ServiceError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPreconditionError(ServiceError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class AbortedError(ServiceError):
    code = grpc.StatusCode.ABORTED


class ResourceExhaustedError(ServiceError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceededError(ServiceError):
    """The time was up. A row that was already computed when it ran out may still be committed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnavailableError(ServiceError):
    """The store or the server is away. A row that was already computed may still be committed: repeat its seq."""

    code = grpc.StatusCode.UNAVAILABLE


class DataLossError(ServiceError):
    code = grpc.StatusCode.DATA_LOSS


class InternalError(ServiceError):
    code = grpc.StatusCode.INTERNAL


class UnauthenticatedError(ServiceError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(ServiceError):
    code = grpc.StatusCode.PERMISSION_DENIED


def no_session(key: str) -> NotFoundError:
    """There is no such session, or it is another tenant's: callers cannot tell which."""
    session_id = id_of(key)
    return NotFoundError("SESSION_NOT_FOUND", f"there is no session {session_id!r}", session=session_id)


def of_detail(detail: error_pb2.ErrorDetail) -> ServiceError:
    """The refusal that a row's ErrorDetail stands for."""
    by_code = {int(kind.code.value[0]): kind for kind in ServiceError.__subclasses__()}
    kind = by_code.get(detail.code, InternalError)
    return kind(detail.reason, detail.message, retry_after_ms=detail.retry_after_ms, **dict(detail.metadata))
