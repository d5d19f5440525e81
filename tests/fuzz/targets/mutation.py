"""Mutations of valid inputs, the same for a seed on every machine; and several strings in one input."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from targets import Target

_EDGES = [
    0,
    1,
    2,
    7,
    8,
    63,
    64,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
_WORDS = (b"true", b"1979-05-27", b"nan", b"-1", b"[", b"[[" * 600, b"{}", b'""', b"1e400", b"0.5", b"\xc2\xb2")
_WIDTHS = (1, 2, 4, 8)
_MENDED = 0.75  # of mutated inputs: the others show that damage is found
_SIZE_MAX = 1 << 16


def mutated(target: Target, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """A seed changed in one to four places, and most often mended."""
    data = changed(rng.choice(seeds), rng, seeds)
    return target.mend(data) if rng.random() < _MENDED else data


def changed(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Bits flipped, bytes put in, taken out, repeated or exchanged, numbers set to edges, ends cut off, inputs spliced."""
    text = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(text) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 16, rng.randrange(1, 64))), len(text) - at)
        match rng.randrange(10):
            case 8 if digits := list(re.finditer(rb"\d+", text)):
                number = rng.choice(digits)
                text[number.start() : number.end()] = b"%d" % rng.choice(_EDGES)
            case 9:
                text[at : at + length] = rng.choice(_WORDS)
            case 0 if at < len(text):
                text[at] ^= 1 << rng.randrange(8)
            case 1:
                text[at : at + length] = rng.randbytes(length)
            case 2:
                del text[at : at + length]
            case 3:
                text[at:at] = rng.randbytes(rng.randrange(1, 17))
            case 4:
                text[at:at] = text[at : at + length] * rng.choice((1, 1, 2, 8, 100))
            case 5:
                del text[at:]
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                text[at : at + length] = other[start : start + rng.randrange(1, 65)]
            case _:
                width = rng.choice(_WIDTHS)
                at -= at % width if rng.random() < 0.5 else 0  # numbers mostly stand aligned
                edge = (rng.choice(_EDGES) + rng.choice((0, 0, 0, -1, 1))) % (1 << 8 * width)
                text[at : at + width] = edge.to_bytes(width, "little")
    return bytes(text[:_SIZE_MAX])


def joined(parts: Sequence[bytes]) -> bytes:
    """Several strings as one input."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def parted(data: bytes, most: int = 8) -> list[bytes]:
    """The strings of an input; of any bytes: a length beyond the end means the end."""
    parts, start = [], 0
    while start < len(data) and len(parts) < most:
        length = int.from_bytes(data[start : start + 4], "little")
        parts.append(data[start + 4 : start + 4 + length])
        start += 4 + length
    return parts
