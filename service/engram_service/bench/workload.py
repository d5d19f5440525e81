"""What is measured: W, the yardstick of the speed budget, or any served model; its inputs; and the plain libraries beside it.

W is one LSTM, input 64, hidden 256, linear head 256 -> 16, float32, with weights from a fixed seed: the same numbers that
tests/yardstick/plain_server.py makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_models import Repository, TensorSpec, load_bundle, shipped_models_dir
from engram_models.fingerprints import IMPORTED
from engram_models.spec import Schema
from engram_service.bench.load import input_pool
from engram_service.bench.plain_onnx import Arrays, PlainOnnx, lstm_graph
from engram_service.bench.types import Plain

W = "bench-w"
INPUT, HIDDEN, OUTPUT = 64, 256, 16
SEED = 20240607
_DESCRIPTION = "one LSTM 64-256 with a linear head to 16, random weights"
_CONFIG = {"input_size": INPUT, "hidden_size": HIDDEN, "layers": 1, "activation": "none", "output_size": OUTPUT}
_SCHEMA = Schema(
    (TensorSpec("input", "float32", (INPUT,)),),
    (TensorSpec("output", "float32", (OUTPUT,)),),
    tuple(TensorSpec(name, "float32", (HIDDEN,), "recurrent") for name in ("h0", "c0")),
)


@dataclass(frozen=True)
class Workload:
    """A model, and how plain libraries compute it: first the one that the server uses on this device, whose rate is the ceiling."""

    model: str
    schema: Schema
    plains: tuple[Plain, ...]
    device: str
    bundle: Path | None = None  # W has one where it is written

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.schema.inputs[0].shape

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


@cache
def has_torch() -> bool:
    """A server for CPUs needs none, nor does its bench."""
    try:
        import torch  # noqa: F401 - whether it is there is all that is asked
    except ImportError:
        return False
    return True


def gpu() -> str:
    """The name of the first one that torch can use, or nothing."""
    if not has_torch():
        return ""
    from engram_service.bench.plain_torch import gpu

    return gpu()


def device_of(name: str) -> str:
    """What `auto` means to the server too."""
    return name if name != "auto" else "cuda:0" if gpu() else "cpu"


def weights_w(hidden: int = HIDDEN, seed: int = SEED) -> dict[str, NDArray[np.float32]]:
    """W's weights, or those of one like it, named and laid out as torch's modules have them, gates i f g o."""
    generator, bound = np.random.default_rng(seed), hidden**-0.5
    shapes = {
        "weight_ih": (4 * hidden, INPUT), "weight_hh": (4 * hidden, hidden), "bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,),
        "head.weight": (OUTPUT, hidden), "head.bias": (OUTPUT,),
    }  # fmt: skip
    return {name: generator.uniform(-bound, bound, shape).astype(np.float32) for name, shape in shapes.items()}


def write_w(directory: Path) -> Path:
    """Writes W's bundle into the repository `directory`; returns the bundle's path. With torch, as its users do."""
    weights = weights_w()
    return write_lstm(directory, W, "1", weights) if has_torch() else _write_without_torch(directory, weights)


def write_lstm(directory: Path, name: str, version: str, weights: Mapping[str, NDArray[np.float32]]) -> Path:
    """Writes a bundle of weights that are named as W's are. With torch."""
    from engram_models import bundle_from_torch, write_bundle
    from engram_service.bench.plain_torch import lstm_modules

    return write_bundle(directory, name, version, bundle_from_torch(*lstm_modules(weights)), _DESCRIPTION)


def workload_w(device: str = "cpu") -> Workload:
    """W in plain libraries: the LSTM operator and a product; nn.LSTMCell and nn.Linear. Raises ValueError."""
    weights = weights_w()
    plains: list[Plain] = [PlainOnnx(lstm_graph(weights, _SCHEMA), _SCHEMA, _zeros)] if device == "cpu" else []
    if has_torch():
        from engram_service.bench.plain_torch import plain_lstm

        plains.append(plain_lstm(weights, device))
    return _workload(W, _SCHEMA, plains, device)


