"""The Neural Turing Machine against its paper's equations, written out with nothing of the package but the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numerical import assert_gradients
from numpy.typing import NDArray
from torch import Tensor

from engram_models import NTM, Cell, State, cell_floor, content_addressing, load_cell, write_bundle
from engram_models.ntm import sharpen, shift, softplus

Array = NDArray[np.float64]

SMALL: dict[str, dict[str, Any]] = {
    "lstm": {"controller": "lstm"},
    "feedforward": {"controller": "feedforward", "activation": "softmax"},
    "heads": {"controller": "lstm", "read_heads": 2, "write_heads": 3, "shifts": 2, "activation": "sigmoid"},
    "still": {"controller": "feedforward", "read_heads": 2, "shifts": 0},
}


def small(name: str) -> NTM:
    torch.manual_seed(3)
    return NTM(3, 2, hidden_size=4, slots=6, width=3, **SMALL[name]).eval()


def sigma(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def softmax(a: Array) -> Array:
    e = np.exp(a - a.max())
    return e / e.sum()


def lstm(weight: Array, bias: Array, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    i, f, g, o = np.split(weight @ np.concatenate((x, h)) + bias, 4)
    c = sigma(f) * c + sigma(i) * np.tanh(g)
    return sigma(o) * np.tanh(c), c


def address(memory: Array, before: Array, key: Array, beta: float, g: float, s: Array, gamma: float) -> Array:
    """One head, one row: (5) to (9) of the paper, location by location."""
    slots, reach = len(memory), len(s) // 2
    likeness = [key @ row / np.sqrt((key @ key + 1e-8) * (row @ row + 1e-8)) for row in memory]
    content = softmax(beta * np.array(likeness))
    before = np.eye(slots)[0] if before.max() <= 0 else before
    gated = g * content + (1 - g) * before
    moved = np.zeros(slots)
    for place in range(slots):
        for by in range(-reach, reach + 1):
            moved[(place + by) % slots] += gated[place] * s[by + reach]
    powers = (np.maximum(moved, 0) + 1e-8) ** gamma
    return powers / powers.sum()


def paper(cell: NTM, x: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """One step of one row."""
    weights = {name: value.detach().double().numpy() for name, value in cell.state_dict().items()}
    config = cell.config
    heads, writes, M = config["read_heads"] + config["write_heads"], config["write_heads"], config["width"]
    reads, after = [f"read{k}" for k in range(config["read_heads"])], {}
    seen = np.concatenate([x, *(state[name] for name in reads)])
    weight, bias = weights["controller.weight"], weights["controller.bias"]
    if config["controller"] == "lstm":
        h, after["c"] = lstm(weight, bias, seen, state["h"], state["c"])
        after["h"] = h
    else:
        h = np.tanh(weight @ seen + bias)
    emitted = list(np.clip(weights["emit.weight"] @ h + weights["emit.bias"], -20, 20))

    def take(rows: int, width: int) -> Array:
        taken = np.array([emitted.pop(0) for _ in range(rows * width)])
        return taken.reshape(rows, width)

    keys, betas, gates = take(heads, M), take(heads, 1), take(heads, 1)
    shifts, gammas = take(heads, 2 * config["shifts"] + 1), take(heads, 1)
    erases, adds = sigma(take(writes, M)), np.tanh(take(writes, M))
    assert not emitted
    names = [f"read_weighting{k}" for k in range(len(reads))] + [f"write_weighting{k}" for k in range(writes)]
    memory = state["memory"]
    for k, name in enumerate(names):
        beta, gamma = np.log1p(np.exp(betas[k, 0])), 1 + np.log1p(np.exp(gammas[k, 0]))
        after[name] = address(
            memory, state[name], np.tanh(keys[k]), beta, sigma(gates[k, 0]), softmax(shifts[k]), gamma
        )
    for k, name in enumerate(reads):
        after[name] = after[f"read_weighting{k}"] @ memory
    kept, added = np.ones_like(memory), np.zeros_like(memory)
    for k in range(writes):
        kept *= 1 - np.outer(after[f"write_weighting{k}"], erases[k])
        added += np.outer(after[f"write_weighting{k}"], adds[k])
    after["memory"] = memory * kept + added
    y = weights["head.weight"] @ np.concatenate([h, *(after[name] for name in reads)]) + weights["head.bias"]
    return {"none": lambda: y, "softmax": lambda: softmax(y), "sigmoid": lambda: sigma(y)}[
        str(config["activation"])
    ](), after


@pytest.mark.parametrize("grad", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("name", SMALL)
def test_it_computes_the_equations_of_the_paper(name: str, dtype: torch.dtype, tolerance: float, grad: bool) -> None:
    cell = small(name).to(dtype)
    xs, state = torch.randn(12, 4, 3, dtype=dtype), cell.initial_state(4, dtype=dtype)
    names = [spec.name for spec in cell.state_schema]
    rows = [{n: t[row].double().numpy() for n, t in zip(names, state, strict=True)} for row in range(4)]
    with torch.set_grad_enabled(grad):
        for x in xs:
            y, state = cell(x, state)
            for row in range(4):
                expected, rows[row] = paper(cell, x[row].double().numpy(), rows[row])
                np.testing.assert_allclose(y[row].detach().numpy(), expected, atol=tolerance, rtol=0)
                for n, tensor in zip(names, state, strict=True):
                    np.testing.assert_allclose(tensor[row].detach().numpy(), rows[row][n], atol=tolerance, rtol=0)


def in_use(cell: Cell, batch: int) -> State:
    """A state as sessions have it: weightings are distributions."""
    return cell.state_type(
        *(
            torch.softmax(torch.randn(batch, *spec.shape, dtype=torch.float64), -1)
            if spec.role == "addressing"
            else torch.randn(batch, *spec.shape, dtype=torch.float64)
            for spec in cell.state_schema
        )
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "heads")) for name in SMALL])
def test_gradients_equal_numerical_ones(name: str) -> None:
    """Of outputs and states after two steps, by inputs, state and every weight, in float64, to 1e-8."""
    cell = small(name).double()
    names, weights = zip(*cell.named_parameters(), strict=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, values = rest[: len(cell.state_schema)], rest[len(cell.state_schema) :]
        parameters = dict(zip(names, values, strict=True))
        y, after = torch.func.functional_call(cell, parameters, (x, cell.state_type(*state)))
        z, after = torch.func.functional_call(cell, parameters, (x * 0.5, after))
        return (y, z, *after)

    inputs = [torch.randn(2, 3, dtype=torch.float64), *in_use(cell, 2), *(w.detach() for w in weights)]
    assert_gradients(run, inputs)


def test_the_schema_names_everything_that_a_head_leaves() -> None:
    cell = NTM(8, 8, hidden_size=5, slots=7, width=4, read_heads=2, write_heads=1)
    assert [(spec.name, spec.shape, spec.role) for spec in cell.state_schema] == [
        ("h", (5,), "recurrent"),
        ("c", (5,), "recurrent"),
        ("memory", (7, 4), "memory"),
        ("read_weighting0", (7,), "addressing"),
        ("read_weighting1", (7,), "addressing"),
        ("write_weighting0", (7,), "addressing"),
        ("read0", (4,), "recurrent"),
        ("read1", (4,), "recurrent"),
    ]
    assert (cell.initial_state(2)[2] == torch.tensor(1e-6)).all()
    assert small("feedforward").state_schema[0].name == "memory"


def test_content_addressing_finds_the_location_that_is_most_alike() -> None:
    torch.manual_seed(0)
    memory = torch.randn(5, 40, 20)
    sought = torch.tensor([3, 0, 39, 17, 8])
    key = torch.stack((memory[torch.arange(5), sought] * 7, torch.randn(5, 20)), 1)
    found = content_addressing(memory, key, torch.full((5, 2), 20.0))
    cosine = torch.nn.functional.cosine_similarity(key.unsqueeze(2), memory.unsqueeze(1), dim=3)
    torch.testing.assert_close(found, torch.softmax(20 * cosine, 2))
    assert torch.equal(found[:, 0].argmax(1), sought), "length does not matter"
    flat = content_addressing(memory, key, torch.zeros(5, 2))
    torch.testing.assert_close(flat, torch.full((5, 2, 40), 1 / 40))


def test_nothing_is_undefined_where_memory_or_key_is_empty() -> None:
    memory = torch.zeros(1, 4, 3, requires_grad=True)
    key = torch.zeros(1, 1, 3, requires_grad=True)
    weighting = content_addressing(memory, key, torch.full((1, 1), 20.0))
    weighting.square().sum().backward()
    torch.testing.assert_close(weighting, torch.full((1, 1, 4), 0.25))
    assert memory.grad is not None and torch.isfinite(memory.grad).all()
    assert key.grad is not None and torch.isfinite(key.grad).all()


def test_a_shift_goes_round() -> None:
    weighting = torch.eye(5).unsqueeze(0)
    by_one = torch.tensor([0.0, 0.0, 1.0]).expand(1, 5, 3)
    assert torch.equal(shift(weighting, by_one)[0], torch.roll(torch.eye(5), 1, 1))
    assert torch.equal(shift(weighting, by_one.flip(2))[0], torch.roll(torch.eye(5), -1, 1))


def test_sharpening_is_a_power_and_survives_extremes() -> None:
    torch.manual_seed(0)
    weighting = torch.softmax(torch.randn(3, 2, 6, dtype=torch.float64), 2)
    gamma = 1 + torch.rand(3, 2, dtype=torch.float64) * 5
    powers = weighting ** gamma.unsqueeze(2)
    torch.testing.assert_close(sharpen(weighting, gamma), powers / powers.sum(2, keepdim=True), atol=1e-6, rtol=0)
    for extreme in (torch.eye(1, 6), torch.zeros(1, 6), torch.full((1, 6), 1e30), -torch.eye(1, 6)):
        result = sharpen(extreme.unsqueeze(0), torch.full((1, 1), 1e3))
        assert torch.isfinite(result).all()
        assert result.sum().item() == pytest.approx(1)


def test_softplus_has_no_place() -> None:
    """Its bits for a number are the same wherever in a tensor it stands, which torch's own does not promise."""
    x = torch.randn(4096) * 5
    with torch.inference_mode():
        whole = softplus(x)
        assert softplus(torch.tensor([-1e30, 1e30])).tolist() == [0, pytest.approx(1e30)]
        assert all(torch.equal(softplus(x[k : k + 13]), whole[k : k + 13]) for k in range(0, 4000, 7))
    torch.testing.assert_close(whole, torch.nn.functional.softplus(x), atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_a_thousand_wild_steps_stay_finite(name: str) -> None:
    cell = small(name)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(50)
    state = cell.initial_state(8)
    with torch.inference_mode():
        for _ in range(1000):
            y, state = cell(torch.randn(8, 3) * 1e4, state)
    assert all(torch.isfinite(tensor).all() for tensor in (y, *state))
    for spec, tensor in zip(cell.state_schema, state, strict=True):
        if spec.role == "addressing":
            torch.testing.assert_close(tensor.sum(1), torch.ones(8))


def test_gradients_of_a_long_run_from_the_initial_state_are_finite() -> None:
    cell = small("heads").train()
    cell.sequence(torch.randn(4, 100, 3))[0].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in cell.parameters())


