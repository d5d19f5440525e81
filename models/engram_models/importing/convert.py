"""Models that are no ONNX files yet: .pt2, TorchScript, .keras, or a module:factory of Python. Called by the import command.

The work is done by conversion.py in a process of its own, with limits on time and memory, in an empty directory, without the
caller's secrets. A .keras file is rebuilt from its description and its weights, and nothing in it is executed; everything else
is code, and a line on stderr says that it runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engram_models.importing.errors import ImportRefusedError, shown

TIMEOUT_S = 300.0
MEMORY_MB = 16_384
TORCH_SUFFIXES = (".pt2", ".pt", ".ts", ".pth", ".jit", ".torchscript")
KERAS_SUFFIXES = (".keras",)
# What a child needs to find Python, libraries and temporary places; everything else may be a secret.
_ENVIRONMENT = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "SYSTEMROOT", "PYTHONHASHSEED",
)  # fmt: skip
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_SHAPE = re.compile(r"([^=]+)=(?:([a-z]+\d*):)?(\d*(?:x\d+)*)")
_TAIL_LINES = 50
_LINE_BYTES = 4096
_SIZE_MAX = 1 << 20


@dataclass(frozen=True)
class Request:
    """What conversion.py is told, as JSON on its standard input."""

    source: str
    sort: str  # file or factory
    output: str
    examples: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    batch_axes: dict[str, int] = field(default_factory=dict)
    import_path: str = ""  # where the user's own modules are
    memory_mb: int = MEMORY_MB


def needs_conversion(source: str) -> bool:
    """Whether a source is no ONNX file but something that `converted` takes."""
    return Path(source).suffix.lower() in (*TORCH_SUFFIXES, *KERAS_SUFFIXES) or _is_factory(source)


def example_shapes(flags: list[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """`--shape x=2x16` and `--shape rate=int64:` (a scalar), as shapes and dtypes by name. Raises ImportRefusedError."""
    shapes, dtypes = {}, {}
    for flag in flags:
        found = _SHAPE.fullmatch(flag)
        if not found:
            raise ImportRefusedError(f"--shape {flag}: give NAME=AxB, such as x=2x16, or NAME=DTYPE:AxB")
        name, dtype, text = found.groups()
        shapes[name] = [int(size) for size in text.split("x") if size]
        if any(not 0 < size <= _SIZE_MAX for size in shapes[name]):
            raise ImportRefusedError(f"--shape {flag}: sizes are from 1 to {_SIZE_MAX}")
        if dtype:
            dtypes[name] = dtype
    return shapes, dtypes


def converted(
    source: str,
    examples: Path | None,
    workdir: Path,
    *,
    shapes: Mapping[str, list[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    batch_axes: Mapping[str, int] | None = None,
    timeout_s: float = TIMEOUT_S,
    memory_mb: int = MEMORY_MB,
) -> Path:
    """An .onnx file in `workdir` that computes what `source` does, its names kept where they can be.

    `examples` is an .npz with the arrays of one call of the module, by the names of forward's parameters; `shapes` and `dtypes`
    make such arrays where there is none; `batch_axes` says where the batch is, where that cannot be found out.
    Raises ImportRefusedError.
    """
    factory = _is_factory(source)
    if not factory and not Path(source).is_file():
        raise ImportRefusedError(f"{source}: no such file, and not the module:factory of a Python module")
    _say(_notice(source, factory))
    with tempfile.TemporaryDirectory(prefix="engram-import-") as directory:
        output = Path(directory) / "converted.onnx"
        request = Request(
            source if factory else str(Path(source).resolve()), "factory" if factory else "file", str(output),
            str(examples.resolve()) if examples else "", dict(shapes or {}), dict(dtypes or {}), dict(batch_axes or {}),
            os.getcwd() if factory else "", memory_mb,
        )  # fmt: skip
        _run(request, source, Path(directory), timeout_s)
        target = workdir / f"{_stem(source)}.onnx"
        shutil.move(output, target)
    return target


def _is_factory(source: str) -> bool:
    return not Path(source).exists() and _FACTORY.fullmatch(source) is not None


def _stem(source: str) -> str:
    stem = source.partition(":")[2] if _is_factory(source) else Path(source).stem
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem)[:80] or "model"


def _notice(source: str, factory: bool) -> str:
    if factory:
        return f"{source}: imports this module and calls it, in a process of its own"
    if Path(source).suffix.lower() in KERAS_SUFFIXES:
        return f"{source}: rebuilt from its description and weights; nothing in it is executed"
    return f"{source}: converting executes the code in this file, in a process of its own"


def _say(line: str) -> None:
    print(f"engram models import: {line}", file=sys.stderr)


def _run(request: Request, source: str, directory: Path, timeout_s: float) -> None:
    """Runs conversion.py. Raises ImportRefusedError with what it refused, or with how it ended."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"TMPDIR": str(directory), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "engram_models.importing.conversion"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=directory, env=environment,
        start_new_session=True,
    )  # fmt: skip
    stdin, stdout = child.stdin, child.stdout
    assert stdin is not None and stdout is not None
    said: deque[bytes] = deque(maxlen=_TAIL_LINES)
    reader = threading.Thread(target=lambda: said.extend(iter(lambda: stdout.readline(_LINE_BYTES), b"")), daemon=True)
    reader.start()
    try:
        with stdin:
            stdin.write(json.dumps(asdict(request), allow_nan=False).encode())
        code = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ImportRefusedError(f"{source}: not converted within {timeout_s:g} s; stopped") from None
    except BrokenPipeError:
        code = child.wait(timeout_s)
    finally:
        _end(child)
        reader.join(5)
    for line in _lines(directory / "notices"):
        _say(f"{source}: {line}")
    if refused := _lines(directory / "refused"):
        raise ImportRefusedError(refused[0].replace(request.source, source))  # as the user wrote it
    if code != 0 or not Path(request.output).is_file():
        raise ImportRefusedError(f"{source}: the conversion {_ending(code)}{_last(said)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _lines(path: Path) -> list[str]:
    if not path.is_file() or path.is_symlink():
        return []
    with path.open("rb") as file:
        return file.read(1 << 16).decode(errors="replace").splitlines()


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last(said: deque[bytes]) -> str:
    lines = [text for line in said if (text := line.decode(errors="replace").strip())]
    return f"; its last words: {shown(lines[-1])}" if lines else ""
