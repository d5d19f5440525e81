"""Models with a memory, addressing, windows and counters as state are served like any other, through a kill -9 too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import engram
from engram_models import NTM, Bidirectional, Cell, write_bundle

KINDS: dict[str, Callable[[], Cell]] = {
    "ntm": lambda: NTM(9, 8, 30, slots=32, width=10, read_heads=2, activation="sigmoid"),
    "bidirectional": lambda: Bidirectional(9, 20, 4, output_size=8, activation="softmax"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_outlives_its_server(kind: str, server_with, tmp_path) -> None:
    torch.manual_seed(4)
    cell = KINDS[kind]().eval()
    write_bundle(tmp_path / "models", kind, "1", cell)
    xs = np.random.default_rng(3).standard_normal((20, 9), np.float32)
    with torch.inference_mode():
        expected, state = cell.sequence(torch.from_numpy(xs).expand(4, -1, -1))
    with server_with("--models", str(tmp_path / "models")) as server, engram.Client(server.address) as client:
        undisturbed = client.open(kind).run(xs)
        session = client.open(kind, session_id="kept")
        first = session.run(xs[:11])
        server.restart()
        rest = session.run(xs[11:])
        kept = session.state()
    assert np.array_equal(np.concatenate((first, rest)), undisturbed)
    np.testing.assert_allclose(undisturbed, expected[0].numpy(), atol=1e-5)
    assert list(kept) == [spec.name for spec in cell.state_schema]
    for spec, tensor in zip(cell.state_schema, state, strict=True):
        np.testing.assert_allclose(kept[spec.name], tensor[0].numpy(), atol=1e-5)
