"""A model in plain torch: the ceiling of a server on a GPU, and of the first edition's. Imported where torch is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_models import Bundle
from engram_models.cell_bundles import load_cell

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class PlainTorch:
    """step: (x [n, *input], state) -> (y [n, *output], state), on `device`. See bench.types.Plain."""

    name = "torch"

    def __init__(self, step: Step, initial: Callable[[int], Any], device: str) -> None:
        self._step, self._initial, self._device = step, initial, torch.device(device)

    @contextmanager
    def running(self, threads: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def inputs(self, pool: NDArray[np.float32]) -> Sequence[Tensor]:
        return list(torch.from_numpy(pool).to(self._device))

    def initial(self, rows: int) -> Any:
        return self._initial(rows)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self._step(x, state)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what is only queued has not been computed
        return y, state

    def values(self, y: Tensor) -> NDArray[np.float32]:
        values: NDArray[np.float32] = y.float().cpu().numpy().copy()
        return values


def lstm_modules(weights: Mapping[str, NDArray[np.float32]]) -> tuple[nn.LSTM, nn.Linear]:
    """One LSTM and a linear head with these weights, named as torch names them."""
    (outputs, hidden), inputs = weights["head.weight"].shape, weights["weight_ih"].shape[1]
    lstm, head = nn.LSTM(inputs, hidden).eval(), nn.Linear(hidden, outputs).eval()
    lstm.load_state_dict({f"{name}_l0": torch.from_numpy(values) for name, values in _part(weights, "").items()})
    head.load_state_dict({name: torch.from_numpy(values) for name, values in _part(weights, "head.").items()})
    return lstm, head


def plain_lstm(weights: Mapping[str, NDArray[np.float32]], device: str) -> PlainTorch:
    """nn.LSTMCell and nn.Linear, nothing of ours."""
    lstm, head = lstm_modules(weights)
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size).eval()
    cell.load_state_dict({name.removesuffix("_l0"): values for name, values in lstm.state_dict().items()})
    cell.to(device)
    head.to(device)

    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        h, c = cell(x, state)
        return head(h), (h, c)

    def initial(rows: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows, lstm.hidden_size, device=device), torch.zeros(rows, lstm.hidden_size, device=device)

    return PlainTorch(step, initial, device)


def plain_cell(bundle: Bundle, device: str) -> PlainTorch:
    """The cell of a bundle. Raises BundleError."""
    cell = load_cell(bundle, device)
    return PlainTorch(cell, lambda rows: cell.initial_state(rows, torch.device(device)), device)


def gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _part(weights: Mapping[str, NDArray[np.float32]], prefix: str) -> dict[str, NDArray[np.float32]]:
    dot = "." in prefix
    return {name.removeprefix(prefix): values for name, values in weights.items() if ("." in name) == dot}
