"""The example of a plug-in cell: installed, checked, written as a bundle, and served by a server whose operator turned it on."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import engram
from engram_service.settings import SettingError, read_settings

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "examples" / "my-cell"
ServerProcess = Any
# Several processes import torch one after the other.
pytestmark = [pytest.mark.usefixtures("server_wire"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory into which pip has installed the example; its source, where this environment's pip cannot."""
    copy, target = tmp_path_factory.mktemp("source") / "my-cell", tmp_path_factory.mktemp("site")
    subprocess.run(["cp", "-r", str(EXAMPLE), str(copy)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", str(target), str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        print(f"pip does not install the example here, so its source is used: {done.stderr[-300:]}")
        return EXAMPLE
    assert list(target.glob("my_cell-*.dist-info/entry_points.txt"))
    return target


@pytest.fixture(scope="module")
def models(installed: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the example's script has written its bundle."""
    directory = tmp_path_factory.mktemp("models")
    done = subprocess.run(
        [sys.executable, "-m", "my_cell.write", str(directory)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": _path(installed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def on_path(installed: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The example is where this Python and the servers that it starts look for modules."""
    monkeypatch.setenv("PYTHONPATH", _path(installed))
    monkeypatch.syspath_prepend(str(installed))
    return installed


def _path(directory: pathlib.Path) -> str:
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engram", "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_example_is_served(
    server_with: Callable[..., ServerProcess], models: pathlib.Path, on_path: pathlib.Path
) -> None:
    """Named by its class, and where pip has installed it by its entry point."""
    names = ["my_cell:MinGRU"] if on_path == EXAMPLE else ["my_cell:MinGRU", "my-min-gru"]
    import torch

    from engram_models.cell_bundles import load_cell
    from engram_models.plug_ins import register_cells

    assert register_cells(names) == ["my-min-gru"] * len(names)
    cell = load_cell(models / "follower" / "1")
    xs = np.random.default_rng(3).normal(size=(10, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = cell.sequence(torch.from_numpy(xs)[None])[0][0].numpy()
    with (
        server_with("--models", str(models), "--cells", ",".join(names)) as server,
        engram.Client(server.address) as client,
    ):
        session = client.open("follower")
        got = [session.run(xs[:6])]
        server.restart()
        got.append(session.run(xs[6:]))
    np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-6)
    assert "plug-in cells" in server.log.read_text()


def test_without_the_setting_its_bundle_is_not_served(
    server_with: Callable[..., ServerProcess], models: pathlib.Path
) -> None:
    with server_with("--models", str(models)) as server, engram.Client(server.address) as client:
        assert client.models.list() == []
        log = server.log.read_text()
    assert "my-min-gru" in log and "setting cells" in log


def test_a_plug_in_that_is_not_there_stops_the_start(tmp_path: pathlib.Path) -> None:
    done = serve("--data-dir", str(tmp_path / "data"), ENGRAM_CELLS="nowhere_at_all:Cell")
    assert done.returncode == 2
    assert (
        "engram serve: cells: cell 'nowhere_at_all:Cell': importing nowhere_at_all failed: no such module"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_cells_in_the_file(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "engram.toml"
    for text in ('cells = ["a:B", "c"]', '[server]\ncells = ["a:B", "c"]', 'cells = "a:B, c"'):
        config.write_text(text)
        assert read_settings({"config": str(config)}, {}).cell_names() == ["a:B", "c"]
    config.write_text('durability = "step"\n[server]\ndurability = "interval"\n')
    with pytest.raises(SettingError, match=r"durability in .* there twice"):
        read_settings({"config": str(config)}, {})
    config.write_text("cells = [1]\n")
    with pytest.raises(SettingError, match="cells"):
        read_settings({"config": str(config)}, {})
    assert read_settings({}, {"ENGRAM_CELLS": "a:B"}).cell_names() == ["a:B"]
    assert read_settings({}, {}).cell_names() == []
