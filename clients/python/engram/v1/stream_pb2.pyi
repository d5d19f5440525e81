from engram.v1 import error_pb2 as _error_pb2
from engram.v1 import model_pb2 as _model_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_STEP: _ClassVar[Durability]
    DURABILITY_INTERVAL: _ClassVar[Durability]
DURABILITY_UNSPECIFIED: Durability
DURABILITY_STEP: Durability
DURABILITY_INTERVAL: Durability

class StreamRequest(_message.Message):
    __slots__ = ("open", "attach", "steps", "acknowledge", "close", "confirm")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    open: OpenFrame
    attach: AttachFrame
    steps: StepsFrame
    acknowledge: AcknowledgeFrame
    close: CloseFrame
    confirm: ConfirmFrame
    def __init__(self, open: _Optional[_Union[OpenFrame, _Mapping]] = ..., attach: _Optional[_Union[AttachFrame, _Mapping]] = ..., steps: _Optional[_Union[StepsFrame, _Mapping]] = ..., acknowledge: _Optional[_Union[AcknowledgeFrame, _Mapping]] = ..., close: _Optional[_Union[CloseFrame, _Mapping]] = ..., confirm: _Optional[_Union[ConfirmFrame, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("opened", "outputs", "errors", "durable", "closed", "event", "confirm")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    opened: OpenedFrame
    outputs: OutputsFrame
    errors: ErrorsFrame
    durable: DurableFrame
    closed: ClosedFrame
    event: EventFrame
    confirm: ConfirmFrame
    def __init__(self, opened: _Optional[_Union[OpenedFrame, _Mapping]] = ..., outputs: _Optional[_Union[OutputsFrame, _Mapping]] = ..., errors: _Optional[_Union[ErrorsFrame, _Mapping]] = ..., durable: _Optional[_Union[DurableFrame, _Mapping]] = ..., closed: _Optional[_Union[ClosedFrame, _Mapping]] = ..., event: _Optional[_Union[EventFrame, _Mapping]] = ..., confirm: _Optional[_Union[ConfirmFrame, _Mapping]] = ...) -> None: ...

class OpenFrame(_message.Message):
    __slots__ = ("request_id", "model", "version", "session_ids", "durability", "client_id", "ttl_ms", "confirms", "constants")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    CONFIRMS_FIELD_NUMBER: _ClassVar[int]
    CONSTANTS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    model: str
    version: str
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    durability: Durability
    client_id: int
    ttl_ms: int
    confirms: bool
    constants: _containers.RepeatedCompositeFieldContainer[_model_pb2.Constant]
    def __init__(self, request_id: _Optional[int] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., session_ids: _Optional[_Iterable[str]] = ..., durability: _Optional[_Union[Durability, str]] = ..., client_id: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., confirms: _Optional[bool] = ..., constants: _Optional[_Iterable[_Union[_model_pb2.Constant, _Mapping]]] = ...) -> None: ...

class ConfirmFrame(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class AttachFrame(_message.Message):
    __slots__ = ("request_id", "model", "version", "session_ids", "durability", "client_id", "ttl_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    model: str
    version: str
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    durability: Durability
    client_id: int
    ttl_ms: int
    def __init__(self, request_id: _Optional[int] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., session_ids: _Optional[_Iterable[str]] = ..., durability: _Optional[_Union[Durability, str]] = ..., client_id: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class OpenedFrame(_message.Message):
    __slots__ = ("request_id", "handles", "seqs", "acknowledged_seqs", "created", "session_ids", "model", "window", "rows_max", "errors")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_SEQS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROWS_MAX_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    handles: bytes
    seqs: bytes
    acknowledged_seqs: bytes
    created: bytes
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    model: _model_pb2.Model
    window: int
    rows_max: int
    errors: _containers.RepeatedCompositeFieldContainer[RowError]
    def __init__(self, request_id: _Optional[int] = ..., handles: _Optional[bytes] = ..., seqs: _Optional[bytes] = ..., acknowledged_seqs: _Optional[bytes] = ..., created: _Optional[bytes] = ..., session_ids: _Optional[_Iterable[str]] = ..., model: _Optional[_Union[_model_pb2.Model, _Mapping]] = ..., window: _Optional[int] = ..., rows_max: _Optional[int] = ..., errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("row", "error")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    row: int
    error: _error_pb2.ErrorDetail
    def __init__(self, row: _Optional[int] = ..., error: _Optional[_Union[_error_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class StepsFrame(_message.Message):
    __slots__ = ("handles", "seqs", "inputs", "flags", "repeats", "acknowledged_seqs", "timeout_ms", "dtype")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    REPEATS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_SEQS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    seqs: bytes
    inputs: bytes
    flags: bytes
    repeats: bytes
    acknowledged_seqs: bytes
    timeout_ms: int
    dtype: str
    def __init__(self, handles: _Optional[bytes] = ..., seqs: _Optional[bytes] = ..., inputs: _Optional[bytes] = ..., flags: _Optional[bytes] = ..., repeats: _Optional[bytes] = ..., acknowledged_seqs: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class AcknowledgeFrame(_message.Message):
    __slots__ = ("handles", "acknowledged_seqs")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_SEQS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    acknowledged_seqs: bytes
    def __init__(self, handles: _Optional[bytes] = ..., acknowledged_seqs: _Optional[bytes] = ...) -> None: ...

class CloseFrame(_message.Message):
    __slots__ = ("request_id", "handles", "detach")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    handles: bytes
    detach: bool
    def __init__(self, request_id: _Optional[int] = ..., handles: _Optional[bytes] = ..., detach: _Optional[bool] = ...) -> None: ...

class ClosedFrame(_message.Message):
    __slots__ = ("request_id", "errors")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    errors: _containers.RepeatedCompositeFieldContainer[RowError]
    def __init__(self, request_id: _Optional[int] = ..., errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ...) -> None: ...

class OutputsFrame(_message.Message):
    __slots__ = ("handles", "seqs", "outputs", "durable_seqs")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_SEQS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    seqs: bytes
    outputs: bytes
    durable_seqs: bytes
    def __init__(self, handles: _Optional[bytes] = ..., seqs: _Optional[bytes] = ..., outputs: _Optional[bytes] = ..., durable_seqs: _Optional[bytes] = ...) -> None: ...

class ErrorsFrame(_message.Message):
    __slots__ = ("handles", "seqs", "error_indexes", "errors")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    ERROR_INDEXES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    seqs: bytes
    error_indexes: bytes
    errors: _containers.RepeatedCompositeFieldContainer[_error_pb2.ErrorDetail]
    def __init__(self, handles: _Optional[bytes] = ..., seqs: _Optional[bytes] = ..., error_indexes: _Optional[bytes] = ..., errors: _Optional[_Iterable[_Union[_error_pb2.ErrorDetail, _Mapping]]] = ...) -> None: ...

class DurableFrame(_message.Message):
    __slots__ = ("handles", "durable_seqs")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_SEQS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    durable_seqs: bytes
    def __init__(self, handles: _Optional[bytes] = ..., durable_seqs: _Optional[bytes] = ...) -> None: ...

class EventFrame(_message.Message):
    __slots__ = ("type", "handles")
    class Type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TYPE_UNSPECIFIED: _ClassVar[EventFrame.Type]
        TYPE_TAKEN_OVER: _ClassVar[EventFrame.Type]
        TYPE_CLOSED: _ClassVar[EventFrame.Type]
        TYPE_DRAINING: _ClassVar[EventFrame.Type]
    TYPE_UNSPECIFIED: EventFrame.Type
    TYPE_TAKEN_OVER: EventFrame.Type
    TYPE_CLOSED: EventFrame.Type
    TYPE_DRAINING: EventFrame.Type
    TYPE_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    type: EventFrame.Type
    handles: bytes
    def __init__(self, type: _Optional[_Union[EventFrame.Type, str]] = ..., handles: _Optional[bytes] = ...) -> None: ...
