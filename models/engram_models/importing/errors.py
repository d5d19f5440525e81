"""The one error of imports: a file, or what its owner said of it, is refused. Raised everywhere in here, printed by the command."""

from __future__ import annotations

LINE_MAX = 600
_NAME_MAX = 80


class ImportRefusedError(Exception):
    """One line: what is wrong, where, and what to do about it."""

    def __init__(self, message: str) -> None:
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        super().__init__(line if len(line) <= LINE_MAX else f"{line[:LINE_MAX]}...")


class KilledError(ImportRefusedError):
    """The process that looked at it was killed, and it is not known for what."""


def shown(name: object) -> str:
    """A name from somebody's file as it may be printed: quoted, short, without control characters."""
    text = name if isinstance(name, str) else repr(name)
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: _NAME_MAX + 1])
    return f"'{text[:_NAME_MAX]}...'" if len(text) > _NAME_MAX else f"'{text}'"
