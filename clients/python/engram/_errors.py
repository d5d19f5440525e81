"""What can go wrong, as one small tree. Every error of the SDK is an EngramError.

    EngramError                the root: reason, code, retry_after, metadata
      InvalidInput             INVALID_ARGUMENT     can never succeed as it is; raised before anything is sent where possible
      NotFound                 NOT_FOUND            no such model, version or session
      AlreadyExists            ALREADY_EXISTS
      FailedPrecondition       FAILED_PRECONDITION  right request, wrong state
      Aborted                  ABORTED              the session is no longer this client's
        TakenOver                                   a newer open holds it
        SessionClosed                               closed or expired
      ResourceExhausted        RESOURCE_EXHAUSTED   a limit; retried by the SDK until the timeout
      DeadlineExceeded         DEADLINE_EXCEEDED    the caller's timeout; a step may still have been applied
      Unavailable              UNAVAILABLE          server or store away; retried by the SDK until the timeout
      AccessDenied             UNAUTHENTICATED, PERMISSION_DENIED
      Unsupported              UNIMPLEMENTED
      DataLoss                 DATA_LOSS            the record is gone, unusable, or older than what was answered
      Internal                 INTERNAL
      ClientClosed             CANCELLED            this client was closed

`of_detail` maps the errors of rows inside a stream; _status.py maps failed RPCs. Nothing else makes errors of foreign ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from engram.v1 import error_pb2


class EngramError(Exception):
    """The root of the tree.

    Attributes:
        reason: machine-readable, e.g. "NON_FINITE_INPUT"; the names of engram.v1.ErrorReason without their prefix, and
            a few of the client's own: CONNECTION_LOST, CLIENT_CLOSED, STATE_REWOUND,
            TOKEN_IN_PLAIN_TEXT, TOKEN_UNAVAILABLE, FORKED, OTHER_EVENT_LOOP, PATCHED_THREADS.
        code: the canonical gRPC code's name, e.g. "INVALID_ARGUMENT".
        retry_after: seconds after which the server asked to try again; None if it did not say.
        metadata: further machine-readable facts.
        rows: after `step_many`: the error of each row that failed; empty otherwise.
        outputs: after `step_many`: the outputs [n, ...] of the rows that did not fail (the others are zero); else None.
    """

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.reason = reason or self.code
        self.retry_after = retry_after
        self.metadata: dict[str, str] = dict(metadata or {})
        self.rows: dict[int, EngramError] = {}
        self.outputs: NDArray[Any] | None = None

    @property
    def message(self) -> str:
        """What was wrong, where, and what to do."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"

    def copy(self) -> EngramError:
        """The same error as a new object: one object must not be raised to two callers."""
        return type(self)(
            self.message, reason=self.reason, code=self.code, retry_after=self.retry_after, metadata=self.metadata
        )


class InvalidInput(EngramError, ValueError):
    """Can never succeed as it is."""

    default_code = "INVALID_ARGUMENT"


class NotFound(EngramError):
    """There is no such model, version or session."""

    default_code = "NOT_FOUND"


class AlreadyExists(EngramError):
    """The name is taken."""

    default_code = "ALREADY_EXISTS"


class FailedPrecondition(EngramError):
    """The right request in the wrong state."""

    default_code = "FAILED_PRECONDITION"


class Aborted(EngramError):
    """The session is no longer this client's."""

    default_code = "ABORTED"


class TakenOver(Aborted):
    """A newer open holds the session. Open it again to take it back."""


class SessionClosed(Aborted):
    """The session was closed, or has expired."""


class ResourceExhausted(EngramError):
    """A limit was reached and stayed reached until the timeout."""

    default_code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(EngramError, TimeoutError):
    """The timeout passed. A step that had been sent may still be applied; the session stays usable."""

    default_code = "DEADLINE_EXCEEDED"


class Unavailable(EngramError):
    """The server or its store was away, and stayed away until the timeout."""

    default_code = "UNAVAILABLE"


class AccessDenied(EngramError):
    """The server does not accept these credentials."""

    default_code = "PERMISSION_DENIED"


class Unsupported(EngramError):
    """The server does not know this call."""

    default_code = "UNIMPLEMENTED"


class DataLoss(EngramError):
    """The session's record is gone, unusable, or older than what had been answered."""

    default_code = "DATA_LOSS"


class Internal(EngramError):
    """The server failed."""

    default_code = "INTERNAL"


class ClientClosed(EngramError):
    """This client was closed."""

    default_code = "CANCELLED"


CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip

_BY_CODE: dict[str, type[EngramError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": FailedPrecondition,
    "ABORTED": Aborted,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": Unavailable,
    "UNAUTHENTICATED": AccessDenied,
    "PERMISSION_DENIED": AccessDenied,
    "UNIMPLEMENTED": Unsupported,
    "DATA_LOSS": DataLoss,
    "INTERNAL": Internal,
}
_BY_REASON: dict[str, type[EngramError]] = {"TAKEN_OVER": TakenOver, "SESSION_CLOSED": SessionClosed}

# Codes after which the same request may succeed later without the caller changing anything.
RETRYABLE = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})


def make_error(
    code: int,
    message: str,
    reason: str = "",
    retry_after: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> EngramError:
    """The error for a canonical code (a number) and a reason."""
    name = CODES[code] if 0 <= code < len(CODES) else "UNKNOWN"
    kind = _BY_REASON.get(reason) or _BY_CODE.get(name, EngramError)
    return kind(message, reason=reason, code=name, retry_after=retry_after, metadata=metadata)


def of_detail(detail: error_pb2.ErrorDetail) -> EngramError:
    """The error that a row's ErrorDetail stands for."""
    retry_after = detail.retry_after_ms / 1000 if detail.retry_after_ms else None
    return make_error(detail.code, detail.message, detail.reason, retry_after, detail.metadata)
