"""docs/your-model.md, section by section: its commands and programs run as they stand, on small files of the shapes that it names."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zoo

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "your-model.md"

Block = tuple[str, str]  # what the fence says, and what is in it


def sections() -> list[Any]:
    """Those with blocks, in the order of the page."""
    found = []
    for part in re.split(r"^(?=##)", PAGE.read_text(), flags=re.M):
        title = part.splitlines()[0].lstrip("# ").partition(":")[0]
        if blocks := re.findall(r"^```(\w[\w ]*)\n(.*?)^```", part, re.S | re.M):
            found.append(pytest.param(blocks, id=title.lower().replace(" ", "-")))
    return found


def write_file(name: str, folder: Path) -> None:
    """A file that the page supposes its reader has; others are made by the page."""
    stem, _, kind = name.partition(".")
    if kind == "keras":
        write_keras(folder / name)
    elif stem.startswith("chain_"):
        for case in zoo.chain():
            case.write(folder)
    elif stem in vars(zoo) and stem != "chain":
        getattr(zoo, stem)().write(folder)


def write_keras(path: Path) -> None:
    import numpy as np

    sys.path.append(str(ROOT / "tests" / "models"))
    tests: Any = importlib.import_module("test_convert")
    draw: Callable[..., Any] = np.random.default_rng(1).standard_normal
    lstm, dense = (
        [draw(shape).astype(np.float32) for shape in shapes] for shapes in (((3, 16), (4, 16), (16,)), ((4, 2), (2,)))
    )
    layers = [
        tests.INPUT, tests.layer("LSTM", name="lstm", units=4, activation="tanh", recurrent_activation="sigmoid", use_bias=True),
        tests.layer("Dense", name="y", units=2, activation="linear", use_bias=True),
    ]  # fmt: skip
    tests.keras_file(path, layers, {"lstm/cell": lstm, "dense": dense})


class Reader:
    """Somebody who does what the page says, in a directory of his own."""

    def __init__(self, folder: Path, server_type: Any, stack: ExitStack) -> None:
        self._folder, self._server_type, self._stack = folder, server_type, stack
        self._said = ""
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), "."]),
        }
        self._environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._address = ""

    def follow(self, kind: str, text: str) -> None:
        for name in re.findall(r"\b[\w-]+\.(?:onnx|keras)\b", text):
            if not (self._folder / name).exists():
                write_file(name, self._folder)
        if kind == "text":
            missing = [line for line in text.splitlines() if line.strip() not in self._said]
            assert not missing, f"{missing} of the page is not in\n{self._said}"
        elif kind == "python" and (named := re.match(r"# (\w+\.py)\n", text)):
            (self._folder / named[1]).write_text(text)
        elif kind == "python":
            self._run([sys.executable, "-c", text.replace("127.0.0.1:50051", self._address)], 0)
        elif kind == "sh refused":
            self._run(["bash", "-ec", text], 1)
        else:
            assert kind == "sh"
            before, serve, after = text.partition("engram serve --models mine &\n")
            self._run(["bash", "-ec", before], 0)
            if serve:
                server = self._stack.enter_context(
                    self._server_type(self._folder, "--models", str(self._folder / "mine"))
                )
                self._address = self._environment["ENGRAM_ADDRESS"] = server.address
                self._run(["bash", "-ec", after], 0)

    def _run(self, command: list[str], status: int) -> None:
        done = subprocess.run(
            command, cwd=self._folder, env=self._environment, capture_output=True, text=True, check=False, timeout=300
        )
        self._said = done.stdout + done.stderr
        assert done.returncode == status and "Traceback" not in self._said, f"{command[-1]}\n{self._said}"


@pytest.fixture
def reader(tmp_path: Path, server_type: Any) -> Iterator[Reader]:
    with ExitStack() as stack:
        yield Reader(tmp_path, server_type, stack)


@pytest.mark.parametrize("blocks", sections())
def test_a_section_works_as_it_stands(blocks: list[Block], reader: Reader) -> None:
    for kind, text in blocks:
        reader.follow(kind, text)


def test_every_flag_of_the_import_is_in_the_table() -> None:
    from argparse import ArgumentParser

    from engram_models.commands import import_model

    parser = ArgumentParser()
    import_model.configure(parser)
    flags = set(re.findall(r"--[a-z-]+", parser.format_help())) - {"--help", "--models"}
    table = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("| `--"))
    assert not [flag for flag in flags if f"`{flag}" not in table]
