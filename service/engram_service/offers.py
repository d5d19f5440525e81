"""The models that are served, as those see them who do not run them: the manager, which is told of them by the data processes."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.v1 import model_pb2
from engram_models.bundle import Bundle, BundleError, load_bundle
from engram_service.errors import NotFoundError
from engram_service.queries import Queries
from engram_service.store import RecordLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """One model version."""

    bundle: Bundle
    layout: RecordLayout
    queries: Queries
    description: model_pb2.Model

    @property
    def reference(self) -> str:
        return f"{self.bundle.name}/{self.bundle.version}"


class Offers:
    """Models by name and version. Event loop only, but for `resolve`."""

    def __init__(self, read: Callable[[Path, str], tuple[Bundle, Queries] | None] = lambda *_: None) -> None:
        """`read`: what was just read of a bundle, by path and fingerprint."""
        self._read = read
        self._told: list[model_pb2.Model] = []
        self._of: dict[tuple[str, str], Offer] = {}
        self._turn = asyncio.Lock()

    async def hear(self, models: Sequence[dict[str, Any]]) -> None:
        """What a data process serves, in the order of loading: its path, and its description as bytes in base64."""
        async with self._turn:
            told, known = [], {}
            for model in models:
                description = model_pb2.Model.FromString(base64.b64decode(model["description"]))
                key = description.name, description.version
                before = self._of.get(key)
                try:
                    if before is None or before.bundle.fingerprint != description.fingerprint:
                        offer = await self._made(Path(model["path"]), description)
                    else:
                        offer = Offer(before.bundle, before.layout, before.queries, description)
                except (BundleError, OSError) as error:
                    log.error("model %s/%s is served, and its files cannot be read: %s", *key, error)
                    continue
                known[key] = offer
                told.append(description)
            self._of, self._told = known, told

    async def _made(self, path: Path, description: model_pb2.Model) -> Offer:
        """Raises BundleError, OSError."""
        if (read := self._read(path, description.fingerprint)) is None:
            read = await asyncio.to_thread(_read, path)
        bundle, queries = read
        if bundle.fingerprint != description.fingerprint:
            raise BundleError(f"{path}: the files are not those that are served, which stay until a restart")
        layout = RecordLayout(bundle.fingerprint, bundle.schema.state_nbytes, bundle.schema.output_nbytes)
        return Offer(bundle, layout, queries, description)

    def resolve(self, name: str, version: str = "") -> Offer:
        """The named version, or the latest. Raises NotFoundError."""
        told = self._told
        if not version:
            version = next((one.version for one in told if one.name == name and one.latest), "")
        if (offer := self._of.get((name, version))) is not None:
            return offer
        raise no_model(name, version, [(one.name, one.version) for one in told])

    def describe(self, offer: Offer) -> model_pb2.Model:
        return offer.description

    def describe_all(self) -> list[model_pb2.Model]:
        return sorted(self._told, key=lambda one: one.name)


def no_model(name: str, version: str, served: Sequence[tuple[str, str]]) -> NotFoundError:
    """What is said of a model that is not served; `served` are names and versions."""
    versions = [one for known, one in served if known == name]
    if not versions:
        names = ", ".join(sorted({known for known, _ in served})) or "none"
        return NotFoundError("MODEL_NOT_FOUND", f"no model {name!r} is served; there are: {names}", model=name)
    told = f"model {name!r} has no version {version!r}; it has: {', '.join(versions)}"
    return NotFoundError("VERSION_NOT_FOUND", told, model=name)


def _read(path: Path) -> tuple[Bundle, Queries]:
    bundle = load_bundle(path)
    return bundle, Queries(bundle)
