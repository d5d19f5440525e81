"""Bundles: model.toml, weights.safetensors and step.onnx of whoever writes into the models directory."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from engram_models import (
    DBN,
    GRU,
    LSTM,
    NTM,
    Bidirectional,
    BundleError,
    Hopfield,
    Normalised,
    bundle,
    cell_bundles,
    write_bundle,
)
from engram_models.bundle import GRAPH, MANIFEST, WEIGHTS
from engram_models.fingerprints import graph_digest
from targets.mutation import joined, parted

_MEMORY = Path("/dev/shm")
_SCRATCH = tempfile.TemporaryDirectory(prefix="engram-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None)
_BUNDLE = Path(_SCRATCH.name) / "some" / "1"
_BUNDLE.mkdir(parents=True)
torch.set_num_threads(1)


def seeds() -> list[bytes]:
    torch.manual_seed(5)
    patterns = np.random.default_rng(3).choice([-1, 1], (3, 12))
    cells = [
        LSTM(2, 3, output_size=2), GRU(2, 2, layers=2), NTM(2, 1, 2, slots=4, width=2), Bidirectional(1, 2, 1), DBN([4, 3, 2], 2),
        Normalised(LSTM(1, 2, output_size=1)), Hopfield.of(patterns, ["a", "b", "c"], "hebb"), Hopfield.of(patterns, ["a", "b", "c"]),
    ]  # fmt: skip
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, cell in enumerate(cells):
            path = write_bundle(Path(scratch), "m", str(number), cell)
            made.append(joined([(path / name).read_bytes() for name in (MANIFEST, WEIGHTS, GRAPH)]))
    return made


def mend(data: bytes) -> bytes:
    """The safetensors header's length, as the header says where it ends; the graph's digest."""
    parts = parted(data, 3)
    if len(parts) < 3:
        return data
    toml, tensors, graph = parts
    end = tensors.rfind(b"}}") + 2
    if end > 8:
        tensors = (
            (end - 8 + -end % 8).to_bytes(8, "little") + tensors[8:end] + b" " * (-end % 8) + tensors[end:].lstrip(b" ")
        )
    toml = re.sub(rb'graph = "[0-9a-f]{32}"', b'graph = "%s"' % graph_digest(graph).encode(), toml, count=1)
    return joined([toml, tensors, graph])


def fuzz_one(data: bytes) -> None:
    toml, *others = [*parted(data, 3), b"", b"", b""][:3]
    for name, part in zip((WEIGHTS, GRAPH), others, strict=True):
        (_BUNDLE / name).write_bytes(part)
    for _ in range(2):
        (_BUNDLE / MANIFEST).write_bytes(toml)
        try:
            # load_bundle and load_cell make a BundleError of whatever nobody has thought of: here it is a finding. No graph is run:
            # that is done in a process of its own, with limits.
            bundle._load(_BUNDLE, whole=False)
            cell_bundles._load(bundle._load(_BUNDLE, whole=True), "cpu")
        except BundleError as error:
            # Whoever changes a bundle can write down its fingerprint too.
            found = re.search(r"fingerprint (.*) is recorded, ([0-9a-f]{32}) is what", str(error), re.S)
            if found is None:
                return
            toml = toml.replace(b'fingerprint = "' + found[1].encode(), b'fingerprint = "' + found[2].encode(), 1)
        else:
            return