def workload_of(model: str, models: Path | None, device: str = "cpu") -> Workload:
    """A model of the repository `models` or of those that ship: its graph, and its cell if it has one. Raises ValueError."""
    refs, _ = Repository([*([models] if models else []), shipped_models_dir()]).scan()
    found = [ref for ref in refs if ref.name == model]
    if not found:
        known = ", ".join(sorted({ref.name for ref in refs})) or "none"
        raise ValueError(f"no model {model!r}; W is {W!r}, in the models directories there are: {known}")
    bundle = load_bundle(found[-1].path)
    schema = bundle.schema
    if len(schema.inputs) != 1 or len(schema.outputs) != 1 or schema.inputs[0].dtype != "float32":
        raise ValueError(f"{model}: the bench makes inputs of one float32 tensor and compares one output")
    if bundle.one_by_one:
        raise ValueError(f"{model} computes its rows one by one: there is no batch to compare with")
    plains: list[Plain] = []
    if bundle.graph and device == "cpu":
        plains.append(PlainOnnx(bundle.read_graph(), schema, bundle.initial_states))
    if has_torch() and bundle.kind != IMPORTED:
        from engram_service.bench.plain_torch import plain_cell

        plains.append(plain_cell(bundle, device))
    return replace(_workload(model, schema, plains, device), bundle=found[-1].path)


def reference(plain: Plain, shape: tuple[int, ...], seed: int, sessions: int, steps: int) -> NDArray[np.float32]:
    """What a plain library gives for the first `steps` steps of a client process's sessions: [steps, sessions, *output]."""
    inputs = plain.inputs(input_pool(seed, sessions, shape))
    outputs = []
    with plain.running(1):
        state = plain.initial(sessions)
        for number in range(steps):
            y, state = plain.step(inputs[number % len(inputs)], state)
            outputs.append(plain.values(y))
    return np.stack(outputs)


def _workload(model: str, schema: Schema, plains: list[Plain], device: str) -> Workload:
    if not plains:
        raise ValueError(
            f"{model} on {device} is computed by torch, which is not installed: pip install 'engram[torch]'"
        )
    return Workload(model, schema, tuple(plains), device)


def _zeros(rows: int) -> Arrays:
    return [np.zeros((rows, *spec.shape), np.float32) for spec in _SCHEMA.state]


def _write_without_torch(directory: Path, weights: Mapping[str, NDArray[np.float32]]) -> Path:
    """The same bundle: of kind lstm, with the same weights, whose biases a cell of ours has as one."""
    from engram_models.bundle_writing import write
    from engram_models.check import CHECK_ROWS, CHECK_STEPS, CheckVector
    from engram_models.graph_step import GraphStep
    from engram_models.tensor_file import StoredTensor

    graph = lstm_graph(weights, _SCHEMA)
    own = {
        "layers.0.weight": np.concatenate([weights["weight_ih"], weights["weight_hh"]], 1),
        "layers.0.bias": weights["bias_ih"] + weights["bias_hh"],
        "head.weight": weights["head.weight"],
        "head.bias": weights["head.bias"],
    }
    inputs = np.random.default_rng(SEED).standard_normal((CHECK_STEPS, CHECK_ROWS, INPUT), dtype=np.float32)
    check = CheckVector.record(_SCHEMA, GraphStep(graph, _SCHEMA), [inputs], _zeros(CHECK_ROWS))
    tensors = {f"weight.{name}": StoredTensor("float32", values) for name, values in own.items()}
    return write(
        directory, W, "1", "lstm", _CONFIG, _SCHEMA, graph, {**tensors, **check.tensors(_SCHEMA)}, description=_DESCRIPTION,
        allows_non_finite=False,
    )  # fmt: skip
