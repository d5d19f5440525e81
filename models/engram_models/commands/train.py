"""`engram train`: runs a recipe; writes a bundle ready to serve, a result file and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_models.json_text import json_text

if TYPE_CHECKING:
    from engram_models.training.recipe import Recipe

HELP = "train a model from a recipe, with checkpoints that a kill does not hurt"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a shipped recipe's name, or a toml file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where all goes (default: runs/RECIPE/seed-N)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--seed", type=int, metavar="N", help="default: the recipe's first")
    parser.add_argument("--quick", action="store_true", help="the recipe's small version, of seconds")
    parser.add_argument("--list", action="store_true", help="the shipped recipes and what each shows")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    try:
        import torch  # noqa: F401 - whether it is there is all that is asked
    except ImportError:
        print(
            "engram train: torch is not installed, and training needs it: pip install 'engram[train]'", file=sys.stderr
        )
        return 1
    from engram_models.training.errors import TrainingError

    if not args.list and not args.recipe:
        print("engram train: name a RECIPE, or ask for --list", file=sys.stderr)
        return 2
    try:
        return _list(args.json) if args.list else _train(args)
    except TrainingError as error:
        if args.json:
            print(json_text({"ok": False, "error": str(error)}))
        print(f"engram train: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nengram train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
    return 1


def _list(as_json: bool) -> int:
    from engram_models.training.recipe import load_recipe, shipped_recipes

    recipes = [load_recipe(path) for path in shipped_recipes().values()]
    if as_json:
        print(json_text([{"name": one.name, "claim": one.claim, "seeds": one.seeds} for one in recipes], indent=1))
    else:
        width = max(len(one.name) for one in recipes)
        print("\n".join(f"{one.name:{width}}  {one.claim}" for one in recipes))
    return 0


def _train(args: argparse.Namespace) -> int:
    from engram_models.training.errors import TrainingError
    from engram_models.training.recipe import SEED_MAX, load_recipe
    from engram_models.training.run import run as train

    recipe = load_recipe(args.recipe, args.quick)
    seed = recipe.seeds[0] if args.seed is None else args.seed
    if not 0 <= seed <= SEED_MAX:
        raise TrainingError(f"--seed {seed}: from 0 to {SEED_MAX}")
    out = args.out or Path("runs") / recipe.name / f"seed-{seed}"
    result = train(recipe, seed, out, args.resume)
    print(json_text(result) if args.json else _summary(result, recipe, out))
    return 0 if result["passed"] else 1


def _summary(result: dict[str, Any], recipe: Recipe, out: Path) -> str:
    figures = [
        (name, _figure(value)) for name, value in result["metrics"].items() if not isinstance(value, list | dict)
    ]
    lines = [
        (recipe.name, recipe.claim), ("seed", str(result["seed"])), *figures, ("took", f"{result['seconds']:.0f} s"),
        ("passed", "yes" if result["passed"] else f"NO: {'; '.join(result['missed'])}"), ("written", f"{out}/"),
    ]  # fmt: skip
    if recipe.bundle:
        lines.append(("to serve it", f"engram serve --models {out / 'models'}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines)


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
