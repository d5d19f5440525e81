"""Nothing on the path of a CPU step imports torch, and the server's extra has none: all that ships is served without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import psutil
import pytest
import without_torch

from engram_service.local import LocalServer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(without_torch.__file__)
ABSENT = ("torch", "faiss", "matplotlib", "sklearn", "h5py")
LIBRARIES = ("libtorch", "onnx_cpp2py")  # that torch and onnx map
KINDS = {
    "copy-ntm": "ntm", "digits-dbn": "dbn", "digits-reader": "lstm", "letters-hopfield": "hopfield", "sunspots": "normalised",
}  # fmt: skip
DONE = {**KINDS, "addressed": True, "recreated": True}
LETTERS_MIN = 24

# An ONNX file with a state of its own, as somebody may have one: y = x + h, and h' = y.
EXPORT = """
from onnx import TensorProto, helper
def info(name): return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
nodes = [helper.make_node("Add", ["x", "h"], ["y"]), helper.make_node("Identity", ["y"], ["h_out"])]
graph = helper.make_graph(nodes, "sum", [info("x"), info("h")], [info("y"), info("h_out")])
open("sum.onnx", "wb").write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
"""


def environment(tmp_path: Path) -> dict[str, str]:
    """Of processes that cannot import what the server's extra does not have."""
    (tmp_path / "absent").mkdir()
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({ABSENT}))"]
    (tmp_path / "absent" / "sitecustomize.py").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path / "absent"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def run(command: list[str | Path], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def did_all(found: dict[str, object]) -> bool:
    recalled = found.pop("recalled")
    assert found == DONE
    return isinstance(recalled, int) and recalled >= LETTERS_MIN


def test_a_server_for_cpus_has_neither_torch_nor_onnx_in_its_processes(tmp_path: Path) -> None:
    """Where both are installed. What looks at new models in a process of its own is gone by then."""
    with LocalServer(tmp_path, flags=("--cache-dir", str(tmp_path / "cache"))) as server:
        assert did_all(without_torch.exercise(server.address))
        main = psutil.Process(server.pid)
        ours = [one for one in (main, *main.children(recursive=True)) if "redis" not in one.name()]
        assert {one.pid: without_torch.loaded(one.pid, LIBRARIES) for one in ours} == {one.pid: [] for one in ours}
        seen = [without_torch.loaded(one.pid, ["onnxruntime"]) for one in ours]
        assert seen == [[], ["onnxruntime"]], "and it is seen where it is mapped: in the data process alone"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train", "digits-reader"], "pip install 'engram[train]'"),
        (["train", "--list"], "pip install 'engram[train]'"),
        (["serve", "--device", "cuda:0"], "pip install 'engram[server,torch]'"),
        (["models", "check", "digits-reader", "--device", "cuda:0"], "pip install 'engram[torch]'"),
        (["models", "check", "--cell", "my_package:MyCell"], "pip install 'engram[torch]'"),
    ],
    ids=["train", "train-list", "serve", "check", "check-cell"],
)  # fmt: skip
def test_what_needs_torch_says_what_to_install(command: list[str], says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engram", *command],
        capture_output=True, text=True, check=False, timeout=60, env=environment(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith("{")]) == 1, done.stderr


@pytest.mark.timeout(600)
def test_the_servers_extra_serves_what_ships_imports_a_model_and_tells_the_demo(tmp_path: Path) -> None:
    """In a new environment with that extra alone, as `pip install 'engram[server]'` leaves it."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ENGRAM_", "VIRTUAL_ENV"))
    }
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    run([*pip, "--constraint", ROOT / "constraints.txt", f"engram[server] @ file://{ROOT}"], env, tmp_path)
    there = run(
        [python, "-c", f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"], env, tmp_path
    )
    assert there.strip() == "[]"
    run([python, "-c", EXPORT], env, tmp_path)
    run([python, "-m", "engram", "models", "import", "sum.onnx", "--models", "models"], env, tmp_path)
    found = json.loads(run([python, PROGRAM, "--models", tmp_path / "models"], env, tmp_path))
    assert found.pop("sum") == "onnx"
    assert did_all(found)
    assert json.loads(run([python, "-m", "engram", "demo", "--json", "--sessions", "32"], env, tmp_path))["held"]