def test_locations_come_to_differ_from_the_even_start() -> None:
    """Heads spread evenly over an even memory would write every location alike for ever."""
    cell = small("lstm")
    with torch.inference_mode():
        _, state = cell.sequence(torch.randn(1, 5, 3))
    memory = state.memory[0]  # type: ignore[attr-defined]
    assert (memory[0] - memory[1]).abs().max() > 1e-3


def copy_task(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random bits [rows, length, 8], then a mark, then nothing while they are to be said again."""
    bits = torch.randint(0, 2, (rows, length, 8), generator=generator).float()
    xs = torch.zeros(rows, 2 * length + 1, 9)
    xs[:, :length, :8], xs[:, length, 8] = bits, 1
    return xs, bits


@pytest.mark.slow
def test_it_learns_to_copy_through_its_memory() -> None:
    """A feed-forward controller has nowhere but the memory to keep bits: without it the loss is that of guessing, log 2."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    cell = NTM(9, 8, 64, "feedforward", slots=16, width=12)
    optimizer = torch.optim.Adam(cell.parameters(), 5e-3)

    def loss_of(rows: int, length: int) -> Tensor:
        xs, bits = copy_task(rows, length, generator)
        ys = cell.sequence(xs)[0][:, length + 1 :]
        return torch.nn.functional.binary_cross_entropy_with_logits(ys, bits)

    for _ in range(400):
        loss = loss_of(32, int(torch.randint(1, 5, (), generator=generator)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cell.parameters(), 10)
        optimizer.step()
    with torch.inference_mode():
        assert loss_of(128, 4).item() < np.log(2) / 3


def test_a_served_size_keeps_its_floor_small_and_survives_its_bundle(tmp_path) -> None:
    torch.manual_seed(0)
    cell = NTM(9, 8, activation="sigmoid").eval()
    floor = cell_floor(cell, 128)
    assert floor is not None and floor <= 16
    loaded = load_cell(write_bundle(tmp_path, "copy", "1", cell))
    xs = torch.randn(4, 6, 9)
    with torch.inference_mode():
        assert torch.equal(loaded.sequence(xs)[0], cell.sequence(xs)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slots": 0}, "at least 1"),
        ({"read_heads": 0}, "at least 1"),
        ({"slots": 4, "shifts": 2}, "at most slots"),
        ({"shifts": -1}, "at least 0"),
        ({"controller": "gru"}, "gru"),
        ({"activation": "gelu"}, "gelu"),
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NTM(3, 2, **wrong)
