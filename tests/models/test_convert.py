"""Models that are no ONNX files yet, converted, and run by ONNX Runtime beside what they were."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_models.commands import models
from engram_models.importing.convert import converted, example_shapes, needs_conversion
from engram_models.importing.errors import ImportRefusedError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

MODULE = """
import os, time
import torch
from torch import Tensor, nn

class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 8, 2), nn.Linear(8, 3)

    def forward(self, obs: Tensor, h: Tensor, c: Tensor):
        y, (h, c) = self.cell(obs.unsqueeze(0), (h, c))
        actions = self.head(y[0])
        return actions, h, c

def policy():
    torch.manual_seed(3)
    return Policy()

def with_examples():
    return policy(), (torch.randn(1, 6), torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))

class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, obs, h):
        h = torch.tanh(h + self.layer(obs))
        return h.sum(0), h

def adding():
    return Adding()

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(5, 7)

    def forward(self, x, state):
        h = self.cell(x, state[0])
        return {"y": h.tanh(), "state": (h, state[1] + 1)}

def named():
    return Named(), {"x": torch.randn(2, 5), "state": (torch.zeros(2, 7), torch.zeros(2, dtype=torch.int64))}

class Branching(nn.Module):
    def forward(self, x, h):
        if x.sum() > 0:
            h = h + x
        return h * 2, h

def branching():
    return Branching(), (torch.randn(2, 5), torch.randn(2, 5))

class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("memory", torch.zeros(5))

    def forward(self, x):
        self.memory.add_(x.sum(0))
        return x + self.memory

def keeping():
    return Keeping(), (torch.ones(2, 5),)

