"""Sessions that were claimed are entered into the table, each on its model version. Event loop only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.errors import DataLossError, FailedPreconditionError, NotFoundError, ServiceError
from engram_service.observability.metrics import Metrics
from engram_service.places import at
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.requests import Opened, Wanted
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares, stored_full
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import NO_STREAM, SessionTable
from engram_service.steps.refusals import taken_over
from engram_service.store import ClaimRequest, ClaimResult, ClaimStatus, damaged, session_tag


class Entering:
    """Makes rows of claims, or refusals of those that lead to none."""

    def __init__(
        self, table: SessionTable, catalog: Catalog, residency: Residency, ownership: Ownership, shares: Shares, metrics: Metrics
    ) -> None:  # fmt: skip
        self._table = table
        self._catalog = catalog
        self._residency = residency
        self._ownership = ownership
        self._shares = shares
        self._created, self._carried_on = map(metrics.sessions_opened.labels, ("created", "carried_on"))

    def enter(
        self, stream: Stream, wanted: Wanted, served: Served, good: Sequence[int], requests: Sequence[ClaimRequest],
        claims: Sequence[ClaimResult], result: Opened,
    ) -> None:  # fmt: skip
        """Enters the claims into the table. One OpenedFrame speaks of one model version: that of its first session."""
        if stream.ended:
            self._forget([request.session_id for request in requests])
            return
        members: list[int] = []
        version = result.served
        for k, claim in enumerate(claims):
            try:
                own = self._version_of(wanted, served, claim)
                version = version or own
                if own is not version:
                    message = f"the session is on {own.reference}, others of this frame on {version.reference}; open it by itself"
                    raise FailedPreconditionError(
                        "SESSION_OF_OTHER_MODEL", message, model=wanted.model, version=own.bundle.version
                    )
                members.append(k)
            except ServiceError as refusal:
                result.errors[good[k]] = refusal
                self._forget([requests[k].session_id])
        if version is not None:
            self._fill(stream, wanted, version, [good[k] for k in members], [requests[k] for k in members],
                        [claims[k] for k in members], result)  # fmt: skip
            result.served = version

    def _version_of(self, wanted: Wanted, served: Served, claim: ClaimResult) -> Served:
        """The model version that a claimed session is on. Raises ServiceError if the claim failed or it cannot be served."""
        match claim.status:
            case ClaimStatus.CREATED:
                return served
            case ClaimStatus.NOT_FOUND if not wanted.attach:
                raise stored_full(self._shares.of(wanted.tenant).stored_max)
            case ClaimStatus.NOT_FOUND:
                raise NotFoundError("SESSION_NOT_FOUND", "there is no such session; it was closed or has expired")
            case ClaimStatus.TAKEN_OVER:
                raise taken_over()
            case ClaimStatus.DAMAGED:
                raise damaged(claim.why)
            case ClaimStatus.OTHER_MODEL:
                asked = wanted.model + (f"/{wanted.version}" if wanted.version else "")
                own = f"{claim.model}/{claim.version}"
                message = f"the session is one of {own}, not of {asked}; close it, move it, or use another id"
                raise FailedPreconditionError(
                    "SESSION_OF_OTHER_MODEL", message, model=claim.model, version=claim.version
                )
            case ClaimStatus.CARRIED:
                pass
        version = self._catalog.resolve(wanted.model, claim.version)
        if version.bundle.fingerprint != claim.fingerprint:
            message = (
                f"the session was written by other weights of {version.reference}"
                f" (fingerprint {claim.fingerprint[:8]}, served {version.bundle.fingerprint[:8]}); serve those or move the session"
            )
            raise FailedPreconditionError("FINGERPRINT_MISMATCH", message)
        return version

    def _fill(
        self, stream: Stream, wanted: Wanted, served: Served, places: Sequence[int], requests: Sequence[ClaimRequest],
        claims: Sequence[ClaimResult], result: Opened,
    ) -> None:  # fmt: skip
        table = self._table
        new = [
            claim.status is ClaimStatus.CREATED and claim.record == request.initial
            for claim, request in zip(claims, requests, strict=True)
        ]
        if all(new):  # as we wrote them ourselves
            records = served.layout.begun(len(claims), wanted.start)
        else:
            records = served.layout.unpack([claim.record for claim in claims])
        sound = [k for k in range(len(claims)) if k not in records.errors]
        for k, reason in records.errors.items():
            message = f"the session's record cannot be used ({reason}); close the session to start over"
            result.errors[places[k]] = DataLossError("RECORD_CORRUPTED", message)
            self._forget([requests[k].session_id])
        if not sound:
            return
        requests, claims = [requests[k] for k in sound], [claims[k] for k in sound]
        answered = at(np.array([places[k] for k in sound]))
        rows = self._rows([request.session_id for request in requests])
        mine = at(rows)
        table.tag[mine] = _characters([session_tag(request.session_id) for request in requests])
        table.token[mine] = _characters([request.token.encode() for request in requests])
        table.epoch[mine] = [claim.epoch for claim in claims]
        table.created_ms[mine] = [claim.created_ms for claim in claims]
        table.ttl_ms[mine] = [request.ttl_ms for request in requests]
        table.client_id[mine], table.losses[mine] = wanted.client_id, result.losses
        table.handle[mine] = result.handles[answered] = [stream.handles.name(row) for row in rows.tolist()]
        result.created[answered] = [claim.status is ClaimStatus.CREATED for claim in claims]
        kept = records.only(sound) if records.errors else records
        table.model[mine] = served.index
        table.stream[mine] = stream.id
        table.interval[mine] = wanted.interval
        for name in ("admitted", "computed", "applied", "durable"):
            getattr(table, name)[mine] = kept.seq
        table.acked[mine] = kept.acked
        table.used[mine] = table.touched[mine] = self._residency.clock()
        result.seqs[answered], result.acked[answered] = kept.seq, kept.acked
        begun = np.flatnonzero(~kept.initial & (kept.seq == 0))
        self._residency.starts.enter(served, rows[begun], kept.states[begun])
        advanced = np.flatnonzero(kept.seq > 0)
        if len(advanced):
            self._residency.place_if_room(served, rows[advanced], kept.only(advanced.tolist()))
        created = int(np.count_nonzero(result.created[answered]))
        self._created.inc(created)
        self._carried_on.inc(len(rows) - created)

    def _rows(self, session_ids: Sequence[str]) -> NDArray[np.int32]:
        return np.array([self._table.add(session_id) for session_id in session_ids], np.int32)

    def _forget(self, session_ids: Sequence[str]) -> None:
        """After a claim that led to nothing here: what this server may have thought of these sessions is out of date."""
        table = self._table
        known = [row for session_id in session_ids if (row := table.find(session_id)) is not None]
        rows = np.array(known, np.int32)
        rows = rows[(table.stream[rows] == NO_STREAM) & ~table.pinned(rows)]
        if len(rows):
            self._ownership.dismiss(rows)


def _characters(texts: Sequence[bytes]) -> NDArray[np.uint8]:
    """Texts of equal length, uint8 [n, length]."""
    return np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), -1)
