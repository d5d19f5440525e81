"""Every shipped recipe, in its small version: the mechanism learns what the full run then measures. `make learn-quick`."""

from __future__ import annotations

import json

import pytest

from engram_models import load_bundle
from engram_models.training.recipe import load_recipe, shipped_recipes
from engram_models.training.run import run


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_shows_what_it_claims(name, tmp_path):
    recipe = load_recipe(name, quick=True)
    result = run(recipe, recipe.seeds[0], tmp_path)
    assert result["passed"], result["missed"]
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == result["metrics"]
    if recipe.bundle:
        load_bundle(tmp_path / "models" / recipe.bundle["name"] / recipe.bundle["version"])


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_full_recipe_is_well_formed(name):
    recipe = load_recipe(name)
    assert recipe.claim
    assert recipe.bounds
    assert recipe.name == name
