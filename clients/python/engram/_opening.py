"""Sessions are opened: many in a few frames, again while that may succeed later."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import numpy as np

from engram._constants import Constants, Encoded, encoded
from engram._errors import RETRYABLE, EngramError, SessionClosedError, of_detail
from engram._letting_go import GOODBYE_S, LettingGo
from engram._session import Session
from engram._state import ModelLink
from engram._tensors import codec_of
from engram._types import ModelInfo
from engram.v1 import model_pb2, stream_pb2

_OPEN_ROWS = 1024  # sessions in one OpenFrame


class Opening(LettingGo):
    """The part of AsyncClient that opens sessions; where one of many fails, the others are let go of again."""

    async def _open(
        self, model: str, ids: Sequence[str], version: str, durability: int, timeout: float | None,
        constants: Sequence[Constants] = (),
    ) -> list[Session]:  # fmt: skip
        """constants: of each session, where there are any."""
        link = self._linked()
        limit_s = self._timeout(timeout)
        given = await self._encoded(model, version, constants, timeout)
        opened: list[Session | EngramError | None] = [self._already(model, name, version) for name in ids]
        new = [row for row, session in enumerate(opened) if session is None]
        deadline = None if limit_s is None else link.loop.time() + limit_s
        alike: dict[Encoded, list[int]] = {}  # one frame has one set of constants
        for row in new:
            alike.setdefault(given[row] if given else (), []).append(row)
        pieces = [
            (rows[at : at + _OPEN_ROWS], which)
            for which, rows in alike.items()
            for at in range(0, len(rows), _OPEN_ROWS)
        ]
        chunks = [chunk for chunk, _ in pieces]
        results = await asyncio.gather(
            *(
                self._open_chunk(model, [ids[row] for row in chunk], version, durability, which, deadline)
                for chunk, which in pieces
            ),
            return_exceptions=True,
        )
        for chunk, result in zip(chunks, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, EngramError):
                raise result
            for place, row in enumerate(chunk):
                opened[row] = result if isinstance(result, EngramError) else result[place]
        failed = next((one for one in opened if isinstance(one, EngramError)), None)
        good = [one for one in opened if isinstance(one, Session)]
        if failed is None:
            return good
        with contextlib.suppress(EngramError):
            created = {id(opened[row]) for row in new}
            await self._let_go([session for session in good if id(session) in created], detach=True, timeout=GOODBYE_S)
        raise failed

    async def _encoded(
        self, model: str, version: str, constants: Sequence[Constants], timeout: float | None
    ) -> list[Encoded]:
        """Constants as they are sent; none where nobody gave any. What the model has is asked of the server, if it may have
        changed since sessions of it were opened."""
        if not any(constants):
            return []
        links = self._core.models if self._link is not None and version else []
        known = (link.info for link in reversed(links) if (link.info.name, link.info.version) == (model, version))
        info = next(known, None) or await self.models.get(model, version, timeout=timeout)
        return [encoded(one, info) for one in constants]

    def _already(self, model: str, session_id: str, version: str) -> Session | None:
        if self._link is None or not session_id:
            return None
        core = self._link.core
        slot = core.table.by_id.get(session_id)
        if slot is None or slot not in self._open_sessions:
            return None
        info = core.models[int(core.table.model[slot])].info
        fits = info.name == model and version in ("", info.version)
        return self._open_sessions[slot] if fits else None

    async def _open_chunk(
        self, model: str, ids: Sequence[str], version: str, durability: int, constants: Encoded, deadline: float | None
    ) -> list[Session | EngramError]:
        """One OpenFrame, again while it may succeed later, for the rows that have not succeeded yet."""
        opened: list[Session | EngramError | None] = [None] * len(ids)
        attempt = 0
        while left := [row for row, one in enumerate(opened) if one is None]:
            frame = stream_pb2.OpenFrame(
                model=model, version=version, session_ids=[ids[row] for row in left],
                durability=stream_pb2.Durability.Name(durability),
                client_id=self._client_id, ttl_ms=self._ttl_ms(), confirms=True,
                constants=[model_pb2.Constant(name=name, data=data) for name, data in constants],
            )  # fmt: skip
            answer = await self._request(stream_pb2.StreamRequest(open=frame), deadline)
            if answer is None:
                continue  # the stream was lost: an open may be repeated
            for row, one in zip(
                left, self._take_opened(model, frame.session_ids, answer.opened, durability), strict=True
            ):
                opened[row] = one
            attempt += 1
            wait = self._again(opened, attempt, deadline)
            if wait is not None:
                await asyncio.sleep(wait)
        return [one for one in opened if one is not None]

    def _again(self, opened: list[Session | EngramError | None], attempt: int, deadline: float | None) -> float | None:
        """Clears the rows to be tried again, and says how long to wait first; None: there are none."""
        again = [row for row, one in enumerate(opened) if isinstance(one, EngramError) and one.code in RETRYABLE]
        if not again:
            return None
        hints = [one.retry_after or 0.0 for one in opened if isinstance(one, EngramError)]
        link = self._linked()
        wait = max(*hints, link._backoff(attempt))
        if deadline is not None and link.loop.time() + wait >= deadline:
            return None
        for row in again:
            opened[row] = None
        return wait

    def _take_opened(
        self, model: str, ids: Sequence[str], answer: stream_pb2.OpenedFrame, durability: int
    ) -> list[Session | EngramError]:
        refused = {row.row: of_detail(row.error) for row in answer.errors}
        core = self._core
        index = self._model_index(answer, durability) if answer.HasField("model") else -1
        handles = np.frombuffer(answer.handles, "<u4").tolist()
        seqs = np.frombuffer(answer.seqs, "<i8").tolist()
        opened: list[Session | EngramError] = []
        for row, given in enumerate(ids):
            session_id = answer.session_ids[row] if answer.session_ids else given
            if row in refused or index < 0:
                error = refused.get(row) or of_detail(stream_pb2.RowError().error)
                error.metadata.setdefault("session", session_id)
                opened.append(error)
                continue
            former = self._open_sessions.pop(core.table.by_id.get(session_id, -1), None)
            if former is not None:
                former._let_go(SessionClosedError("the session was opened again here", reason="SESSION_CLOSED"))
            interval = durability == stream_pb2.DURABILITY_INTERVAL
            slot = core.enter(session_id, index, answer.window, interval, handles[row], seqs[row])
            session = self._open_sessions[slot] = Session(self, slot, session_id)
            opened.append(session)
        return opened

    def _model_index(self, answer: stream_pb2.OpenedFrame, durability: int) -> int:
        """The link for this model version and durability; a new one for the first session of it."""
        core, info = self._core, ModelInfo.of(answer.model)
        for index, link in enumerate(core.models):
            same_version = (link.info.name, link.info.version) == (info.name, info.version)
            if same_version and link.info.fingerprint == info.fingerprint and link.durability == durability:
                return index
        row = codec_of(info.inputs, "input", info.name)
        by_bytes = max(1, self.options.frame_bytes_max // max(1, row.nbytes))
        limits = [self.options.frame_rows_max, by_bytes, *([answer.rows_max] if answer.rows_max else [])]
        output = codec_of(info.outputs, "output", info.name)
        core.models.append(ModelLink(info, durability, self._ttl_ms(), row, output, min(limits)))
        return len(core.models) - 1
