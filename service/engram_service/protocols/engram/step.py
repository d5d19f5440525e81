"""Unary steps: one call, some rows, their outputs. In the process that has the sessions. Raises ServiceError; server.py maps it."""

from __future__ import annotations

import time

import numpy as np

from engram.v1 import session_pb2
from engram_service.catalog import Catalog, Served
from engram_service.errors import InvalidArgumentError, no_session
from engram_service.protocols.engram.call import Call
from engram_service.protocols.engram.unary_stream import Asked, UnaryStream
from engram_service.rows import rows_of
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.constants import starting_state
from engram_service.sessions.ids import check_id
from engram_service.settings import Settings
from engram_service.store import SessionInfo, Store

_ROWS_MAX = 32


class StepHandler:
    """The method Step. Session ids in requests are keys: see confine.py."""

    def __init__(
        self, settings: Settings, catalog: Catalog, store: Store, calls: StoreCalls, unary: UnaryStream
    ) -> None:  # fmt: skip
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._calls = calls
        self._unary = unary

    async def step(self, request: session_pb2.StepRequest, call: Call) -> session_pb2.StepResponse:
        check_id(request.session_id)
        model, version = request.model, request.version
        if not model:
            model, version = await self._model_of(request.session_id)
        served = self._catalog.resolve(model, version)
        starting_state(served, request.constants)  # refused alike, whether or not the session is there
        inputs, rows = _inputs(request, served)
        if not rows and not request.generate:
            raise InvalidArgumentError("INVALID_INPUT_WIDTH", "no input rows and nothing to generate")
        if rows + request.generate > min(_ROWS_MAX, served.arena.window):
            limit = min(_ROWS_MAX, served.arena.window)
            raise InvalidArgumentError(
                "FRAME_TOO_LARGE", f"{rows + request.generate} steps in one call; at most {limit}, or use the stream"
            )
        asked = Asked(
            request.session_id,
            model,
            request.version,
            inputs,
            rows,
            request.seq,
            request.prefill,
            request.generate,
            call.left_s,
            request.constants,
        )
        seq, outputs = await self._unary.step(asked)
        gives = rows_of(served.bundle.schema.outputs)
        response = session_pb2.StepResponse(seq=seq)
        if not request.prefill:
            response.shape.extend(gives.shape(len(outputs)))
            if request.raw:
                response.raw_outputs = outputs.tobytes()
            else:
                response.outputs.extend(gives.as_floats(outputs).ravel().tolist())
        return response

    async def _model_of(self, session_id: str) -> tuple[str, str]:
        """The model version that a session is on. Raises NotFoundError."""
        deadline = time.monotonic() + self._settings.step_timeout_s
        info: SessionInfo | None = await self._calls.call(deadline, self._store.describe, session_id)
        if info is None:
            raise no_session(session_id)
        return info.model, info.version


def _inputs(request: session_pb2.StepRequest, served: Served) -> tuple[bytes, int]:
    """The request's input rows as bytes of the model's dtypes, and how many they are."""
    takes = rows_of(served.bundle.schema.inputs)
    given, whole, unit = (
        (len(request.raw_inputs), takes.nbytes, "bytes")
        if request.raw_inputs
        else (len(request.inputs), takes.size, "values")
    )
    rows = given // whole if whole else 0
    if rows * whole != given:
        message = f"model {served.reference} takes {takes} a step: {given} {unit} are not whole rows of {whole}"
        raise InvalidArgumentError("INVALID_INPUT_WIDTH", message)
    if request.raw_inputs:
        return request.raw_inputs, rows
    try:
        return takes.of_floats(np.array(request.inputs, np.float32).reshape(rows, whole)).tobytes(), rows
    except ValueError as error:
        raise InvalidArgumentError("INVALID_INPUT_DTYPE", f"model {served.reference}: {error}") from error
