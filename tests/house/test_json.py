"""JSON is written in one way: what has no number in JSON is null, and never NaN."""

from __future__ import annotations

import ast
import gc
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engram import _json
from engram_models import json_text as models_json

ROOT = Path(__file__).resolve().parents[2]
HELPERS = {"clients/python/engram/_json.py", "models/engram_models/json_text.py"}
# Not for readers of JSON: digests of what decides a result, and toml, whose plain values are written alike.
NO_OUTPUT = {
    f"models/engram_models/{name}.py" for name in ("bundle", "bundle_writing", "fingerprints", "training/recipe")
}


def _files() -> list[str]:
    folders = ("clients/python", "service", "models", "tools")
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() if listed.returncode == 0 else []
    return names or [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_json_is_written_past_the_helpers() -> None:
    found = []
    for name in _files():
        path = ROOT / name
        if path.suffix != ".py" or name in HELPERS | NO_OUTPUT or not path.is_file():
            continue
        gc.disable()  # see test_house.py
        try:
            tree = ast.parse(path.read_text(), name)
        finally:
            gc.enable()
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func)
                in (
                    "json.dumps",
                    "json.dump",
                    "dumps",
                    "JSONEncoder",
                )
                and not any(word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in node.keywords)
            ):
                found.append(f"{name}:{node.lineno}")
    assert found == [], "use json_text"


@pytest.mark.parametrize("json_text", [_json.json_text, models_json.json_text])
def test_what_is_not_finite_is_null(json_text: Any) -> None:
    values = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN \u00e9", "d": [True, None, 2**70]}
    assert json.loads(json_text(values)) == {
        "a": [1.5, None, [None, {"b": None}]], "c": "NaN \u00e9", "d": [True, None, 2**70],
    }  # fmt: skip
    assert json_text(values).isascii()
    assert json_text([1, math.nan], indent=1) == "[\n 1,\n null\n]"
    assert json_text({"path": ROOT, "x": math.inf}, default=str) == json.dumps({"path": str(ROOT), "x": None})
