"""Writes the table of settings in docs/operations.md from the fields of Settings. `make docs` runs it."""

from __future__ import annotations

import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from engram_service.settings import Settings

PATH = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
TABLE = re.compile(r"\| setting \| default \| what it is \|\n(?:\|.*\n)+")


def row(item: Field[Any]) -> str:
    default = str(item.default).lower() if isinstance(item.default, bool) else str(item.default)
    choices = ", ".join(f"`{choice}`" for choice in item.metadata["choices"])
    text = item.metadata["help"] + (f": {choices}" if choices else "")
    return f"| `{item.name}` | {f'`{default}`' if default else ''} | {text} |"


def main() -> None:
    lines = ["| setting | default | what it is |", "|---|---|---|", *map(row, fields(Settings))]
    PATH.write_text(TABLE.sub(lambda _: "\n".join(lines) + "\n", PATH.read_text()))


if __name__ == "__main__":
    main()
