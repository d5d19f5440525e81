"""What is measured: W, the yardstick of DESIGN.md's speed budget, or any served model; its inputs; and what plain torch says.

W is one LSTM, input 64, hidden 256, linear head 256 -> 16, float32, with weights from a fixed seed: the same numbers that
tests/yardstick/plain_server.py makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_models import Repository, bundle_from_torch, load_bundle, shipped_models_dir, write_bundle
from engram_service.bench.load import input_pool

W = "bench-w"
INPUT, HIDDEN, OUTPUT = 64, 256, 16
SEED = 20240607

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Workload:
    """A model and how plain torch computes it.

    step: one batched step (x [n, *input], state) -> (y [n, *output], state); initial: the state of n new sessions. Both are on
    `device`.
    """

    model: str
    input_shape: tuple[int, ...]
    state_nbytes: int
    step: Step
    initial: Callable[[int], Any]
    device: torch.device


def torch_w() -> tuple[nn.LSTM, nn.Linear]:
    """W's weights, as torch modules."""
    torch.manual_seed(SEED)
    return nn.LSTM(INPUT, HIDDEN).eval(), nn.Linear(HIDDEN, OUTPUT).eval()


def write_w(directory: Path) -> Path:
    """Writes W's bundle into the repository `directory`; returns the bundle's path."""
    lstm, head = torch_w()
    return write_bundle(
        directory, W, "1", bundle_from_torch(lstm, head), "one LSTM 64-256 with a linear head to 16, random weights"
    )


def workload_w(device: str = "cpu") -> Workload:
    """W in plain torch: nn.LSTMCell and nn.Linear, nothing of ours."""
    place = torch.device(device)
    lstm, head = torch_w()
    cell = nn.LSTMCell(INPUT, HIDDEN).eval()
    weights = lstm.state_dict()
    cell.load_state_dict({name: weights[f"{name}_l0"] for name in cell.state_dict()})
    cell.to(place)
    head.to(place)

    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        h, c = cell(x, state)
        return head(h), (h, c)

    def initial(n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, HIDDEN, device=place), torch.zeros(n, HIDDEN, device=place)

    return Workload(W, (INPUT,), 2 * HIDDEN * 4, step, initial, place)


def workload_of(model: str, models: Path | None, device: str = "cpu") -> Workload:
    """A model of the repository `models` or of those that ship: the ceiling is its cell, with no serving. Raises ValueError."""
    refs, _ = Repository([*([models] if models else []), shipped_models_dir()]).scan()
    found = [ref for ref in refs if ref.name == model]
    if not found:
        known = ", ".join(sorted({ref.name for ref in refs})) or "none"
        raise ValueError(f"no model {model!r}; W is {W!r}, in the models directories there are: {known}")
    place = torch.device(device)
    bundle = load_bundle(found[-1].path, place)
    if bundle.input.dtype != "float32":
        raise ValueError(f"{model} takes {bundle.input.dtype}; the bench makes float32 inputs")

    def initial(n: int) -> Any:
        return bundle.cell.initial_state(n, place)

    return Workload(model, bundle.input.shape, bundle.state_nbytes, bundle.cell, initial, place)


def reference(work: Workload, seed: int, sessions: int, steps: int) -> NDArray[np.float32]:
    """What plain torch gives for the first `steps` steps of a client process's sessions: [steps, sessions, *output]."""
    pool = torch.from_numpy(input_pool(seed, sessions, work.input_shape)).to(work.device)
    state = work.initial(sessions)
    outputs = []
    with torch.inference_mode():
        for number in range(steps):
            y, state = work.step(pool[number % len(pool)], state)
            outputs.append(y.float().cpu().numpy().copy())
    return np.stack(outputs)
