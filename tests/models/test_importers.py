"""Weights of torch.nn modules in cells of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from engram_models import bundle_from_torch, load_bundle, load_cell, write_bundle


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_an_imported_cell_computes_the_same(make: Any, batch_first: bool, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = make(5, 12, 2, batch_first=batch_first, bias=bias)
    head = nn.Linear(12, 3, bias=bias)
    bundle = load_bundle(write_bundle(tmp_path, "imported", "1", bundle_from_torch(module, head, "softmax")))
    xs = torch.randn(4, 50, 5)
    with torch.no_grad():
        hidden = module(xs)[0] if batch_first else module(xs.transpose(0, 1))[0].transpose(0, 1)
        expected = torch.softmax(head(hidden), -1)
        torch.testing.assert_close(load_cell(bundle).sequence(xs)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("module", "head", "message"),
    [
        (nn.LSTM(3, 4, bidirectional=True), None, "bidirectional"),
        (nn.LSTM(3, 4, proj_size=2), None, "projections"),
        (nn.GRU(3, 4), nn.Linear(5, 2), "head takes 5"),
    ],
)
def test_what_cannot_be_stepped_is_refused(module: Any, head: nn.Linear | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bundle_from_torch(module, head)


def test_outputs_of_any_size_and_weights_that_amplify_rounding() -> None:
    torch.manual_seed(0)
    module, head = nn.LSTM(4, 8), nn.Linear(8, 2)
    with torch.no_grad():
        head.weight.mul_(1e6)
        module.weight_hh_l0.mul_(30)
    for activation in ("none", "softmax", "sigmoid"):
        bundle_from_torch(module, head, activation)
    with torch.no_grad():
        cell = bundle_from_torch(relu := nn.RNN(4, 8, nonlinearity="relu"))
        relu.weight_ih_l0.mul_(1e5)
        bundle_from_torch(relu)
    assert cell.config["nonlinearity"] == "relu"


def test_the_module_is_compared_as_it_is_served_and_stays_in_its_mode() -> None:
    torch.manual_seed(0)
    module, head = nn.LSTM(4, 8, 3, dropout=0.5), nn.Linear(8, 2)
    module.train()
    head.eval()
    before = copy.deepcopy(module.state_dict())
    cell = bundle_from_torch(module, head)
    assert (module.training, head.training) == (True, False)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    x = torch.randn(2, 6, 4)
    with torch.no_grad():
        expected = head(module.eval()(x.transpose(0, 1))[0].transpose(0, 1))
        torch.testing.assert_close(cell.sequence(x)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    module, head = nn.GRU(4, 8).to(dtype), nn.Linear(8, 2)
    cell = bundle_from_torch(module.requires_grad_(False), head)
    assert {weight.dtype for weight in cell.state_dict().values()} == {torch.float32}
    assert module.weight_hh_l0.dtype == dtype
    assert load_cell(write_bundle(tmp_path, "m", "1", cell)).config == cell.config


def test_defaults_of_torch_do_not_matter(tmp_path: Path) -> None:
    module = nn.RNN(4, 8)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        cell = bundle_from_torch(module)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    load_bundle(write_bundle(tmp_path, "m", "1", cell))


class Doubled(nn.LSTM):
    """A module that computes something else."""

    def forward(self, *given: Any) -> Any:
        y, state = super().forward(*given)
        return 2 * y, state


class Whole(nn.Module):
    """As most people's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 8)
        self.out = nn.Linear(8, 2)


def changed(module: nn.Module, change: Any) -> Any:
    change(module)
    return module


def filled(module: nn.Module, value: float) -> Any:
    with torch.no_grad():
        next(module.parameters()).view(-1)[1] = value
    return module


def widened(module: nn.LSTM) -> None:
    module.weight_hh_l0 = nn.Parameter(torch.zeros(1, 2))


REFUSED: dict[str, tuple[type[Exception], Any, Any, str]] = {
    "a cell": (TypeError, nn.LSTMCell(4, 8), None, "LSTMCell: .*weight_ih as weight_ih_l0"),
    "a linear module": (TypeError, nn.Linear(4, 8), None, "a Linear: give an nn.RNN, nn.GRU or nn.LSTM"),
    "a whole model": (TypeError, Whole(), None, "Whole: .* as its 'encoder' is"),
    "another LSTM": (TypeError, type("LSTM", (nn.Module,), {"__module__": "a.quantized"})(), None, "a a.quantized.LSTM: give"),
    "a class": (TypeError, nn.LSTM, None, "LSTM class"),
    "weights": (TypeError, nn.LSTM(4, 8).state_dict(), None, "OrderedDict: .*load_state_dict"),
    "a path": (TypeError, "model.pt", None, "a str"),
    "nothing": (TypeError, None, None, "a NoneType"),
    "a forward of its own": (TypeError, Doubled(4, 8), None, "Doubled: its forward is its own"),
    "a head of its own": (TypeError, nn.LSTM(4, 8), nn.Sequential(nn.Linear(8, 2)), "Sequential as head"),
    "no head yet": (ValueError, nn.LSTM(4, 8), nn.LazyLinear(2), "LazyLinear: it has no weights before"),
    "no numbers": (ValueError, nn.LSTM(4, 8, device="meta"), None, "LSTM: weight_ih_l0 has no numbers"),
    "eight bits": (
        ValueError, nn.LSTM(4, 8).to(torch.float8_e4m3fn), None, "LSTM: weight_ih_l0 is torch.float8_e4m3fn",
    ),
    "not a number": (ValueError, filled(nn.LSTM(4, 8), float("nan")), None, "LSTM: weight_ih_l0 has NaN or infinity"),
    "an infinite head": (ValueError, nn.LSTM(4, 8), filled(nn.Linear(8, 2), float("-inf")), "Linear: weight has NaN or infinity"),
    "beyond float32": (ValueError, filled(nn.LSTM(4, 8).double(), 1e300), None, "LSTM: weight_ih_l0 has NaN or infinity"),
    "weight norm": (
        ValueError, changed(nn.LSTM(4, 8), lambda lstm: weight_norm(lstm, "weight_hh_l0")), None,
        "ParametrizedLSTM: parametrizations.* is computed; make it plain",
    ),
    "pruned": (
        ValueError, changed(nn.GRU(4, 8), lambda gru: prune.random_unstructured(gru, "weight_hh_l0", 0.5)), None,
        "GRU: weight_hh_l0_orig stands for a weight",
    ),
    "another parameter": (
        ValueError, changed(nn.GRU(4, 8), lambda gru: gru.register_parameter("gain", nn.Parameter(torch.ones(1)))), None,
        "GRU: gain is one parameter too many",
    ),
    "another shape": (ValueError, changed(nn.LSTM(4, 8), widened), None, r"LSTM: weight_hh_l0 is \[1, 2\]"),
    "a hook": (
        ValueError, changed(nn.LSTM(4, 8), lambda lstm: lstm.register_forward_hook(lambda *_: (torch.ones(8, 4, 8),))),
        None, "differs from the module .* LSTM or its head a hook",
    ),
    "a hook that fails": (
        ValueError, changed(nn.LSTM(4, 8), lambda lstm: lstm.register_forward_hook(lambda: None)), None, "does not run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_by_its_class(name: str) -> None:
    kind, module, head, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        bundle_from_torch(module, head)


@pytest.mark.parametrize("activation", [nn.Softmax(-1), ["softmax"], "relu", None])
def test_an_activation_that_is_none_is_refused(activation: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="none, softmax, sigmoid"):
        bundle_from_torch(nn.LSTM(4, 8), None, activation)
