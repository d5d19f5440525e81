"""The content-addressable memory of a Hopfield network: patterns with labels, and recall from a damaged cue.

One PatternMemory is the content of one store. The service keeps one for each session whose memory is in use, which begins as
a copy of the one that the model comes with, `own_memory`. No torch: numpy, and faiss for the search where it is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models import pattern_bits
from engram_models.pattern_bits import PatternError, check_bits, checked_cues, unpack
from engram_models.pattern_recall import Rest, settle_at_once, settle_densely, settle_in_turn
from engram_models.pattern_rules import CLASSICAL_SIZE_MAX, RULES, Weights, load_warning
from engram_models.pattern_search import PatternSearch

PATTERNS_MAX = 1_000_000
LABEL_BYTES_MAX = 256
SIZE_MAX = 1 << 20  # units of a pattern
BETA = 4.0
"""Above ln(P)/4 for any P up to 8 million: there the nearest pattern wins wherever it leads by two bits."""
_LABEL_NBYTES = 200  # of a label in its list and its dict, about


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """What a cue brought back."""

    pattern: NDArray[np.int8]  # [N], -1 and +1
    energies: NDArray[np.float64]  # [sweeps + 1]: before the first sweep and after each
    sweeps: int  # the last of them, where it converged, changed nothing
    converged: bool
    label: str  # of the nearest stored pattern; of equally near ones, the first that was stored
    overlap: float  # with it: (1/N) sum_i s_i p_i, -1 .. 1
    distance: int  # units in which it differs from it
    spurious: bool  # the end is no stored pattern: a mixture, or a stored pattern's negative


class PatternMemory:
    """Patterns of `size` units with distinct labels, under one rule.

    `beta` is the dense rule's inverse temperature; the others have none. Recalls may run at the same time as one another,
    but not as `add` or `remove`. Raises ValueError where the arguments do not fit.
    """

    def __init__(self, size: int, rule: str = "dense", beta: float = BETA, patterns_max: int = PATTERNS_MAX) -> None:
        if rule not in RULES:
            raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
        if size < 1 or patterns_max < 1:
            raise ValueError(f"size {size} and patterns_max {patterns_max} must be at least 1")
        if size > SIZE_MAX:
            raise ValueError(f"size {size} must be at most {SIZE_MAX}")
        if rule != "dense" and size > CLASSICAL_SIZE_MAX:
            raise ValueError(
                f"size {size}: the {rule} rule has size x size weights, at most {CLASSICAL_SIZE_MAX}; take dense"
            )
        if not (isfinite(beta) and beta > 0):
            raise ValueError(f"beta {beta} must be above 0")
        self.size, self.rule, self.beta, self.patterns_max = size, rule, beta, patterns_max
        self._search = PatternSearch(size)
        self._weights = None if rule == "dense" else Weights(size, rule)
        self._labels: list[str] = []
        self._places: dict[str, int] = {}
        self._lock = Lock()  # of the weights, which the first recall after a change brings up to date

    pack = staticmethod(pattern_bits.pack)
    unpack = staticmethod(pattern_bits.unpack)

    @property
    def count(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Sequence[str]:
        """In the order in which they were stored."""
        return self._labels

    @property
    def load(self) -> float:
        """alpha = P / N."""
        return self.count / self.size

    @property
    def nbytes(self) -> int:
        """Memory in use, about."""
        return self._search.nbytes + self.count * _LABEL_NBYTES + (self._weights.nbytes if self._weights else 0)

    @property
    def bits(self) -> NDArray[np.uint8]:
        """All patterns, packed, [count, bytes]."""
        return self._search.bits

    def copy(self) -> PatternMemory:
        """Another one of the same patterns."""
        other = PatternMemory(self.size, self.rule, self.beta, self.patterns_max)
        other.add(self.bits, self._labels)
        return other

    def contains(self, label: str) -> bool:
        return label in self._places

    def bits_of(self, labels: Iterable[str]) -> NDArray[np.uint8]:
        """[n, bytes]. Raises PatternError UNKNOWN_LABEL."""
        return self._search.bits[self._known(labels)]

    def check(self, bits: NDArray[np.uint8], labels: Sequence[str]) -> str:
        """Whether these may be added: raises PatternError INVALID_PATTERN, DUPLICATE_LABEL or MEMORY_FULL.

        Returns a warning where the load would be beyond what the rule's theory lets one recall, else "".
        """
        check_bits(bits, self.size)
        if len(bits) != len(labels):
            raise PatternError("INVALID_PATTERN", f"{len(bits)} patterns have {len(labels)} labels; give one for each")
        if len(set(labels)) != len(labels) or not self._places.keys().isdisjoint(labels):
            self._refuse_duplicate(labels)
        after = self.count + len(labels)
        if after > self.patterns_max:
            raise PatternError(
                "MEMORY_FULL",
                f"{self.count} patterns are stored and {len(labels)} more would exceed the limit of {self.patterns_max}; "
                "forget some first",
            )
        return load_warning(self.rule, self.size, after, self.beta)

    def add(self, bits: NDArray[np.uint8], labels: Sequence[str]) -> None:
        """Stores patterns that `check` let pass, [n, bytes]."""
        self._places.update(zip(labels, range(self.count, self.count + len(labels)), strict=True))
        self._labels.extend(labels)
        self._search.add(bits)

    def remove(self, labels: Iterable[str]) -> None:
        """Forgets patterns; a label that is given twice counts once. Raises PatternError UNKNOWN_LABEL, and keeps all."""
        places = self._known(labels)
        kept = np.ones(self.count, np.bool_)
        kept[places] = False
        if self._weights is not None:
            self._weights.forget(self.count, unpack(self._search.bits[~kept], self.size))
        self._search.keep(kept)
        self._labels = [label for label, stays in zip(self._labels, kept.tolist(), strict=True) if stays]
        self._places = {label: place for place, label in enumerate(self._labels)}

    def recall(
        self, cues: NDArray[Any], *, synchronous: bool = False, seed: int = 0, sweeps_max: int = 100
    ) -> list[Recalled]:
        """The states that cues [n, size] of -1, 0 and +1 come to rest in; 0 is an unknown unit.

        A cue is where the network starts, not held fast: known units may change. Asynchronous sweeps ask every unit once, in
        an order drawn from `seed` and the cue's row, the same for the same seed; synchronous ones ask all at once, may swing
        between two states and end there with `converged` false. The dense rule is always synchronous and never swings.
        Raises PatternError EMPTY_MEMORY, INVALID_PATTERN or CUE_ALL_MASKED, ValueError where sweeps_max is not at least 1.
        """
        if sweeps_max < 1:
            raise ValueError(f"sweeps_max {sweeps_max} must be at least 1")
        cues = checked_cues(cues, self.size)
        if not self.count:
            raise PatternError("EMPTY_MEMORY", "no pattern is stored, so there is nothing to recall; store some first")
        if not len(cues):
            return []
        if self._weights is None:
            rests, distances, places = settle_densely(self._search, cues, self.beta, sweeps_max)
        else:
            rests = self._settle(self._weights, cues, synchronous, seed, sweeps_max)
            found = self._search.nearest(np.stack([rest.state for rest in rests]), 1)
            distances, places = found[0][:, 0], found[1][:, 0]
        return [self._recalled(*row) for row in zip(rests, distances.tolist(), places.tolist(), strict=True)]

    def _settle(
        self, rule: Weights, cues: NDArray[np.int8], synchronous: bool, seed: int, sweeps_max: int
    ) -> list[Rest]:
        with self._lock:
            weights = rule.matrix(self._search.bits)
        if synchronous:
            return [settle_at_once(weights, cue, sweeps_max, rule.scale) for cue in cues]
        return [
            settle_in_turn(weights, cue, np.random.Generator(np.random.PCG64([seed, row])), sweeps_max, rule.scale)
            for row, cue in enumerate(cues)
        ]

    def _recalled(self, rest: Rest, distance: int, place: int) -> Recalled:
        return Recalled(
            rest.state, np.array(rest.energies), len(rest.energies) - 1, rest.converged, self._labels[place],
            1 - 2 * distance / self.size, distance, distance > 0,
        )  # fmt: skip

    def _known(self, labels: Iterable[str]) -> NDArray[np.int64]:
        try:
            return np.array([self._places[label] for label in labels], np.int64)
        except KeyError as error:
            raise PatternError(
                "UNKNOWN_LABEL", f"no pattern is labelled {error.args[0]!r}; list what is stored"
            ) from None

    def _refuse_duplicate(self, labels: Sequence[str]) -> None:
        seen: set[str] = set()
        for row, label in enumerate(labels):
            if label in seen or label in self._places:
                where = "is given twice" if label in seen else "is stored already; forget it first, or choose another"
                raise PatternError("DUPLICATE_LABEL", f"pattern {row}: the label {label!r} {where}")
            seen.add(label)


def check_labels(labels: Sequence[Any], patterns_max: int) -> None:
    """Raises ValueError where these cannot name the patterns that a model comes with."""
    if any(type(label) is not str or not 0 < len(label.encode()) <= LABEL_BYTES_MAX for label in labels):
        raise ValueError(f"labels must be strings of 1 to {LABEL_BYTES_MAX} bytes")
    if len(set(labels)) != len(labels):
        raise ValueError("labels must be distinct")
    if len(labels) > patterns_max:
        raise ValueError(f"{len(labels)} labels are more than patterns_max, which is {patterns_max}")


def own_memory(config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> PatternMemory:
    """The patterns that a Hopfield network comes with, from its bundle: the cell's config, and `patterns` bool [n, size].

    Raises ValueError or TypeError where they do not fit.
    """
    labels = config.get("labels", ())
    memory = PatternMemory(**{name: value for name, value in config.items() if name != "labels"})
    check_labels(labels, memory.patterns_max)
    patterns = weights.get("patterns", np.zeros((0, memory.size), np.bool_))
    if patterns.dtype != np.bool_ or patterns.shape != (len(labels), memory.size):
        found, expected = f"{patterns.dtype} {list(patterns.shape)}", f"bool {[len(labels), memory.size]}"
        raise ValueError(f"patterns are {found}; {len(labels)} labels name {expected}")
    memory.add(PatternMemory.pack(patterns, memory.size), labels)
    return memory
