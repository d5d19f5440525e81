"""RBMs against sums over all their states, their learning against exact gradients, and what is made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engram_models import (
    DBN,
    GRU,
    LSTM,
    RBM,
    VanillaRNN,
    feed_forward,
    initialise,
    load_bundle,
    load_cell,
    write_bundle,
)
from engram_models.training.boltzmann import (
    Learning,
    Pretraining,
    all_states,
    contrastive_divergence,
    exact_gradient,
    log_likelihood,
    log_partition,
    persistent_divergence,
)
from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Experiment
from engram_models.training.procedures import procedure
from engram_models.training.rbm_exact import bars_and_stripes, log_partition_of_pairs
from engram_models.training.recipe import load_recipe, parsed

LEARNING = Learning(
    epochs=4, learning_rate=0.1, batch=8, momentum=0.9, weight_decay=1e-4, k=1, persistent=False, smooth=False
)


def small_rbm(visible: int = 6, hidden: int = 4, size: float = 0.7, output: str = "recreate") -> RBM:
    torch.manual_seed(3)
    rbm = RBM(visible, hidden, output).double().eval()
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.normal_(std=size)
    return rbm


def energies(rbm: RBM, v: Tensor) -> Tensor:
    """E(v, h) = -a.v - b.h - v'Wh, written out pair by pair. [n, 2^hidden]"""
    a, b, w = (p.detach().numpy() for p in (rbm.visible_bias, rbm.bias, rbm.weight.t()))
    rows = [[-(a @ x) - b @ h - x @ w @ h for h in all_states(len(b)).numpy()] for x in v.numpy()]
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 3)])
def test_likelihood_and_partition_are_the_sums_over_all_pairs(shape: tuple[int, int]) -> None:
    rbm = small_rbm(*shape)
    table = energies(rbm, all_states(shape[0]))
    log_z = torch.logsumexp(-table, (0, 1))
    for found in (log_partition(rbm), log_partition_of_pairs(rbm)):
        torch.testing.assert_close(found, log_z, atol=1e-12, rtol=0)
    likelihood = log_likelihood(rbm, all_states(shape[0]))
    torch.testing.assert_close(likelihood, torch.logsumexp(-table, 1) - log_z, atol=1e-12, rtol=0)
    assert torch.logsumexp(likelihood, 0).abs() < 1e-12, "probabilities add up to 1"


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_exact_gradient_is_that_of_the_likelihood(shape: tuple[int, int]) -> None:
    rbm = small_rbm(*shape)
    data = all_states(shape[0])[::3]
    log_likelihood(rbm, data).mean().backward()  # type: ignore[no-untyped-call]
    for name, value in exact_gradient(rbm, data)._asdict().items():
        torch.testing.assert_close(value, getattr(rbm, name).grad, atol=1e-12, rtol=0)


def test_what_is_too_large_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="too many states"):
        log_partition(RBM(17, 18))


def test_both_conditionals_are_those_of_the_energy() -> None:
    rbm = small_rbm()
    v, h = all_states(6), all_states(4)
    given_v = torch.softmax(-energies(rbm, v), 1)
    torch.testing.assert_close(rbm.up(v), given_v @ h, atol=1e-12, rtol=0)
    given_h = torch.softmax(-energies(rbm, v), 0)
    torch.testing.assert_close(rbm.down(h), given_h.t() @ v, atol=1e-12, rtol=0)


def test_longer_chains_tend_to_the_exact_gradient() -> None:
    rbm, generator = small_rbm(size=3), torch.Generator().manual_seed(1)
    data = bars_and_stripes(2, 3)
    exact = exact_gradient(rbm, data).flat()
    many = data.repeat(1000, 1)
    cosines = [
        torch.cosine_similarity(contrastive_divergence(rbm, many, k, generator).flat(), exact, 0) for k in (1, 3, 10)
    ]
    assert cosines[0] + 0.02 < cosines[1] < cosines[2]
    assert cosines[2] > 0.9995


def test_persistent_chains_come_to_the_exact_gradient_by_single_sweeps() -> None:
    rbm, generator = small_rbm(size=3), torch.Generator().manual_seed(1)
    data = bars_and_stripes(2, 3)
    chains, exact = data.repeat(1000, 1), exact_gradient(rbm, data).flat()
    cosines = []
    for _ in range(20):
        gradient, chains = persistent_divergence(rbm, data, chains, 1, generator)
        cosines.append(torch.cosine_similarity(gradient.flat(), exact, 0))
    assert cosines[-1] > 0.998
    assert cosines[-1] > cosines[0] + 0.02