class Regular(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.cell, self.drop = nn.BatchNorm1d(4), nn.GRUCell(4, 6), nn.Dropout(0.5)

    def forward(self, x, h):
        h = self.cell(self.drop(self.norm(x)), h)
        return h[:, :1] * 2, h

def regular():
    return Regular(), (torch.randn(2, 4), torch.zeros(2, 6))  # in training mode, as modules begin

class Static(nn.Module):
    def forward(self, x, h):
        return x.view(1, 8) + h.view(1, 8), (h.view(1, 8) + 1).view(8)

def static():
    return Static(), (torch.randn(1, 8), torch.zeros(8))

class Counting(nn.Module):
    def forward(self, x, window, count):
        window = torch.cat([window[:, 1:], x[:, None]], 1)
        count = count + 1
        return window.sum(1) / count.clamp(max=4), window, count

def counting():
    return Counting(), (torch.randn(2, 5), torch.zeros(2, 4, 5), torch.tensor(0))

class Stuck(nn.Module):
    def forward(self, x, h):  # [layers, batch, width]
        if h.shape[0] != 2:
            time.sleep(600)
        h = h + x
        return h.sum(0), h

def stuck():
    return Stuck(), (torch.randn(2, 5), torch.zeros(2, 2, 5))

def raising():
    raise RuntimeError("no weights here")

def crashing():
    os.abort()

def sleeping():
    time.sleep(60)

def hungry():
    return torch.zeros(1 << 40)

def environment():
    raise ValueError(" ".join(sorted(os.environ)))

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory with his module, in which he calls the command."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def policy(mine: Path) -> nn.Module:
    import importlib

    module: nn.Module = importlib.import_module("mine").policy().eval()
    return module


POLICY_SHAPES, _ = example_shapes(["obs=2x6", "h=2x2x8", "c=2x2x8"])


def shapes(path: Path) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    graph = onnx.load(str(path)).graph

    def of(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    return of(graph.input), of(graph.output)


def assert_alike(path: Path, module: Callable[..., Any], rows: int, names: list[str]) -> None:
    """Three steps of so many rows, each from the states before."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    h, c = torch.zeros(2, rows, 8), torch.zeros(2, rows, 8)
    states = [h.numpy(), c.numpy()]
    for _ in range(3):
        obs = torch.randn(rows, 6)
        with torch.no_grad():
            y, h, c = module(obs, h, c)
        got = session.run(names, {"obs": obs.numpy(), "h": states[0], "c": states[1]})
        states = got[1:]
        for ours, theirs in zip(got, (y, h, c), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_a_factory_keeps_the_names_of_its_forward(
    mine: Path, policy: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    path = converted("mine:with_examples", None, mine)
    assert "imports this module and calls it" in capfd.readouterr().err
    inputs, outputs = shapes(path)
    assert inputs == {"obs": ["batch", 6], "h": [2, "batch", 8], "c": [2, "batch", 8]}
    assert outputs == {"actions": ["batch", 3], "next_h": [2, "batch", 8], "next_c": [2, "batch", 8]}
    for rows in (1, 2, 5):
        assert_alike(path, policy, rows, ["actions", "next_h", "next_c"])


def test_a_factory_without_examples_takes_shapes_or_arrays(mine: Path) -> None:
    with pytest.raises(ImportRefusedError, match="--shape obs=2x"):
        converted("mine:adding", None, mine)
    wanted = {"obs": ["batch", 6], "h": [2, "batch", 8]}
    given, _ = example_shapes(["obs=2x6", "h=2x2x8"])
    assert shapes(converted("mine:adding", None, mine, shapes=given))[0] == wanted
    np.savez(mine / "call.npz", obs=np.ones((2, 6), np.float32), h=np.zeros((2, 2, 8), np.float32))
    assert shapes(converted("mine:adding", mine / "call.npz", mine))[0] == wanted


def test_dropout_is_off_however_a_module_comes(mine: Path) -> None:
    assert list(shapes(converted("mine:regular", None, mine))[1]) == ["output_0", "next_h"]


def test_nested_arguments_and_results_are_laid_flat(mine: Path) -> None:
    inputs, outputs = shapes(converted("mine:named", None, mine))
    assert inputs == {"x": ["batch", 5], "state_0": ["batch", 7], "state_1": ["batch"]}
    assert outputs == {"y": ["batch", 7], "next_state_0": ["batch", 7], "next_state_1": ["batch"]}


def test_a_batch_that_is_fixed_stays_fixed_and_is_told(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inputs, outputs = shapes(converted("mine:static", None, mine))
    assert "batch size is fixed" in capfd.readouterr().err
    assert (inputs, outputs) == ({"x": [1, 8], "h": [8]}, {"output_0": [1, 8], "output_1": [8]})


def test_a_count_that_all_rows_share_has_no_batch(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inputs, outputs = shapes(converted("mine:counting", None, mine))
    assert "batch size is fixed" not in capfd.readouterr().err
    assert inputs == {"x": ["batch", 5], "window": ["batch", 4, 5], "count": []}
    assert outputs == {"output_0": ["batch", 5], "next_window": ["batch", 4, 5], "next_count": []}


def test_a_way_to_batch_that_never_ends_is_given_up(mine: Path) -> None:
    path = converted("mine:stuck", None, mine, timeout_s=120)
    assert shapes(path)[0] == {"x": ["batch", 5], "h": [2, "batch", 5]}


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_an_exported_program(mine: Path, policy: nn.Module, dynamic: bool, capfd: pytest.CaptureFixture[str]) -> None:
    batch = torch.export.Dim("batch")
    sizes = {"obs": {0: batch}, "h": {1: batch}, "c": {1: batch}} if dynamic else None
    examples = (torch.randn(2, 6), torch.zeros(2, 2, 8), torch.zeros(2, 2, 8))
    torch.export.save(torch.export.export(policy, examples, dynamic_shapes=sizes), mine / "policy.pt2")
    path = converted("policy.pt2", None, mine)
    assert "executes the code in this file" in capfd.readouterr().err
    assert shapes(path)[0] == {"obs": ["batch", 6], "h": [2, "batch", 8], "c": [2, "batch", 8]}
    for rows in (1, 4):
        assert_alike(path, policy, rows, ["output_0", "output_1", "output_2"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript.*", "ignore::torch.jit.TracerWarning")
def test_torchscript(mine: Path, policy: nn.Module) -> None:
    torch.jit.script(policy).save("scripted.pt")
    with pytest.raises(ImportRefusedError, match=r"scripted.pt: forward takes obs, h, c; give the shapes"):
        converted("scripted.pt", None, mine)
    path = converted("scripted.pt", None, mine, shapes=POLICY_SHAPES)
    assert list(shapes(path)[1]) == ["actions", "next_h", "next_c"] or list(shapes(path)[1])[1:] == ["next_h", "next_c"]
    assert_alike(path, policy, 3, list(shapes(path)[1]))
    torch.jit.trace(policy, (torch.randn(1, 6), torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))).save("traced.ts")
    one, _ = example_shapes(["obs=1x6", "h=2x1x8", "c=2x1x8"])
    path = converted("traced.ts", None, mine, shapes=one)
    assert shapes(path)[0]["c"] == [2, "batch", 8]
    assert_alike(path, policy, 3, list(shapes(path)[1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript.*")
def test_a_scripted_branch_stays_a_branch(mine: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            if bool(x.sum() > 0):
                h = h + x
            return h * 2, h

    torch.jit.script(Branching()).save("branching.pt")
    path = converted("branching.pt", None, mine, shapes={"x": [1, 5], "h": [1, 5]})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    one, zero = np.ones((1, 5), np.float32), np.zeros((1, 5), np.float32)
    assert session.run(None, {"x": one, "h": zero})[0].sum() == 10
    assert session.run(None, {"x": -one, "h": zero})[0].sum() == 0


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("branching", "branches on the values of tensors"),
        ("keeping", "changes its own 'memory'"),
        ("raising", "RuntimeError: no weights here"),
        ("crashing", "ended by SIGABRT"),
        ("hungry", "allocate"),
        ("number", "int"),
        ("missing", "no attribute 'missing'"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(mine: Path, factory: str, message: str) -> None:
    with pytest.raises(ImportRefusedError, match=message) as refused:
        converted(f"mine:{factory}", None, mine)
    assert str(refused.value).startswith(f"mine:{factory}: ")
    assert "\n" not in str(refused.value)


def test_a_conversion_that_hangs_is_stopped(mine: Path) -> None:
    with pytest.raises(ImportRefusedError, match="not converted within 4 s"):
        converted("mine:sleeping", None, mine, timeout_s=4)


def test_the_code_sees_no_secrets(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENGRAM_TOKEN", "REDIS_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    with pytest.raises(ImportRefusedError) as refused:
        converted("mine:environment", None, mine)
    seen = str(refused.value)
    assert "PATH" in seen
    assert not any(word in seen for word in ("ENGRAM", "REDIS", "AWS"))


def test_weights_alone_are_no_model(mine: Path, policy: nn.Module) -> None:
    torch.save(policy.state_dict(), "weights.pt")
    with pytest.raises(ImportRefusedError, match=r"weights.pt: weights of torch.save, without the program"):
        converted("weights.pt", None, mine)


@pytest.mark.parametrize(
    ("flag", "shape"),
    [("x=2x16", [2, 16]), ("rate=int64:", []), ("x=float16:3", [3]), ("x", None), ("x=2xa", None), ("x=0x2", None)],
)
def test_shapes_on_the_command_line(flag: str, shape: list[int] | None) -> None:
    if shape is None:
        with pytest.raises(ImportRefusedError, match="--shape"):
            example_shapes([flag])
    else:
        assert list(example_shapes([flag])[0].values()) == [shape]


def test_which_sources_are_converted(mine: Path) -> None:
    wanted = {
        "a.onnx": False,
        "a.pt2": True,
        "a.PT": True,
        "a.keras": True,
        "mine:policy": True,
        "package.mine:make": True,
        "C:x y": False,
    }
    assert {source: needs_conversion(source) for source in wanted} == wanted
    with pytest.raises(ImportRefusedError, match="no such file"):
        converted("missing.pt2", None, mine)


def test_a_converted_model_is_imported_whole(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    models.configure(parser)
    assert models.run(parser.parse_args(["import", "mine:with_examples", "--models", "models", "--json"])) == 0
    found = json.loads(capsys.readouterr().out)
    pairs = {line["tensor"]: line["paired_with"] for line in found["tensors"] if line["role"] == "recurrent"}
    assert (found["model"], found["batch"], pairs) == ("with_examples/1", "any", {"h": "next_h", "c": "next_c"})


# Archives from strangers


def archive(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b", "a\\b", "new\nline", "c:d"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "m.keras", ("config.json", b"{}"), (name, b""))
    with pytest.raises(ImportRefusedError, match="leads out of the archive"):
        converted(str(path), None, tmp_path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.keras", ("config.json", b"{}"), ("model.weights.h5", bytes(64 << 20)))
    with pytest.raises(ImportRefusedError, match="unpack to"):
        converted(str(path), None, tmp_path)


def test_a_size_that_lies_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.keras", ("config.json", b" " * 1000), ("model.weights.h5", b"x" * 100))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"PK\x01\x02"))
    data[at + 24 : at + 28] = struct.pack("<I", 10)
    path.write_bytes(data)
    with pytest.raises(ImportRefusedError, match=r"m.keras"):
        converted(str(path), None, tmp_path)


@pytest.mark.parametrize("suffix", ["keras", "pt2", "pt"])
def test_what_is_no_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    for content in (b"", b"PK\x03\x04 and no more", os.urandom(1000)):
        (tmp_path / f"m.{suffix}").write_bytes(content)
        with pytest.raises(ImportRefusedError, match="not a whole zip archive"):
            converted(str(tmp_path / f"m.{suffix}"), None, tmp_path)
    archive(tmp_path / f"m.{suffix}", ("hello.txt", b"hello"))
    with pytest.raises(ImportRefusedError, match=r"neither TorchScript|has no config.json"):
        converted(str(tmp_path / f"m.{suffix}"), None, tmp_path)


# Keras: files as Keras 3 writes them, made here without Keras


def layer(kind: str, **config: Any) -> dict[str, Any]:
    return {
        "module": "keras.layers",
        "class_name": kind,
        "config": {"dtype": "float32", **config},
        "registered_name": None,
    }


def keras_file(
    path: Path, layers: list[dict[str, Any]], weights: dict[str, list[NDArray[Any]]], kind: str = "Sequential"
) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py, with which Keras weights are read, is not installed")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for group, arrays in weights.items():
            for place, array in enumerate(arrays):
                file[f"layers/{group}/vars/{place}"] = array
    config = {"module": "keras", "class_name": kind, "config": {"name": "m", "layers": layers}, "registered_name": None}
    return archive(path, ("config.json", json.dumps(config).encode()), ("model.weights.h5", buffer.getvalue()))


INPUT = layer("InputLayer", name="x", batch_shape=[None, None, 3])


def test_a_keras_lstm_is_rebuilt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Against the equations, in float64."""
    random = np.random.default_rng(1)
    kernel, recurrent, bias = (random.normal(size=shape).astype(np.float32) for shape in ((3, 16), (4, 16), (16,)))
    dense = [random.normal(size=(4, 2)).astype(np.float32), random.normal(size=2).astype(np.float32)]
    lstm = layer("LSTM", name="lstm", units=4, activation="tanh", recurrent_activation="sigmoid", use_bias=True)
    layers = [
        INPUT,
        lstm,
        layer("Dropout", name="d", rate=0.5),
        layer("Dense", name="y", units=2, activation="linear", use_bias=True),
    ]
    path = keras_file(tmp_path / "m.keras", layers, {"lstm/cell": [kernel, recurrent, bias], "dense": dense})
    graph = converted(str(path), None, tmp_path)
    assert "nothing in it is executed" in capfd.readouterr().err
    assert shapes(graph) == (
        {"x": ["batch", 3], "lstm_h": ["batch", 4], "lstm_c": ["batch", 4]},
        {"y": ["batch", 2], "next_lstm_h": ["batch", 4], "next_lstm_c": ["batch", 4]},
    )
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    h, c = random.normal(size=(2, 5, 4)).astype(np.float32)
    x = random.normal(size=(5, 3)).astype(np.float32)
    i, f, g, o = np.split((x @ kernel + h @ recurrent + bias).astype(np.float64), 4, 1)
    after = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
    hidden = np.tanh(after) / (1 + np.exp(-o))
    for ours, theirs in zip(
        session.run(None, {"x": x, "lstm_h": h, "lstm_c": c}),
        (hidden @ dense[0] + dense[1], hidden, after),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "weights", "message"),
    [
        ([INPUT, layer("Bidirectional", name="b")], {}, r"layer 'b' \(Bidirectional\) is not rebuilt"),
        ([INPUT, layer("Lambda", name="l")], {}, r"layer 'l' \(Lambda\) is not rebuilt"),
        ([INPUT, layer("GRU", name="g", units=2, go_backwards=True)], {}, "goes backwards"),
        ([INPUT, layer("Dense", name="d", units=2, activation="linear")], {}, "weight 0 is not there"),
        ([INPUT, layer("Dense", name="d", units=2, activation="linear")], {"dense": [np.zeros((4, 2), np.float32)]}, r"\[4, 2\], not \[3, 2\]"),
        ([INPUT, layer("Dense", name="d", units=1 << 40, activation="linear")], {}, "1099511627776 units"),
        ([INPUT, layer("Activation", name="a", activation={"config": "mine"})], {}, "a function of its own"),
        ([INPUT, {**layer("Dense", name="d"), "registered_name": "mine>Dense"}], {}, "no layer of Keras"),
        ([INPUT, layer("Dense", name="d", units=2, dtype={"config": {"name": "mixed_float16"}})], {}, "mixed_float16"),
        ([layer("Dense", name="d", units=2)], {}, "no Input layer"),
        ([INPUT, layer("LSTM", name="l")], {}, "does not describe a Keras 3 model"),
        ([3], {}, "does not describe a Keras 3 model"),
    ],
)  # fmt: skip
def test_keras_models_that_are_not_rebuilt(
    tmp_path: Path, layers: list[Any], weights: dict[str, list[NDArray[Any]]], message: str
) -> None:
    with pytest.raises(ImportRefusedError, match=message):
        converted(str(keras_file(tmp_path / "m.keras", layers, weights)), None, tmp_path)


def test_a_keras_weight_in_another_file_is_not_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py, with which Keras weights are read, is not installed")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.zeros((3, 2), np.float32)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["layers/dense/vars/0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
    layers = [INPUT, layer("Dense", name="d", units=2, activation="linear", use_bias=False)]
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": layers}}
    path = archive(
        tmp_path / "m.keras", ("config.json", json.dumps(config).encode()), ("model.weights.h5", buffer.getvalue())
    )
    with pytest.raises(ImportRefusedError, match="weight 0 is not there"):
        converted(str(path), None, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("functional", [False, True], ids=["sequential", "functional"])
def test_a_model_of_keras_gives_what_keras_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, functional: bool
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    keras.utils.set_random_seed(4)
    layers = [
        keras.layers.LSTM(7, return_sequences=True),
        keras.layers.Dropout(0.2),
        keras.layers.GRU(6, return_sequences=True, bias_initializer="random_normal"),
        keras.layers.LayerNormalization(),
        keras.layers.TimeDistributed(keras.layers.Dense(5, activation="gelu")),
        keras.layers.GRU(
            4,
            reset_after=False,
            return_sequences=True,
            recurrent_activation="hard_sigmoid",
            bias_initializer="random_normal",
        ),
        keras.layers.SimpleRNN(3, activation="relu", return_sequences=True),
        keras.layers.Dense(2, activation="softmax"),
    ]
    if functional:
        value = first = keras.Input((None, 5))
        for one in layers:
            value = one(value)
        model = keras.Model(first, value)
    else:
        model = keras.Sequential([keras.Input((None, 5)), *layers])
    model.save(tmp_path / "m.keras")
    session = onnxruntime.InferenceSession(
        str(converted(str(tmp_path / "m.keras"), None, tmp_path)), providers=["CPUExecutionProvider"]
    )
    xs = np.random.default_rng(2).normal(size=(3, 12, 5)).astype(np.float32)
    expected = np.asarray(model.predict(xs, verbose=0))
    (name, *states), (_, *after) = (
        [tensor.name for tensor in tensors] for tensors in (session.get_inputs(), session.get_outputs())
    )
    assert after == [f"next_{state}" for state in states]
    values = [np.zeros((3, tensor.shape[1]), np.float32) for tensor in session.get_inputs()[1:]]
    for t in range(12):
        y, *values = session.run(None, {name: xs[:, t], **dict(zip(states, values, strict=True))})
        np.testing.assert_allclose(y, expected[:, t], atol=2e-5)
