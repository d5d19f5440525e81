"""Cells of other people: how they are found, what a kind may not be, and what the checks find in cells that break the contract."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engram_models import LSTM, Cell, State, TensorSpec, registry
from engram_models.cell_checks import CHECKS, check_all
from engram_models.commands import models
from engram_models.plain_kinds import PLAIN_KINDS
from engram_models.plug_ins import PlugInError, find_cell, register_cells

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "my-cell"
SIZES = '{"input_size": 3, "hidden_size": 8, "output_size": 2}'


class Leaky(Cell):
    """A leaky integrator. `fault` says how it breaks the contract."""

    kind = "test-leaky"

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault, self.calls = fault, 0
        self.head = nn.Linear(3, 2)
        spec = TensorSpec("mean", "float32", (3,), "recurrent")
        config = {} if fault == "config" else {"fault": fault}
        self.declare(TensorSpec("x", "float32", (3,)), TensorSpec("y", "float32", (2,)), (spec,), config)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        mean = state[0] + 0.1 * (x - state[0])
        match self.fault:
            case "neighbours":
                mean = mean + x.mean()
            case "in place":
                mean = state[0].mul_(0.9).add_(x, alpha=0.1)
            case "input":
                x.mul_(0.5)
            case "weights":
                self.head.bias.data.add_(1)
            case "random":
                mean = mean + random.random()
            case "counts":
                self.calls += 1
                mean = mean + self.calls
            case "shape":
                return self.head(mean).unsqueeze(1), self.state_type(mean)
            case "dtype":
                return self.head(mean).half(), self.state_type(mean)
            case "state shape":
                return self.head(mean), self.state_type(mean[:, :2])
            case "tuple":
                return self.head(mean), (mean,)
            case "explodes":
                mean = torch.exp(mean)
            case "single":
                mean = mean + torch.ones(3, dtype=torch.float32) / 3
                return self.head(mean).float(), self.state_type(mean.float())
        return self.head(mean), self.state_type(mean)


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(PLAIN_KINDS)
    yield
    PLAIN_KINDS.clear()
    PLAIN_KINDS.update(before)
    sys.modules.pop("my_cell", None)


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("neighbours", "rows apart", "change what other rows give"),
        ("in place", "nothing changed", "the state mean that it was given"),
        ("input", "nothing changed", "changes its input"),
        ("weights", "nothing changed", "its own head.bias"),
        ("random", "same again", "other bits"),
        ("counts", "same again", "other bits"),
        ("shape", "step as declared", r"\[1, 1, 2\]; the schema says \[1, 2\]"),
        ("dtype", "step as declared", "torch.float16; the schema says float32"),
        ("state shape", "step as declared", "the state mean has the shape"),
        ("tuple", "step as declared", "state_type"),
        ("explodes", "large numbers", "infinite or NaN"),
        ("single", "double precision", "in float64 the output is torch.float32|expected m1 and m2"),
        ("config", "made again from config", "another config"),
    ],
)
def test_a_cell_that_breaks_the_contract_is_found_out(fault: str, check: str, words: str) -> None:
    registry.register(Leaky)
    torch.manual_seed(1)
    found = dict(check_all(Leaky(fault).eval()))
    assert list(found) == list(CHECKS)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found[check])


def test_a_cell_that_keeps_it_passes() -> None:
    registry.register(Leaky)
    assert {name: why for name, why in check_all(Leaky().eval()) if why} == {}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    models.configure(parser)
    code = models.run(parser.parse_args(["check", *words]))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_example_passes_the_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    code, out, _ = run(capsys, "--cell", "my_cell:MinGRU", "--config", SIZES)
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()] == ["ok"] * len(CHECKS)
    code, out, _ = run(capsys, "--cell", "my_cell:MinGRU", "--config", SIZES, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["kind"]) == (0, True, "my-min-gru")


def test_a_failed_check_is_a_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        (EXAMPLE / "my_cell" / "__init__.py")
        .read_text()
        .replace("z = torch.sigmoid(self.gate(x))", "z = self.gate(x).softmax(0)")
    )
    (tmp_path / "mixing_cell.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = run(capsys, "--cell", "mixing_cell:MinGRU", "--config", SIZES)
    assert code == 1
    assert "rows apart" in out and "FAILED: other numbers in row 0 change what other rows give" in out
    assert "of 12 checks failed" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cell", "nowhere_at_all:X"], "no such module; is its package installed"),
        (["--cell", "broken_cell:X"], "RuntimeError: at import"),
        (["--cell", "my_cell:Missing"], "my_cell has no Missing"),
        (["--cell", "my_cell:torch"], "no subclass of engram_models.Cell"),
        (["--cell", "no-such-point"], "neither module:Class nor an entry point in the group engram.cells"),
        (["--cell", "engram_models:LSTM"], "a kind of Engram's own"),
        (["--cell", "my_cell:MinGRU"], "cannot be made of the config {}"),
        (["--cell", "my_cell:MinGRU", "--config", "{"], "not JSON"),
        (["--cell", "my_cell:MinGRU", "--config", "3"], "give an object"),
        ([], "name a MODEL, or a cell with --cell"),
    ],
)
def test_what_is_no_cell_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "broken_cell.py").write_text('raise RuntimeError("at import")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    code, _, err = run(capsys, *words)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def of_kind(kind: object, base: type[Cell] = LSTM) -> type[Cell]:
    return type("Mine", (base,), {"kind": kind})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of_kind("lstm"), "Engram's own"),
        (lambda: of_kind("onnx"), "Engram's own"),
        (lambda: of_kind("My Kind"), "lower-case"),
        (lambda: of_kind(3), "lower-case"),
        (lambda: of_kind("test-bare", Cell), "no forward"),
        (lambda: of_kind("test-leaky"), "is already"),
    ],
)
def test_what_a_kind_may_not_be(make: Callable[[], type[Cell]], words: str) -> None:
    registry.register(Leaky)
    registry.register(Leaky)
    with pytest.raises(ValueError, match=words):
        registry.register(make())


def test_an_entry_point_names_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "my_cell-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-cell\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[engram.cells]\nmy-min-gru = my_cell:MinGRU\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    assert find_cell("my-min-gru").__name__ == "MinGRU"
    assert register_cells(["my-min-gru"]) == ["my-min-gru"]
    assert registry.cell_type("my-min-gru") is find_cell("my_cell:MinGRU")
    with pytest.raises(PlugInError, match="installed packages have: my-min-gru"):
        find_cell("other")
