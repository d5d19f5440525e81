"""`engram models check --cell NAME`: whether a cell of somebody's own keeps the contract, one line a check. Called by models.py."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from engram_models.json_text import json_text

if TYPE_CHECKING:
    from engram_models.cell import Cell

_SEED = 7


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cell", metavar="NAME", help="check a plug-in cell: module:Class, or an entry point of the group engram.cells"
    )
    parser.add_argument(
        "--config",
        metavar="JSON",
        default="{}",
        help="what the cell is made with (default: nothing), such as '{\"size\": 8}'",
    )


def run(args: argparse.Namespace) -> int:
    try:
        import torch
    except ImportError:
        return _failed(args, "cells are in torch: pip install 'engram[torch]'")
    from engram_models.cell_checks import check_all
    from engram_models.plug_ins import PlugInError, find_cell, register_cells

    torch.set_num_threads(1)
    torch.manual_seed(_SEED)
    try:
        kind = find_cell(args.cell)
        register_cells([args.cell])
        cell = _made(kind, args.config)
    except PlugInError as error:
        return _failed(args, str(error))
    found: list[dict[str, Any]] = []
    for name, why in check_all(cell):
        found.append({"check": name, "ok": not why, **({"error": why} if why else {})})
        if not args.json:
            print(f"{name:<28} {f'FAILED: {why}' if why else 'ok'}", flush=True)
    failed = sum(not one["ok"] for one in found)
    if args.json:
        print(json_text({"ok": not failed, "cell": args.cell, "kind": kind.kind, "checks": found}, indent=2))
    elif failed:
        print(f"engram models check: {args.cell}: {failed} of {len(found)} checks failed", file=sys.stderr)
    return 1 if failed else 0


def _made(kind: type[Cell], config: str) -> Cell:
    """A cell with untrained weights. Raises PlugInError."""
    from engram_models.cell import Cell
    from engram_models.plug_ins import PlugInError

    try:
        values = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise PlugInError(f"--config {config!r}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise PlugInError(f"--config {config!r}: give an object, such as {{}}")
    try:
        cell: object = kind.from_config(values)
    except Exception as error:  # of a stranger's code
        line = str(error).partition("\n")[0]
        raise PlugInError(
            f"{kind.__name__} cannot be made of the config {config}: {line}; give one with --config"
        ) from None
    if not isinstance(cell, Cell) or not hasattr(cell, "state_schema"):
        raise PlugInError(f"{kind.__name__}: its constructor does not call declare(input, output, state, config)")
    return cell.eval()


def _failed(args: argparse.Namespace, why: str) -> int:
    if args.json:
        print(json_text({"ok": False, "error": why}))
    print(f"engram models check: {why}", file=sys.stderr)
    return 1
