from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class StorePatternsRequest(_message.Message):
    __slots__ = ("session_id", "operation_id", "size", "patterns", "labels")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    operation_id: bytes
    size: int
    patterns: bytes
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[str] = ..., operation_id: _Optional[bytes] = ..., size: _Optional[int] = ..., patterns: _Optional[bytes] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...

class StorePatternsResponse(_message.Message):
    __slots__ = ("stored", "first_number", "count", "load", "warning")
    STORED_FIELD_NUMBER: _ClassVar[int]
    FIRST_NUMBER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    stored: int
    first_number: int
    count: int
    load: float
    warning: str
    def __init__(self, stored: _Optional[int] = ..., first_number: _Optional[int] = ..., count: _Optional[int] = ..., load: _Optional[float] = ..., warning: _Optional[str] = ...) -> None: ...

class ForgetPatternsRequest(_message.Message):
    __slots__ = ("session_id", "operation_id", "labels", "all")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    operation_id: bytes
    labels: _containers.RepeatedScalarFieldContainer[str]
    all: bool
    def __init__(self, session_id: _Optional[str] = ..., operation_id: _Optional[bytes] = ..., labels: _Optional[_Iterable[str]] = ..., all: _Optional[bool] = ...) -> None: ...

class ForgetPatternsResponse(_message.Message):
    __slots__ = ("forgotten", "count", "load")
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    forgotten: int
    count: int
    load: float
    def __init__(self, forgotten: _Optional[int] = ..., count: _Optional[int] = ..., load: _Optional[float] = ...) -> None: ...

class RecallRequest(_message.Message):
    __slots__ = ("session_id", "size", "cues", "unknown", "synchronous", "seed", "sweeps_max")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CUES_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    SYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SWEEPS_MAX_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    size: int
    cues: bytes
    unknown: bytes
    synchronous: bool
    seed: int
    sweeps_max: int
    def __init__(self, session_id: _Optional[str] = ..., size: _Optional[int] = ..., cues: _Optional[bytes] = ..., unknown: _Optional[bytes] = ..., synchronous: _Optional[bool] = ..., seed: _Optional[int] = ..., sweeps_max: _Optional[int] = ...) -> None: ...

class RecallResponse(_message.Message):
    __slots__ = ("patterns", "labels", "overlaps", "distances", "sweeps", "converged", "spurious", "energies")
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    OVERLAPS_FIELD_NUMBER: _ClassVar[int]
    DISTANCES_FIELD_NUMBER: _ClassVar[int]
    SWEEPS_FIELD_NUMBER: _ClassVar[int]
    CONVERGED_FIELD_NUMBER: _ClassVar[int]
    SPURIOUS_FIELD_NUMBER: _ClassVar[int]
    ENERGIES_FIELD_NUMBER: _ClassVar[int]
    patterns: bytes
    labels: _containers.RepeatedScalarFieldContainer[str]
    overlaps: bytes
    distances: bytes
    sweeps: bytes
    converged: bytes
    spurious: bytes
    energies: bytes
    def __init__(self, patterns: _Optional[bytes] = ..., labels: _Optional[_Iterable[str]] = ..., overlaps: _Optional[bytes] = ..., distances: _Optional[bytes] = ..., sweeps: _Optional[bytes] = ..., converged: _Optional[bytes] = ..., spurious: _Optional[bytes] = ..., energies: _Optional[bytes] = ...) -> None: ...

class ListPatternsRequest(_message.Message):
    __slots__ = ("session_id", "page_size", "page_token", "with_patterns")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WITH_PATTERNS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    page_size: int
    page_token: str
    with_patterns: bool
    def __init__(self, session_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., with_patterns: _Optional[bool] = ...) -> None: ...

class ListPatternsResponse(_message.Message):
    __slots__ = ("labels", "patterns", "next_page_token", "count", "load", "size", "rule")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    patterns: bytes
    next_page_token: str
    count: int
    load: float
    size: int
    rule: str
    def __init__(self, labels: _Optional[_Iterable[str]] = ..., patterns: _Optional[bytes] = ..., next_page_token: _Optional[str] = ..., count: _Optional[int] = ..., load: _Optional[float] = ..., size: _Optional[int] = ..., rule: _Optional[str] = ...) -> None: ...

class AddressMemoryRequest(_message.Message):
    __slots__ = ("session_id", "keys", "strengths")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STRENGTHS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: bytes
    strengths: bytes
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[bytes] = ..., strengths: _Optional[bytes] = ...) -> None: ...

class AddressMemoryResponse(_message.Message):
    __slots__ = ("seq", "weightings", "reads", "slots", "width")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    WEIGHTINGS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    seq: int
    weightings: bytes
    reads: bytes
    slots: int
    width: int
    def __init__(self, seq: _Optional[int] = ..., weightings: _Optional[bytes] = ..., reads: _Optional[bytes] = ..., slots: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class RecreateRequest(_message.Message):
    __slots__ = ("model", "version", "session_id", "inputs", "unknown", "sweeps")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    SWEEPS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    session_id: str
    inputs: bytes
    unknown: bytes
    sweeps: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., session_id: _Optional[str] = ..., inputs: _Optional[bytes] = ..., unknown: _Optional[bytes] = ..., sweeps: _Optional[int] = ...) -> None: ...

class RecreateResponse(_message.Message):
    __slots__ = ("recreations", "energies")
    RECREATIONS_FIELD_NUMBER: _ClassVar[int]
    ENERGIES_FIELD_NUMBER: _ClassVar[int]
    recreations: bytes
    energies: bytes
    def __init__(self, recreations: _Optional[bytes] = ..., energies: _Optional[bytes] = ...) -> None: ...
