"""A program: serves every model that ships with the package, and does with each what sessions of it can do. No torch is needed.

tests/house/test_without_torch.py runs it where there is none. Prints what it did, as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import engram
from engram_models.letters import half_replaced, letters
from engram_service.local import LocalServer

STEPS = 3


def exercise(address: str) -> dict[str, object]:
    """Every model steps; the Hopfield network recalls, the Turing machine's memory is addressed, the belief network recreates."""
    rng = np.random.default_rng(1)
    done: dict[str, object] = {}
    with engram.Client(address) as client:
        for model in client.models.list():
            session = client.open(model.name)
            (spec,) = model.inputs
            y = session.run(rng.random((STEPS, *spec.shape)).astype(spec.dtype))
            assert np.isfinite(y).all() and session.seq == STEPS, model.name
            done[model.name] = model.kind
            if model.kind == "ntm":
                width = next(one.shape[1] for one in session.model.state if one.name == "memory")
                weighting, content = session.address(np.ones(width, np.float32))
                assert abs(float(weighting.sum()) - 1) < 1e-4 and content.shape == (width,)
                done["addressed"] = True
            if model.kind == "dbn":
                x = rng.random(spec.shape).astype(np.float32)
                assert np.isfinite(session.recreate(x, np.arange(x.size) < x.size // 2).values).all()
                done["recreated"] = True
            if model.kind == "hopfield":
                labels, patterns = letters()
                found = session.recall(half_replaced(patterns, "lower", rng), seed=1)
                done["recalled"] = sum(one.label == label for one, label in zip(found, labels, strict=True))
                session.store(-patterns[:1], ["own"])
                assert session.recall(-patterns[0]).label == "own"
    return done


def loaded(pid: int, names: Sequence[str]) -> list[str]:
    """Which of these shared libraries a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [name for name in names if name in maps]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, help="further models")
    args = parser.parse_args()
    flags = ("--shipped-models", "true", "--log-level", "warning")
    with tempfile.TemporaryDirectory() as scratch, LocalServer(Path(scratch), args.models, flags) as server:
        print(json.dumps(exercise(server.address)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
