"""Every cell that the package has, in small, odd and layered sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_models import (
    DBN,
    GRU,
    LSTM,
    NTM,
    RBM,
    Bidirectional,
    Cell,
    GRUResetAfter,
    Hopfield,
    Normalised,
    PeepholeLSTM,
    VanillaRNN,
    write_bundle,
)

CASES: dict[str, Callable[[], Cell]] = {
    "rnn-tanh": lambda: VanillaRNN(5, 7, layers=2, output_size=3, activation="softmax"),
    "rnn-relu": lambda: VanillaRNN(5, 7, nonlinearity="relu"),
    "gru": lambda: GRU(5, 7, layers=2, output_size=3, activation="sigmoid"),
    "gru-reset-after": lambda: GRUResetAfter(5, 7, layers=2, output_size=3),
    "lstm": lambda: LSTM(5, 7, layers=3, output_size=4, activation="softmax"),
    "lstm-no-head": lambda: LSTM(3, 4),
    "lstm-peephole": lambda: PeepholeLSTM(5, 7, layers=2, output_size=3, activation="none"),
}
OTHERS: dict[str, Callable[[], Cell]] = {
    "ntm": lambda: NTM(5, 3, hidden_size=7, slots=9, width=4),
    "ntm-heads": lambda: NTM(
        5, 3, 7, "feedforward", slots=9, width=4, read_heads=2, write_heads=2, activation="sigmoid"
    ),
    "bidirectional": lambda: Bidirectional(5, 7, 3, output_size=3, activation="softmax"),
    "bidirectional-gru": lambda: Bidirectional(5, 7, 0, "gru"),
    # A Hopfield network has no gradient: it thresholds, and its weights come from its patterns.
    "hopfield-dense": lambda: hopfield(6, "dense", size=20),
    "hopfield-pseudo-inverse": lambda: hopfield(5, "pseudo-inverse", size=19),
    "hopfield-empty": lambda: Hopfield(7),
    "rbm": lambda: RBM(5, 7),
    "rbm-features": lambda: lively(RBM(5, 33, "features")),
    "dbn": lambda: lively(DBN([5, 9, 7], 3)),
    "dbn-recreate": lambda: DBN([20, 9, 7], 3, "recreate"),
    "dbn-recreate-lively": lambda: lively(DBN([64, 33, 20], 3, "recreate")),
    "normalised": lambda: scaled(Normalised(LSTM(5, 7, output_size=3), "root")),
    "normalised-classes": lambda: scaled(Normalised(GRU(5, 7, output_size=3, activation="softmax"), outputs_too=False)),
}


def lively(cell: Cell) -> Cell:
    """Weights as large as training makes them: an untrained RBM answers much the same to everything."""
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return cell


def hopfield(count: int, rule: str, size: int) -> Hopfield:
    """With random patterns."""
    patterns = np.random.default_rng(3).choice([-1, 1], (count, size))
    return Hopfield.of(patterns, [f"p{number}" for number in range(count)], rule)


def scaled(cell: Cell) -> Cell:
    """Means and scales that are not 0 and 1, of a few hundred and a few."""
    with torch.no_grad():
        for name, buffer in cell.named_buffers():
            if name.endswith("mean"):
                buffer.uniform_(200, 300)
            else:
                buffer.uniform_(2, 5)
    return cell


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """More threads than free cores would make small products slow, not different."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CASES)
def cell(request: pytest.FixtureRequest) -> Cell:
    """One cell of each sort, seeded, in evaluation mode."""
    torch.manual_seed(5)
    return CASES[request.param]().eval()


@pytest.fixture(params=[*CASES, *OTHERS])
def any_cell(request: pytest.FixtureRequest) -> Cell:
    """Beyond the deck's recurrent cells, whatever else keeps the contract."""
    torch.manual_seed(5)
    return {**CASES, **OTHERS}[request.param]().eval()


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    """A small LSTM's bundle, for spoiling."""
    torch.manual_seed(5)
    return write_bundle(tmp_path, "small", "1", LSTM(3, 4, output_size=2), "for tests")
