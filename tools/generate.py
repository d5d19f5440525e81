"""Generates clients/python/engram/v1 from proto/. `make proto` writes it; `make proto-check` (--check) compares."""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the package engram is")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if what is there differs")
    args = parser.parse_args()
    target = args.directory / "engram" / "v1"
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        if args.check:
            return _compare(fresh, target)
        target.mkdir(parents=True, exist_ok=True)
        for old in _generated(target):
            old.unlink()
        for new in _generated(fresh):
            shutil.copy(new, target / new.name)
    return 0


def generate(directory: Path) -> Path:
    """Generates every proto into `directory`; returns the folder of engram.v1."""
    protos = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    services = [name for name in protos if "\nservice " in (PROTO / name).read_text()]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    # Beside the interpreter, so that it is found without an activated environment.
    plugin = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"
    out = f"={directory}"
    subprocess.run([*protoc, "--python_out" + out, "--pyi_out" + out, "--grpc_python_out" + out, *protos], check=True)
    subprocess.run([*protoc, plugin, "--mypy_grpc_out=quiet:" + str(directory), *services], check=True)
    package = directory / "engram" / "v1"
    for path in package.glob("*_pb2_grpc.py"):
        if path.name.replace("_pb2_grpc.py", ".proto") not in {Path(name).name for name in services}:
            path.unlink()  # protoc writes one for every file, with nothing in it where there is no service
    return package


def _compare(fresh: Path, target: Path) -> int:
    names = {path.name for path in _generated(fresh)} | {path.name for path in _generated(target)}
    _, differing, missing = filecmp.cmpfiles(fresh, target, sorted(names), shallow=False)
    for name in differing + missing:
        print(f"{target / name} is not what proto/ generates: run make proto", file=sys.stderr)
    return 1 if differing or missing else 0


def _generated(directory: Path) -> list[Path]:
    return sorted(path for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in directory.glob(pattern))


if __name__ == "__main__":
    sys.exit(main())
