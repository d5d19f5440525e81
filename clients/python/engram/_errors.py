"""What can go wrong, as one small tree. Every error of the SDK is an EngramError.

    EngramError                the root: reason, code, retry_after, metadata
      InvalidInputError        INVALID_ARGUMENT     can never succeed as it is; raised before anything is sent where possible
      NotFoundError            NOT_FOUND            no such model, version or session
      AlreadyExistsError       ALREADY_EXISTS
      FailedPreconditionError  FAILED_PRECONDITION  right request, wrong state
      AbortedError             ABORTED              the session is no longer this client's
        TakenOverError                              a newer open holds it
        SessionClosedError                          closed or expired
      ResourceExhaustedError   RESOURCE_EXHAUSTED   a limit; retried by the SDK until the timeout
      DeadlineExceededError    DEADLINE_EXCEEDED    the caller's timeout
      UnavailableError         UNAVAILABLE          server or store away; retried by the SDK until the timeout
      AccessDeniedError        UNAUTHENTICATED, PERMISSION_DENIED
      UnsupportedError         UNIMPLEMENTED
      DataLossError            DATA_LOSS            the record is gone, unusable, or older than what was answered
      InternalError            INTERNAL
      ClientClosedError        CANCELLED            this client was closed
      CloseIncompleteError     UNKNOWN              the client was closed, and not all was done before

An error says whether its step was applied: `applied`, see there.
`of_detail` maps the errors of rows inside a stream; _status.py maps failed RPCs. Nothing else makes errors of foreign ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from engram.v1 import error_pb2


@dataclass(slots=True)
class Fate:
    """What became of a step that failed: not applied, applied, or None: it is open. Shared by the step's error, which so says
    what has been learnt since, and by _fates.py."""

    seq: int | None
    applied: bool | None


class EngramError(Exception):
    """The root of the tree.

    Attributes:
        reason: machine-readable, e.g. "NON_FINITE_INPUT"; the names of engram.v1.ErrorReason without their prefix, and
            a few of the client's own: CONNECTION_LOST, CLIENT_CLOSED, CLOSE_INCOMPLETE, STATE_REWOUND,
            TOKEN_IN_PLAIN_TEXT, TOKEN_UNAVAILABLE, FORKED, OTHER_EVENT_LOOP, PATCHED_THREADS.
        code: the canonical gRPC code's name, e.g. "INVALID_ARGUMENT".
        retry_after: seconds after which the server asked to try again; None if it did not say.
        metadata: further machine-readable facts.
        rows: after `step_many`: the error of each row that failed; empty otherwise.
        outputs: after `step_many`: the outputs [n, ...] of the rows that did not fail (the others are zero); after `run` and
            `generate`: those of the rows that were answered before the one that failed; else None. A dict of them where the model
            has several outputs.
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
        self.outputs: Any = None
        self.fate: Fate | None = None  # the SDK's own: see `seq` and `applied`

    @property
    def seq(self) -> int | None:
        """The number of the step that failed, or of the first of a call's that did; None: it was not sent, or it is no step's
        error."""
        return None if self.fate is None else self.fate.seq

    @property
    def applied(self) -> bool | None:
        """False: the step was not applied and never will be; in a call of many rows, it and those behind it. None: its fate is
        open: it was sent, and the server has not said what became of it. Looked at again later, it says what has been learnt
        since: by `Session.settle`, or by the next call of that session. True: it was applied after all."""
        return self.said_applied if self.fate is None else self.fate.applied

    @property
    def said_applied(self) -> bool | None:
        """What the server says of the one time that the step was sent: False or None."""
        said = self.metadata.get("applied")
        return False if said == "no" or (said is None and self.code not in _MAY_BE_APPLIED) else None

    @property
    def message(self) -> str:
        """What was wrong, where, and what to do."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"

    def copy(self) -> EngramError:
        """The same error as a new object, of no step yet: one object must not be raised to two callers."""
        return type(self)(
            self.message, reason=self.reason, code=self.code, retry_after=self.retry_after, metadata=self.metadata
        )

    def of_step(self, fate: Fate) -> EngramError:
        """The same error as a new object, of a step."""
        made = self.copy()
        made.fate = fate
        return made


class InvalidInputError(EngramError, ValueError):
    """Can never succeed as it is."""

    default_code = "INVALID_ARGUMENT"


class NotFoundError(EngramError):
    """There is no such model, version or session."""

    default_code = "NOT_FOUND"


class AlreadyExistsError(EngramError):
    """The name is taken."""

    default_code = "ALREADY_EXISTS"


class FailedPreconditionError(EngramError):
    """The right request in the wrong state."""

    default_code = "FAILED_PRECONDITION"


class AbortedError(EngramError):
    """The session is no longer this client's."""

    default_code = "ABORTED"


class TakenOverError(AbortedError):
    """A newer open holds the session. Open it again to take it back."""


class SessionClosedError(AbortedError):
    """The session was closed, or has expired."""


class ResourceExhaustedError(EngramError):
    """A limit was reached and stayed reached until the timeout."""

    default_code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(EngramError, TimeoutError):
    """The timeout passed. The session stays usable; `applied` says what is known of the step."""

    default_code = "DEADLINE_EXCEEDED"


class UnavailableError(EngramError):
    """The server or its store was away, and stayed away until the timeout."""

    default_code = "UNAVAILABLE"


class AccessDeniedError(EngramError):
    """The server does not accept these credentials."""

    default_code = "PERMISSION_DENIED"


class UnsupportedError(EngramError):
    """The server does not know this call."""

    default_code = "UNIMPLEMENTED"


class DataLossError(EngramError):
    """The session's record is gone, unusable, or older than what had been answered."""

    default_code = "DATA_LOSS"


class InternalError(EngramError):
    """The server failed."""

    default_code = "INTERNAL"


class ClientClosedError(EngramError):
    """This client was closed."""

    default_code = "CANCELLED"


class CloseIncompleteError(EngramError):
    """The client was closed, and not all was done before.

    Attributes:
        undetached: ids of the sessions that the server has not confirmed to have let go of. Their records stay.
        open_steps: by session id, the seq of the first step whose fate is open.
        not_durable: by session id, the last step known to be durable, where later ones were answered.
    """

    def __init__(self, message: str, **given: Any) -> None:
        super().__init__(message, **{"reason": "CLOSE_INCOMPLETE", **given})
        self.undetached: list[str] = []
        self.open_steps: dict[str, int] = {}
        self.not_durable: dict[str, int] = {}


CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip

_BY_CODE: dict[str, type[EngramError]] = {
    "INVALID_ARGUMENT": InvalidInputError,
    "OUT_OF_RANGE": InvalidInputError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "FAILED_PRECONDITION": FailedPreconditionError,
    "ABORTED": AbortedError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "UNAUTHENTICATED": AccessDeniedError,
    "PERMISSION_DENIED": AccessDeniedError,
    "UNIMPLEMENTED": UnsupportedError,
    "DATA_LOSS": DataLossError,
    "INTERNAL": InternalError,
}
_BY_REASON: dict[str, type[EngramError]] = {"TAKEN_OVER": TakenOverError, "SESSION_CLOSED": SessionClosedError}

# Codes after which the same request may succeed later without the caller changing anything.
RETRYABLE = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})

# Codes of a step that may have been applied, where the server does not say so.
_MAY_BE_APPLIED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "ABORTED", "UNKNOWN"})


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
