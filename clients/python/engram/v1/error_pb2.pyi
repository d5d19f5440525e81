from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_FRAME: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_INPUT_WIDTH: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_INPUT_DTYPE: _ClassVar[ErrorReason]
    ERROR_REASON_NON_FINITE_INPUT: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_HANDLE: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_SESSION_ID: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_SEQ: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_ARGUMENT: _ClassVar[ErrorReason]
    ERROR_REASON_FRAME_TOO_LARGE: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_EXPORT: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_PATTERN: _ClassVar[ErrorReason]
    ERROR_REASON_CUE_ALL_MASKED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_CONSTANT: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_VERSION_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_SESSION_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_LABEL: _ClassVar[ErrorReason]
    ERROR_REASON_SESSION_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_DUPLICATE_LABEL: _ClassVar[ErrorReason]
    ERROR_REASON_SESSION_OF_OTHER_MODEL: _ClassVar[ErrorReason]
    ERROR_REASON_FINGERPRINT_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_SEQ_GAP: _ClassVar[ErrorReason]
    ERROR_REASON_SEQ_ACKNOWLEDGED: _ClassVar[ErrorReason]
    ERROR_REASON_CANNOT_GENERATE: _ClassVar[ErrorReason]
    ERROR_REASON_INCOMPATIBLE_VERSION: _ClassVar[ErrorReason]
    ERROR_REASON_UNSUPPORTED_OPERATION: _ClassVar[ErrorReason]
    ERROR_REASON_MEMORY_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_EMPTY_MEMORY: _ClassVar[ErrorReason]
    ERROR_REASON_TAKEN_OVER: _ClassVar[ErrorReason]
    ERROR_REASON_SESSION_CLOSED: _ClassVar[ErrorReason]
    ERROR_REASON_QUEUE_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_REPLY_WINDOW_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_SESSIONS: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_STREAMS: _ClassVar[ErrorReason]
    ERROR_REASON_TENANT_LIMIT: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_STORE_UNAVAILABLE: _ClassVar[ErrorReason]
    ERROR_REASON_STORE_OUT_OF_MEMORY: _ClassVar[ErrorReason]
    ERROR_REASON_DRAINING: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_PAUSED: _ClassVar[ErrorReason]
    ERROR_REASON_RECORD_CORRUPTED: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_TOKEN_MISSING: _ClassVar[ErrorReason]
    ERROR_REASON_TOKEN_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_TOKEN_EXPIRED: _ClassVar[ErrorReason]
    ERROR_REASON_RIGHT_MISSING: _ClassVar[ErrorReason]
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_FRAME: ErrorReason
ERROR_REASON_INVALID_INPUT_WIDTH: ErrorReason
ERROR_REASON_INVALID_INPUT_DTYPE: ErrorReason
ERROR_REASON_NON_FINITE_INPUT: ErrorReason
ERROR_REASON_INVALID_HANDLE: ErrorReason
ERROR_REASON_INVALID_SESSION_ID: ErrorReason
ERROR_REASON_INVALID_SEQ: ErrorReason
ERROR_REASON_INVALID_ARGUMENT: ErrorReason
ERROR_REASON_FRAME_TOO_LARGE: ErrorReason
ERROR_REASON_INVALID_EXPORT: ErrorReason
ERROR_REASON_INVALID_PATTERN: ErrorReason
ERROR_REASON_CUE_ALL_MASKED: ErrorReason
ERROR_REASON_INVALID_CONSTANT: ErrorReason
ERROR_REASON_MODEL_NOT_FOUND: ErrorReason
ERROR_REASON_VERSION_NOT_FOUND: ErrorReason
ERROR_REASON_SESSION_NOT_FOUND: ErrorReason
ERROR_REASON_UNKNOWN_LABEL: ErrorReason
ERROR_REASON_SESSION_EXISTS: ErrorReason
ERROR_REASON_DUPLICATE_LABEL: ErrorReason
ERROR_REASON_SESSION_OF_OTHER_MODEL: ErrorReason
ERROR_REASON_FINGERPRINT_MISMATCH: ErrorReason
ERROR_REASON_SEQ_GAP: ErrorReason
ERROR_REASON_SEQ_ACKNOWLEDGED: ErrorReason
ERROR_REASON_CANNOT_GENERATE: ErrorReason
ERROR_REASON_INCOMPATIBLE_VERSION: ErrorReason
ERROR_REASON_UNSUPPORTED_OPERATION: ErrorReason
ERROR_REASON_MEMORY_FULL: ErrorReason
ERROR_REASON_EMPTY_MEMORY: ErrorReason
ERROR_REASON_TAKEN_OVER: ErrorReason
ERROR_REASON_SESSION_CLOSED: ErrorReason
ERROR_REASON_QUEUE_FULL: ErrorReason
ERROR_REASON_REPLY_WINDOW_FULL: ErrorReason
ERROR_REASON_TOO_MANY_SESSIONS: ErrorReason
ERROR_REASON_TOO_MANY_STREAMS: ErrorReason
ERROR_REASON_TENANT_LIMIT: ErrorReason
ERROR_REASON_DEADLINE_EXCEEDED: ErrorReason
ERROR_REASON_STORE_UNAVAILABLE: ErrorReason
ERROR_REASON_STORE_OUT_OF_MEMORY: ErrorReason
ERROR_REASON_DRAINING: ErrorReason
ERROR_REASON_MODEL_PAUSED: ErrorReason
ERROR_REASON_RECORD_CORRUPTED: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_TOKEN_MISSING: ErrorReason
ERROR_REASON_TOKEN_UNKNOWN: ErrorReason
ERROR_REASON_TOKEN_EXPIRED: ErrorReason
ERROR_REASON_RIGHT_MISSING: ErrorReason

class ErrorDetail(_message.Message):
    __slots__ = ("code", "reason", "message", "retry_after_ms", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    retry_after_ms: int
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...
