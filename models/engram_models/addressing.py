"""An NTM's memory asked by content, without torch. Used by the service for whoever looks into a session's memory.

The machine itself addresses by ntm.content_addressing; the equations and their clamp are the same here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TINY = 1e-8  # of a squared norm: an empty location or key is unlike everything rather than undefined

Floats = NDArray[np.float32]


def address(memory: Floats, keys: Floats, strengths: Floats) -> tuple[Floats, Floats]:
    """Weightings [n, N] and reads [n, M] of keys [n, M] with strengths [n], in a memory [N, M].

    A weighting is softmax over the N locations of strength * cosine(key, location), a read the sum of the locations by their
    weights. Graves, Wayne and Danihelka 2014, section 3.3.1, (5) and (6), and (2). One key after the other: how a matrix library
    rounds depends on how many rows it is given, and a key's bits shall not depend on the others. In float64, rounded at the end.
    """
    weightings = np.empty((len(keys), len(memory)), np.float32)
    reads = np.empty(keys.shape, np.float32)
    wide = memory.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # a memory that is not finite gives what it gives
        norms = np.sqrt(np.einsum("nm,nm->n", wide, wide) + TINY)
        for row, (key, strength) in enumerate(zip(keys.astype(np.float64), strengths.tolist(), strict=True)):
            likeness = strength * ((wide @ key) / (np.sqrt(key @ key + TINY) * norms))
            weights = np.exp(likeness - likeness.max())
            weights /= weights.sum()
            weightings[row], reads[row] = weights, weights @ wide
    return weightings, reads
