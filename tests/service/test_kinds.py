"""Models with a memory, addressing, windows, counters or nothing as state are served like any other, through a kill -9 too."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import torch

import engram
from engram_models import DBN, NTM, RBM, Bidirectional, Cell, write_bundle


def cells() -> dict[str, Cell]:
    torch.manual_seed(4)
    return {
        "ntm": NTM(9, 8, 30, slots=32, width=10, read_heads=2, activation="sigmoid").eval(),
        "bidirectional": Bidirectional(9, 20, 4, output_size=8, activation="softmax").eval(),
        "rbm": RBM(9, 20).eval(),
        "dbn": DBN([9, 20, 7], 8).eval(),
    }


def test_sessions_outlive_their_server(server_with: Callable, tmp_path: pathlib.Path) -> None:
    kinds = cells()
    for kind, cell in kinds.items():
        write_bundle(tmp_path / "models", kind, "1", cell)
    xs = np.random.default_rng(3).standard_normal((20, 9), np.float32)
    with server_with("--models", str(tmp_path / "models")) as server, engram.Client(server.address) as client:
        undisturbed = {kind: client.open(kind).run(xs) for kind in kinds}
        sessions = {kind: client.open(kind, session_id=f"kept-{kind}") for kind in kinds}
        first = {kind: session.run(xs[:11]) for kind, session in sessions.items()}
        server.restart()
        rest = {kind: session.run(xs[11:]) for kind, session in sessions.items()}
        kept = {kind: session.state() for kind, session in sessions.items()}
    for kind, cell in kinds.items():
        assert np.array_equal(np.concatenate((first[kind], rest[kind])), undisturbed[kind]), kind
        with torch.inference_mode():
            expected, state = cell.sequence(torch.from_numpy(xs).expand(4, -1, -1))
        np.testing.assert_allclose(undisturbed[kind], expected[0].numpy(), atol=1e-5)
        assert list(kept[kind]) == [spec.name for spec in cell.state_schema]
        for spec, tensor in zip(cell.state_schema, state, strict=True):
            np.testing.assert_allclose(kept[kind][spec.name], tensor[0].numpy(), atol=1e-5)