@pytest.mark.parametrize("persistent", [False, True])
def test_learning_raises_the_likelihood(persistent: bool) -> None:
    data = bars_and_stripes(3, 3).float()
    learning = dataclasses.replace(LEARNING, epochs=300, learning_rate=0.1, batch=14, persistent=persistent)
    pretraining = Pretraining(data, [8], learning, seed=1)
    before = log_likelihood(pretraining.rbms[0], data).mean()
    while pretraining.done < pretraining.total:
        pretraining.advance()
    assert log_likelihood(pretraining.rbms[0], data).mean() > before + 0.4


@pytest.mark.parametrize("masked", [False, True])
def test_no_sweep_raises_the_mean_field_energy(masked: bool) -> None:
    rbm = small_rbm(30, 20, size=0.5)
    x = torch.rand(40, 30, dtype=torch.float64)
    mask = torch.rand(40, 30) < 0.5 if masked else None
    y, energy = rbm.recreate(x, mask, sweeps=25)
    assert energy.shape == (40, 26)
    assert (energy.diff(dim=1) <= 1e-9).all()
    assert (energy[:, -1] < energy[:, 0] - 0.1).all()
    assert ((y >= 0) & (y <= 1)).all()
    if mask is not None:
        assert torch.equal(y[mask], x[mask])


def test_the_mean_field_energy_of_a_binary_input_is_the_free_energy() -> None:
    rbm, v = small_rbm(), all_states(6)
    torch.testing.assert_close(-torch.logsumexp(-energies(rbm, v), 1), rbm.free_energy(v))
    torch.testing.assert_close(rbm.mean_field_energy(v), rbm.free_energy(v))


def test_one_sweep_is_what_a_step_answers() -> None:
    torch.manual_seed(2)
    for cell in (RBM(6, 4), DBN([6, 5, 4], 3, "recreate")):
        x = torch.rand(3, 6)
        with torch.inference_mode():
            assert torch.equal(cell(x, cell.initial_state(3))[0], cell.recreate(x)[0])


def test_unknown_units_do_not_count() -> None:
    """Whatever a cue has at an unknown place, NaN too, comes to the same recreation."""
    for cell in (small_rbm(), DBN([6, 5, 4], 3).double()):
        x, mask = torch.rand(3, 6, dtype=torch.float64), torch.tensor([True, False] * 3).expand(3, -1)
        spoilt = torch.where(mask, x, torch.nan)
        for one, other in zip(cell.recreate(x, mask, 3), cell.recreate(spoilt, mask, 3), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cell: cell.recreate(torch.full((2, 6), 1.5)), "within 0..1"),
        (lambda cell: cell.recreate(torch.full((2, 6), torch.nan)), "within 0..1"),
        (lambda cell: cell.recreate(torch.zeros(2, 5)), r"expected \[batch, 6\]"),
        (lambda cell: cell.recreate(torch.zeros(2, 6), torch.ones(2, 5, dtype=torch.bool)), "must be alike"),
        (lambda cell: cell.recreate(torch.zeros(2, 6), sweeps=0), "at least 1"),
    ],
)
def test_what_cannot_be_recreated_is_refused(call: Callable[[RBM | DBN], object], message: str) -> None:
    for cell in (RBM(6, 4), DBN([6, 5, 4], 3)):
        with pytest.raises(ValueError, match=message):
            call(cell)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RBM(0, 3), "at least 1"),
        (lambda: RBM(3, 3, "dream"), "dream"),
        (lambda: DBN([5], 3), "two or more"),
        (lambda: DBN([5, 3], 0), "at least 1"),
        (lambda: DBN([5, 3], 2, "dream"), "dream"),
        (lambda: DBN.from_rbms([], 2), "at least one RBM"),
        (lambda: DBN.from_rbms([RBM(5, 3), RBM(4, 2)], 2), "RBM 1 has 4 visible units, 3 features"),
    ],
)
def test_wrong_sizes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_network_starts_as_its_rbms_and_becomes_a_plain_net() -> None:
    rbms = [small_rbm(6, 5).float(), small_rbm(5, 4).float()]
    dbn, x = DBN.from_rbms(rbms, 3), torch.rand(7, 6)
    with torch.no_grad():
        hidden = rbms[1].up(rbms[0].up(x))
        torch.testing.assert_close(dbn.logits(x), dbn.head(hidden))
        torch.testing.assert_close(dbn.recreate(x)[0], rbms[0].down(rbms[1].down(hidden)))
        net = feed_forward(dbn)
        torch.testing.assert_close(net(x), dbn.logits(x))
        next(net.parameters()).zero_()
        assert dbn.net[0].weight.abs().sum() > 0, "a copy"


