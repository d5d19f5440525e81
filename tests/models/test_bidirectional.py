"""Bidirectional cells against torch.nn, plain numpy, numerical gradients, and the whole sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numerical import assert_gradients
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_models import Bidirectional, load_bundle, load_cell, write_bundle
from engram_models.recurrent import KINDS

Array = NDArray[np.float64]
NETS = [kind.kind for kind in KINDS]


def cell_of(look_ahead: int, net: str = "lstm", **options: Any) -> Bidirectional:
    torch.manual_seed(2)
    return Bidirectional(3, 5, look_ahead, net, **options).eval()


def online(cell: Bidirectional, xs: Tensor) -> Tensor:
    """Outputs as `look_ahead` more inputs than time in `xs` bring them, put back beside their inputs."""
    ahead = int(cell.config["look_ahead"])
    more = torch.cat((xs, torch.zeros(len(xs), ahead, *xs.shape[2:], dtype=xs.dtype)), 1)
    return cell.sequence(more)[0][:, ahead:]


def simple(layer: nn.Module, xs: Array) -> list[Array]:
    """s_t = tanh(U x_t + W s_{t-1} + b) from s = 0, for one row."""
    weight, bias = (getattr(layer, name).detach().double().numpy() for name in ("weight", "bias"))
    s, out = np.zeros(len(bias)), []
    for x in xs:
        s = np.tanh(weight @ np.concatenate((x, s)) + bias)
        out.append(s)
    return out


@pytest.mark.parametrize("look_ahead", [0, 1, 4])
def test_the_backward_net_runs_over_the_window(look_ahead: int) -> None:
    """Output t: the forward net after 0..t, beside the backward one after t+R..t; in numpy, window by window."""
    cell = cell_of(look_ahead, "rnn").double()
    xs = torch.randn(1, 12, 3, dtype=torch.float64)
    with torch.inference_mode():
        ys = cell.sequence(xs)[0][0].numpy()
    assert not ys[:look_ahead].any(), "no answer before step R"
    forward = simple(cell.ahead, xs[0].numpy())
    for t in range(12 - look_ahead):
        backward = simple(cell.back, xs[0, t : t + look_ahead + 1].numpy()[::-1])
        np.testing.assert_allclose(ys[t + look_ahead], np.concatenate((forward[t], backward[-1])), atol=1e-12, rtol=0)


@pytest.mark.parametrize("sort", ["rnn", "gru-reset-after", "lstm"])
def test_the_whole_sequence_is_what_torch_gives(sort: str) -> None:
    torch.manual_seed(9)
    types: dict[str, Any] = {"rnn": nn.RNN, "gru-reset-after": nn.GRU, "lstm": nn.LSTM}
    module = types[sort](6, 20, bidirectional=True, batch_first=True)
    cell = Bidirectional(6, 20, 2, sort)
    for layer, suffix in ((cell.ahead, ""), (cell.back, "_reverse")):
        w_ih, w_hh, b_ih, b_hh = (
            getattr(module, f"{name}_l0{suffix}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        layer.weight.data = torch.cat((w_ih, w_hh), 1)
        layer.bias.data = b_ih + b_hh
        if sort == "gru-reset-after":
            layer.bias.data[40:], layer.bias_n.data = b_ih[40:], b_hh[40:]
    xs = torch.randn(4, 100, 6)
    with torch.no_grad():
        assert (cell.whole(xs) - module(xs)[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("net", NETS)
def test_looking_ahead_to_the_end_is_the_whole_sequence(net: str) -> None:
    """For the first output, whose window is all there is."""
    xs = torch.randn(4, 6, 3)
    with torch.inference_mode():
        cell = cell_of(5, net, output_size=2)
        first = cell.sequence(xs)[0][:, 5]
        torch.testing.assert_close(first, cell.whole(xs)[:, 0], atol=1e-6, rtol=0)


def test_more_look_ahead_comes_nearer_to_the_whole_sequence() -> None:
    torch.manual_seed(1)
    xs = torch.randn(8, 40, 3)
    with torch.inference_mode():
        target = cell_of(0).whole(xs)[:, :20]
        apart = [(online(cell_of(ahead), xs)[:, :20] - target).abs().max().item() for ahead in (0, 2, 8, 16)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-3 < 1e-1 < apart[0]


@pytest.mark.parametrize("net", ["lstm", *(pytest.param(net, marks=pytest.mark.slow) for net in NETS if net != "lstm")])
def test_gradients_equal_numerical_ones(net: str) -> None:
    """Of outputs and float states after two steps, by inputs, states and every weight, in float64, to 1e-8."""
    cell = cell_of(2, net, output_size=2).double()
    names, weights = zip(*cell.named_parameters(), strict=True)
    floats = len(cell.state_schema) - 1

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, rest[floats:], strict=True))
        state = cell.state_type(*rest[:floats], torch.zeros(2, 1, dtype=torch.int64))
        y, after = torch.func.functional_call(cell, parameters, (x, state))
        z, after = torch.func.functional_call(cell, parameters, (x * 0.5, after))
        return (y, z, *after[:-1])

    state = [torch.randn(2, *spec.shape, dtype=torch.float64) for spec in cell.state_schema[:-1]]
    inputs = [torch.randn(2, 3, dtype=torch.float64), *state, *(w.detach() for w in weights)]
    assert_gradients(run, inputs)


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
def test_what_comes_before_step_r_is_zero(activation: str) -> None:
    cell = cell_of(3, output_size=2, activation=activation)
    state = cell.initial_state(4)
    waited = []
    with torch.inference_mode():
        for _ in range(6):
            y, state = cell(torch.randn(4, 3), state)
            waited.append(int(state.waiting[0]))  # type: ignore[attr-defined]
            assert bool((y == 0).all()) == (len(waited) <= 3)
    assert waited == [2, 1, 0, 0, 0, 0]


def test_the_windows_hold_the_last_inputs_and_outputs() -> None:
    cell = cell_of(2)
    xs = torch.randn(1, 7, 3)
    _, state = cell.sequence(xs)
    assert torch.equal(state.inputs, xs[:, 4:])  # type: ignore[attr-defined]
    assert torch.equal(state.outputs[:, -1], state.h)  # type: ignore[attr-defined]
    assert [(s.name, s.shape, s.role) for s in cell.state_schema] == [
        ("h", (5,), "recurrent"),
        ("c", (5,), "recurrent"),
        ("inputs", (3, 3), "window"),
        ("outputs", (3, 5), "window"),
        ("waiting", (1,), "counter"),
    ]


def test_a_bundle_keeps_the_look_ahead(tmp_path) -> None:
    cell = cell_of(4, "rnn", nonlinearity="relu", output_size=2)
    bundle = load_bundle(write_bundle(tmp_path, "tagger", "1", cell))
    assert load_cell(bundle).config["look_ahead"] == 4
    xs = torch.randn(4, 9, 3)
    with torch.inference_mode():
        assert torch.equal(load_cell(bundle).sequence(xs)[0], cell.sequence(xs)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"look_ahead": -1}, "look_ahead -1"),
        ({"hidden_size": 0}, "at least 1"),
        ({"net": "ntm"}, "ntm"),
        ({"activation": "gelu"}, "gelu"),
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bidirectional(**{"input_size": 3, "hidden_size": 4, "look_ahead": 1, **wrong})
