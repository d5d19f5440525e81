"""A cell of every kind that steps, in sizes that are no multiples of anything."""

from __future__ import annotations

from collections.abc import Callable

from engram_models import DBN, NTM, RBM, Bidirectional, Cell
from engram_models.recurrent import KINDS

_SIZES = {"two-layers": {"layers": 2, "output_size": 3, "activation": "softmax"}, "generates": {"output_size": 5}}


def _recurrent(kind: type[Cell], size: dict[str, object]) -> Callable[[], Cell]:
    return lambda: kind.from_config({"input_size": 5, "hidden_size": 33, **size})


CELLS: dict[str, Callable[[], Cell]] = {
    **{f"{kind.kind}-{name}": _recurrent(kind, size) for kind in KINDS for name, size in _SIZES.items()},
    "ntm": lambda: NTM(5, 5, slots=128, width=20),
    "ntm-heads": lambda: NTM(
        5, 3, 33, "feedforward", slots=17, width=7, read_heads=2, write_heads=2, activation="softmax"
    ),
    "bidirectional": lambda: Bidirectional(5, 33, 4, output_size=5),
    "bidirectional-gru": lambda: Bidirectional(5, 33, 0, "gru", output_size=3, activation="sigmoid"),
    "rbm": lambda: RBM(5, 33),
    "dbn": lambda: DBN([5, 33, 20], 3),
}
