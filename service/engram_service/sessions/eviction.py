"""Which sessions leave a full arena when others wait for their slots. Pure; residency.py asks.

The longest unused leave first. Yet one that stepped a moment ago is likely to step again, and would have to be read back at
once: it stays for `GRACE_S`, about what reading back costs. Not for ever, since then sessions that step in loops would keep the
others out: once it has been there for `TURN_S`, it may go as soon as nothing of it is under way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GRACE_S = 0.004
TURN_S = 0.1


def leaving(
    used: NDArray[Any], since: NDArray[np.float64], still: NDArray[np.bool_], now: float, count: int
) -> NDArray[np.intp]:
    """At most `count` residents, by place, longest unused first.

    used: when each was last used; since: when it came; still: whether nothing of it is under way, or volatile.
    """
    may_go = np.flatnonzero(still & ((used <= now - GRACE_S) | (since <= now - TURN_S)))
    ordered: NDArray[np.intp] = may_go[np.argsort(used[may_go], kind="stable")][:count]
    return ordered
