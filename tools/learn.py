"""Runs recipes over their seeds and writes docs/results and the table of docs/models.md. `make learn` is this.

A run that was cut off goes on where it stood, and one that is finished is not run again: what is finished lies in runs/. A seed
that the recipe has but that did not run is said in the result file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engram._json import json_text
from engram_models.bundle import shipped_models_dir
from engram_models.training.output import write_whole
from engram_models.training.pictures import curves, png
from engram_models.training.recipe import Recipe, load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", metavar="DIR", help="default: runs/")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N of each recipe's")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once, one core each (default: 2)")
    parser.add_argument("--ship", action="store_true", help="put the bundles among those that the package ships")
    args = parser.parse_args()
    recipes = [load_recipe(name) for name in args.recipes or shipped_recipes()]
    runs = [(recipe, seed) for recipe in recipes for seed in recipe.seeds[: args.seeds]]
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [why for why in pool.map(lambda run: _train(*run, args.runs), runs) if why]
    for recipe in recipes:
        _summarise(recipe, args.runs)
        if args.ship and recipe.bundle:
            _ship(recipe, args.runs)
    _write_table()
    print("\n".join([*failed, f"{len(runs)} runs, {len(failed)} failed"]))
    return 1 if failed else 0


def _directory(recipe: Recipe, seed: int, runs: Path) -> Path:
    return runs / recipe.name / f"seed-{seed}"


def _train(recipe: Recipe, seed: int, runs: Path) -> str:
    """One run in a process of its own; why it failed, or nothing. A missed goal is no failure: the result says it."""
    out = _directory(recipe, seed, runs)
    command = [
        sys.executable,
        "-m",
        "engram",
        "train",
        str(recipe.path),
        "--seed",
        str(seed),
        "--out",
        str(out),
        "--resume",
    ]
    ended = subprocess.run([*command, "--json"], stdout=subprocess.DEVNULL, check=False)
    return "" if (out / "result.json").exists() else f"{recipe.name} seed {seed}: exit code {ended.returncode}"


def _summarise(recipe: Recipe, runs: Path) -> None:
    """docs/results/<recipe>.json with every seed, its pictures from the first one, and the curves of all seeds in one."""
    found = {seed: _directory(recipe, seed, runs) / "result.json" for seed in recipe.seeds}
    results = [json.loads(path.read_text()) for path in found.values() if path.exists()]
    results = [one for one in results if one["digest"] == recipe.digest]  # not of the recipe as it was before a change
    if not results:
        return
    summary = {
        "recipe": recipe.name, "claim": recipe.claim, "command": f"engram train {recipe.name} --seed N",
        "passed": f"{sum(one['passed'] for one in results)} of {len(results)} seeds",
        "seeds_not_run": [seed for seed in recipe.seeds if seed not in {one["seed"] for one in results}],
        "machine": results[0]["machine"], "seconds": round(sum(one["seconds"] for one in results), 1),
        "median": _medians(results), "pass": {name: dict(bound) for name, bound in recipe.bounds.items()},
        **{key: results[0][key] for key in ("options", "model", "task")},
        "runs": [{key: one[key] for key in ("seed", "passed", "missed", "metrics", "seconds")} for one in results],
    }  # fmt: skip
    write_whole(RESULTS / f"{recipe.name}.json", (json_text(summary, indent=1) + "\n").encode())
    for picture in sorted(_directory(recipe, results[0]["seed"], runs).glob("*.png")):
        if picture.stem != "loss":
            shutil.copyfile(picture, RESULTS / f"{recipe.name}-{picture.name}")
    losses = {f"seed {one['seed']}": one["curves"]["loss"] for one in results if "loss" in one["curves"]}
    if losses:
        write_whole(RESULTS / f"{recipe.name}-loss.png", png(curves(losses, recipe.name)))


def _medians(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every metric that is a number, over the seeds."""
    names = [name for name, value in results[0]["metrics"].items() if isinstance(value, int | float)]
    found = {name: [one["metrics"].get(name) for one in results] for name in names}
    return {
        name: float(f"{statistics.median(values):.6g}")
        for name, values in found.items()
        if all(isinstance(value, int | float) for value in values)
    }


def _ship(recipe: Recipe, runs: Path) -> None:
    """The bundle of the first seed, in place of the one that was shipped before."""
    made = _directory(recipe, recipe.seeds[0], runs) / "models" / recipe.bundle["name"] / recipe.bundle["version"]
    if made.exists():
        target = shipped_models_dir() / recipe.bundle["name"] / recipe.bundle["version"]
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)


def _write_table() -> None:
    """The table of docs/models.md: one line a recipe, from the result files that are there."""
    lines = ["| recipe | what it shows | held | figures (median over seeds) | time |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        one = json.loads(path.read_text())
        figures = ", ".join(f"{name} {one['median'].get(name, '-')}" for name in one["pass"])
        not_run = f"; seeds not run: {one['seeds_not_run']}" if one["seeds_not_run"] else ""
        lines.append(
            f"| [{one['recipe']}](results/{path.name}) | {one['claim']} | {one['passed']}{not_run} | {figures} "
            f"| {one['seconds']:.0f} s |"
        )
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_whole(PAGE, f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}".encode())


if __name__ == "__main__":
    sys.exit(main())
