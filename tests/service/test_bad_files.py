"""What stands in the models directory and cannot be served: each is refused by itself, with what is wrong, and the server goes on."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import engram_models
from engram.v1 import session_pb2

ServerProcess = Any
Connect = Callable[[ServerProcess], Any]


class Bundles:
    """A models directory, and copies of one good bundle in it that are then spoilt."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self._good = engram_models.write_bundle(directory, "good", "1", engram_models.LSTM(3, 4))
        self._stage = directory.with_name("stage")

    def put(self, name: str, spoil: Callable[[pathlib.Path, pathlib.Path], object]) -> None:
        """At once, as a rename does it; `spoil` gets manifest and weights."""
        shutil.copytree(self._good, self._stage / "1")
        spoil(self._stage / "1" / "model.toml", self._stage / "1" / "weights.safetensors")
        self._stage.rename(self.directory / name)

    def put_all_bad(self) -> dict[str, str]:
        """What is said of each."""
        return {name: self._put(name, *bad) for name, bad in BAD.items()}

    def _put(self, name: str, spoil: Callable[[pathlib.Path, pathlib.Path], object], words: str) -> str:
        self.put(name, spoil)
        return words


def instead(put: Callable[[pathlib.Path], object], which: int = 1) -> Callable[[pathlib.Path, pathlib.Path], object]:
    """Something else in the file's place: 0 the manifest, 1 the weights."""

    def spoil(*files: pathlib.Path) -> None:
        files[which].unlink()
        put(files[which])

    return spoil


def added(line: str) -> Callable[[pathlib.Path, pathlib.Path], object]:
    return lambda manifest, weights: manifest.write_text(line + "\n" + manifest.read_text())


def changed(old: str, new: str) -> Callable[[pathlib.Path, pathlib.Path], object]:
    def spoil(manifest: pathlib.Path, weights: pathlib.Path) -> None:
        assert old in manifest.read_text()
        manifest.write_text(manifest.read_text().replace(old, new))

    return spoil


def graph_of(weights: pathlib.Path) -> pathlib.Path:
    return weights.with_name("step.onnx")


def listens(path: pathlib.Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


BAD: dict[str, tuple[Callable[[pathlib.Path, pathlib.Path], object], str]] = {
    "dangling": (instead(lambda path: path.symlink_to(path.with_name("gone"))), "no such file"),
    "dangling-toml": (instead(lambda path: path.symlink_to(path.with_name("gone")), 0), "No such file"),
    "loop": (instead(lambda path: path.symlink_to(path.name)), "symbolic links"),
    "pipe": (instead(os.mkfifo), "a named pipe, not a regular file"),
    "pipe-toml": (instead(os.mkfifo, 0), "a named pipe, not a regular file"),
    "folder": (instead(pathlib.Path.mkdir), "a directory, not a regular file"),
    "folder-toml": (instead(pathlib.Path.mkdir, 0), "a directory, not a regular file"),
    "socket": (instead(listens), "No such device"),
    "device": (instead(lambda path: path.symlink_to("/dev/zero")), "a device, not a regular file"),
    "device-toml": (instead(lambda path: path.symlink_to("/dev/zero"), 0), "a device, not a regular file"),
    "huge": (lambda manifest, weights: os.truncate(weights, 1 << 42), "bytes; at most"),
    "huge-toml": (lambda manifest, weights: os.truncate(manifest, 1 << 30), "bytes; at most"),
    "empty": (lambda manifest, weights: os.truncate(weights, 0), "not safetensors"),
    "digits": (added("x = " + "9" * 5000), "5000 digits"),
    "deep": (added("x = " + "[" * 50_000), "nested too deep"),
    "latin": (lambda manifest, weights: manifest.write_bytes(b"x = '\xe4'\n"), "not UTF-8"),
    "hexadecimal": (changed("format = 2", "format = 0x" + "f" * 50_000), "more than 64 bits"),
    "size": (changed("hidden_size = 4", "hidden_size = 0x" + "f" * 50_000), "more than 64 bits"),
    "old": (changed("format = 2", "format = 1"), "format 1; this version reads 2"),
    "graphless": (lambda manifest, weights: graph_of(weights).unlink(), "step.onnx: no such file"),
    "pipe-graph": (
        lambda manifest, weights: instead(os.mkfifo, 0)(graph_of(weights)),
        "a named pipe, not a regular file",
    ),
    "other-graph": (lambda manifest, weights: graph_of(weights).write_bytes(b"\x08\x09"), "it is not the graph that"),
    "nan": (changed("hidden_size = 4", "hidden_size = nan"), "not finite"),
}


def move_away_while_it_loads(bundles: Bundles, away: pathlib.Path) -> None:
    for number in range(20):
        bundles.put("moving", (lambda manifest, weights: None) if number % 2 else instead(pathlib.Path.touch))
        time.sleep(0.002 * number)
        (bundles.directory / "moving").rename(away / f"moved-{number}")


@pytest.mark.promise(11)
def test_bad_bundles_are_refused_one_by_one(
    tmp_path: pathlib.Path, server_with: Callable[..., ServerProcess], connect: Connect
) -> None:
    bundles = Bundles(tmp_path / "models")
    with server_with("--models", str(bundles.directory), "--models-poll-s", "0.02") as server:
        raw = connect(server)
        handle = int(np.frombuffer(raw.open("kept", model="good").handles, np.uint32)[0])
        raw.step(handle, 1, np.zeros(3, np.float32))
        bad = bundles.put_all_bad()
        bundles.put("later", lambda manifest, weights: None)

        def reload() -> Any:
            return raw.unary("ReloadModels", session_pb2.ReloadModelsRequest(), session_pb2.ReloadModelsResponse)

        answer = reload()
        said = {error.partition("/")[0]: error for error in answer.errors}
        assert set(said) == set(bad)
        for name, words in bad.items():
            assert words in said[name] and len(said[name]) < 1000, said[name]
        assert {model.name for model in answer.models} == {"good", "later"}
        raw.step(handle, 2, np.zeros(3, np.float32))
        assert server.log.read_text().count("model not served: ") == len(bad), (
            "each is said once, and not at every look"
        )
        assert server.series()['engram_model_loads_total{outcome="failed"}'] == len(bad)

        move_away_while_it_loads(bundles, tmp_path)
        raw.step(handle, 3, np.zeros(3, np.float32))
        assert not [name for name in server.series() if name.startswith("engram_task_failures_total{")]

        server.stop()
        server.start()
        again = connect(server)
        assert again.get("kept").seq == 3, "it starts with all of them there"
        bundles.put("mended", lambda manifest, weights: None)
        shutil.copy(tmp_path / "models" / "good" / "1" / "model.toml", tmp_path / "models" / "digits" / "1")
        server.signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while again.open("new", model="digits").errors:
            assert time.monotonic() < deadline, "a bundle that was mended is served"
            time.sleep(0.05)
