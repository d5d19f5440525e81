"""Looks at bundles before they are loaded: are the files what they say, and how may rows be batched? For the manager, and for a
data process whose manager does not. Imports no ONNX Runtime: what runs a graph is a process of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram_models.bundle import Bundle, BundleError, load_bundle
from engram_service.niceness import NICENESS
from engram_service.queries import Queries
from engram_service.runtimes.findings import Findings
from engram_service.settings import Settings


class Examiner:
    """One bundle at a time."""

    def __init__(self, settings: Settings) -> None:
        self._findings = Findings(settings.cache_directory() / "examinations")
        self._turn = asyncio.Lock()
        self._read: dict[Path, tuple[Bundle, Queries]] = {}

    async def examine(self, path: str, rows_max: int, onnx_runtime: str, behind: int) -> dict[str, Any]:
        """What was found, as plain JSON: fingerprint and digest of the graph, and how it may be batched; without `rows_max` it is
        read alone. Or why it cannot be served (`refused`), and whether that may pass by itself (`passing`)."""
        async with self._turn:
            return await asyncio.to_thread(self._examined, Path(path), rows_max, onnx_runtime, behind)

    def taken(self, path: Path, fingerprint: str) -> tuple[Bundle, Queries] | None:
        """What was read of a bundle, once, so that it need not be read again."""
        read = self._read.pop(path, None)
        return read if read is not None and read[0].fingerprint == fingerprint else None

    def stop(self) -> None:
        """What is under way ends soon, with an error."""
        self._findings.stopped.set()

    def _examined(self, path: Path, rows_max: int, onnx_runtime: str, behind: int) -> dict[str, Any]:
        self._read.pop(path, None)
        try:
            bundle = load_bundle(path, whole=False)
            asked = rows_max and bundle.graph
            if not asked or self._findings.kept(bundle, rows_max, onnx_runtime) is not None:
                bundle = load_bundle(path)  # else whoever examines it reads all of it
            found = {"fingerprint": bundle.fingerprint, "graph": bundle.graph}
            if asked:
                found |= asdict(self._findings.of(bundle, rows_max, onnx_runtime, behind, NICENESS))
            read = bundle, Queries(bundle)  # what its weights do not fit is not served
        except Exception as error:  # whatever it is, it is this bundle's
            why = str(error) if isinstance(error, BundleError) else f"{type(error).__name__}: {error}"
            return {"refused": why, "passing": isinstance(error, BundleError) and error.passing}
        self._read[path] = read
        return found