@pytest.mark.parametrize(("kind", "gate"), [(VanillaRNN, 0), (GRU, 2), (LSTM, 2)])
def test_a_recurrent_net_starts_from_an_rbm(kind: type[VanillaRNN], gate: int) -> None:
    rbm = small_rbm(6, 5).float()
    cell = kind(6, 5)
    layer = cell.layers[0]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    initialise(cell, rbm)
    rows = slice(gate * 5, gate * 5 + 5)
    assert torch.equal(layer.weight[rows, :6], rbm.weight)
    assert torch.equal(layer.bias[rows], rbm.bias)
    expected = before["weight"].clone()
    expected[rows, :6] = rbm.weight
    assert torch.equal(layer.weight, expected), "the rest stays"


def test_a_stack_of_layers_starts_from_a_network_and_sizes_must_agree() -> None:
    dbn = DBN.from_rbms([small_rbm(6, 5).float(), small_rbm(5, 5).float()], 3)
    cell = VanillaRNN(6, 5, layers=2)
    initialise(cell, dbn)
    for layer, rbm in zip(cell.layers, dbn.stack, strict=True):
        assert torch.equal(layer.weight[:, :5], rbm.weight[:, :5])
    before = [parameter.clone() for parameter in cell.parameters()]
    for wrong, message in ((RBM(6, 4), "6 visible and 4 hidden"), (DBN([6, 5, 5, 5], 2), "3 RBMs do not fit")):
        with pytest.raises(ValueError, match=message):
            initialise(cell, wrong)
    assert all(torch.equal(one, other) for one, other in zip(before, cell.parameters(), strict=True))


def test_bundles_without_a_state(tmp_path: Path) -> None:
    for cell in (small_rbm(output="features").float(), DBN([6, 5, 4], 3)):
        path = write_bundle(tmp_path, cell.kind, "1", cell.eval())
        bundle = load_bundle(path)
        assert bundle.schema.state == ()
        x = torch.rand(2, 6)
        with torch.no_grad():
            assert torch.equal(
                load_cell(bundle)(x, load_cell(bundle).initial_state(2))[0], cell(x, cell.initial_state(2))[0]
            )


SMALL = {
    "rbm-exact": {"rows": 2, "columns": 3, "hidden": 4, "steps": 120, "rounds": 2, "chains": 200, "ks": [1, 3]},
    "dbn-few-labels": {
        "hidden": [16, 16], "labels": [20, 40], "draws": 1, "pretraining_epochs": 2, "epochs": 3,
        "pretraining_batch": 200, "persistent": True, "dropout": 0.2, "turn": 0.1,
    },
}  # fmt: skip


PUT_DOWN = (1, 2, 4, 6, 7, 12)  # pieces; four epochs of RBMs, then three of each net


def experiment(name: str, **changes: object) -> Experiment:
    recipe = load_recipe(name)
    kind = procedure(recipe.procedure)
    return kind(recipe, parsed(kind.Options, {**recipe.options, **SMALL[name], **changes}, name), 1)


@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_experiment_ends_as_if_it_had_run_through(name: str) -> None:
    """Put down within a layer's or a net's training and between two, each time into a new experiment."""
    through = experiment(name)
    while through.done < through.total:
        through.advance()
    expected, resumed, pieces = through.finish(), experiment(name), 0
    while resumed.done < resumed.total:
        resumed.advance()
        pieces += 1
        if pieces in PUT_DOWN:
            kept = {key: value.clone() for key, value in resumed.tensors().items()}
            done, resumed = resumed.done, experiment(name)
            resumed.restore(kept)
            assert resumed.done == done
    found = resumed.finish()
    assert found.metrics == expected.metrics
    assert found.curves == expected.curves
    for draw in found.pictures.values():
        assert draw().axes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rbm-exact", {"hidden": 13}, "1 to 12 units"),
        ("rbm-exact", {"ks": [5, 1]}, "rising"),
        ("rbm-exact", {"chains": 3}, "at least 10"),
        ("dbn-few-labels", {"labels": [1438]}, "at most 1437"),
        ("dbn-few-labels", {"pretraining_epochs": 0}, "greater than 0"),
        ("dbn-few-labels", {"dropout": 1.0}, "dropout"),
        ("dbn-few-labels", {"sweeps": 1}, "sweeps"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        experiment(name, **changes)
