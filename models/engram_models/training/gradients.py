"""How gradients vanish and explode: the norm of dh_t/dh_k, measured, and the bound that a vanilla RNN's weights set to it.

Source: the deck's "Vanishing and exploding gradients" (Pascanu, Mikolov and Bengio 2013). For a vanilla RNN
dh_t/dh_k = prod_{k < j <= t} diag(phi'(z_j)) W, so its spectral norm is at most (gamma_W gamma_f)^(t-k), with
gamma_W = sigma_max(W) and gamma_f = max |phi'|. The procedure "gradient-flow" measures every kind of cell and draws it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from engram_models.cell import Cell, State
from engram_models.ntm import NTM
from engram_models.recurrent import GRU, LSTM, GRUResetAfter, PeepholeLSTM, RNNLayer, VanillaRNN, sigma_
from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Outcome
from engram_models.training.initialise import initialise
from engram_models.training.recipe import Recipe
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SLOPES: dict[Callable[[Tensor], Tensor], float] = {torch.tanh: 1.0, torch.relu: 1.0, sigma_: 0.25}  # gamma_f
_LAGS = (1, 10, 50, 100)  # whose norms the result file names
_SMALLEST = 1e-20  # that is drawn; a ReLU net may have died


def jacobian_norms(cell: Cell, xs: Tensor, state: State | None = None) -> Tensor:
    """The spectral norm of ds_t/ds_k for every pair: float64 [time + 1, time + 1], row t, column k, 0 above the diagonal.

    xs [time, *input]; `state` is one row's, [1, *shape] each, s_0. s is all state tensors of a cell laid end to end: h of an
    RNN or GRU, (h, c) of an LSTM, controller, memory, weightings and reads of an NTM. Raises TrainingError as step_jacobians.
    """
    steps = step_jacobians(cell, xs, state)
    time, size = len(steps), steps.shape[1]
    norms = torch.eye(time + 1, dtype=torch.float64)
    products = torch.empty(0, size, size, dtype=torch.float64)
    for t in range(1, time + 1):  # products[k] is ds_t/ds_k
        products = torch.cat((steps[t - 1] @ products, steps[t - 1 : t]))
        norms[t, :t] = torch.linalg.matrix_norm(products, 2)
    return norms


def step_jacobians(cell: Cell, xs: Tensor, state: State | None = None) -> Tensor:
    """ds_t/ds_{t-1} of each step, float64 [time, states, states]; arguments as jacobian_norms.

    Raises TrainingError where a state is not of real numbers, as the counter of a bidirectional cell.
    """
    if not all(spec.is_float for spec in cell.state_schema):
        raise TrainingError(f"kind {cell.kind} has states that are no real numbers; measure its forward net alone")
    cell, xs = copy.deepcopy(cell).double(), xs.double()
    sizes = [spec.size for spec in cell.state_schema]

    def advanced(flat: Tensor, x: Tensor) -> Tensor:
        parts = zip(torch.split(flat, sizes, 1), cell.state_schema, strict=True)
        after = cell(x, cell.state_type(*(part.reshape(-1, *spec.shape) for part, spec in parts)))[1]
        return torch.cat([tensor.flatten(1) for tensor in after], 1)

    flat = torch.cat([part.double().flatten(1) for part in state or cell.initial_state(1)], 1)
    visited = []
    for x in xs:
        visited.append(flat)
        flat = advanced(flat, x.unsqueeze(0)).detach()
    # One row for each number of each step's state: its own number's gradient is a row of the Jacobian.
    size = flat.shape[1]
    before = torch.cat(visited).repeat_interleave(size, 0).requires_grad_()
    after = advanced(before, xs.repeat_interleave(size, 0)).view(len(xs), size, size)
    (jacobians,) = torch.autograd.grad(after.diagonal(dim1=1, dim2=2).sum(), before)
    return jacobians.view(len(xs), size, size)


def bound(layer: RNNLayer) -> float:
    """gamma_W gamma_f of a vanilla layer: sigma_max(W), times 1 for tanh and ReLU, 1/4 for sigmoid."""
    recurrent = layer.weight.detach()[:, layer.input_size :].double()
    return float(torch.linalg.matrix_norm(recurrent, 2)) * _SLOPES[layer.phi]


def scale_recurrent(layer: RNNLayer, gamma: float) -> None:
    """Makes sigma_max(W) gamma, in place."""
    with torch.no_grad():
        recurrent = layer.weight[:, layer.input_size :]
        recurrent *= gamma / torch.linalg.matrix_norm(recurrent, 2)


@dataclass(frozen=True)
class FlowOptions:
    """The [options] of a gradient-flow recipe."""

    time: int = 100  # not beyond some 400: the bound of a sigmoid net is then no float64
    hidden_size: int = 16
    input_size: int = 4
    draws: int = 5  # of weights, start and inputs, for every net
    gammas: tuple[float, ...] = (
        0.9,
        1.0,
        1.3,
        2.5,
    )  # sigma_max(W) of the vanilla nets, whose W is orthogonal but for it

    def __post_init__(self) -> None:
        if min(self.time, self.hidden_size, self.input_size, self.draws, len(self.gammas)) < 1 or min(self.gammas) <= 0:
            raise ValueError("time, hidden_size, input_size, draws and the gammas must be greater than 0")


class GradientFlow:
    """An Experiment: norms of dh_t/dh_k of every kind of cell. `total` and `done` count nets measured."""

    Options: ClassVar[type] = FlowOptions

    def __init__(self, recipe: Recipe, options: FlowOptions, seed: int) -> None:
        self._options, self._seed = options, seed
        self._nets = _nets(options)
        self.done, self.total = 0, len(self._nets) * options.draws
        self._seen: dict[str, list[Tensor]] = {
            name: [] for name in self._nets
        }  # of each draw: [3, time + 1], see _by_lag

    def advance(self) -> str:
        name = list(self._nets)[self.done // self._options.draws]
        torch.manual_seed(self._seed * 10_007 + self.done)
        cell = self._nets[name]()
        xs = torch.randn(self._options.time, self._options.input_size, generator=generator(self._seed, self.done))
        self._seen[name].append(_by_lag(jacobian_norms(cell, xs), _bound_of(cell)))
        self.done += 1
        return name

    def tensors(self) -> dict[str, Tensor]:
        seen = {name: torch.stack(draws) for name, draws in self._seen.items() if draws}
        return {**seen, "done": torch.tensor(self.done)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._seen = {name: list(tensors[name]) if name in tensors else [] for name in self._nets}
        self.done = int(tensors["done"])

    def finish(self) -> Outcome:
        seen = {name: torch.stack(draws) for name, draws in self._seen.items()}
        vanilla = [name for name in seen if name.startswith(VanillaRNN.kind)]
        lags = [lag for lag in _LAGS if lag <= self._options.time]
        time = self._options.time
        metrics = {
            "worst_ratio": max(
                float(seen[name][:, _RATIO].max()) for name in vanilla
            ),  # measured / bound, of all pairs
            "pairs": len(vanilla) * self._options.draws * time * (time + 1) // 2,
            "norms": {name: {str(lag): float(seen[name][:, _MEAN].mean(0)[lag]) for lag in lags} for name in seen},
        }
        return Outcome(metrics, pictures={"gradient-flow": lambda: _drawn(seen, self._options.gammas)})


_MEAN, _LARGEST, _RATIO = range(3)  # rows of _by_lag
_IDENTITY = f"{VanillaRNN.kind} relu identity"


def _vanilla_name(phi: str, gamma: float) -> str:
    return f"{VanillaRNN.kind} {phi} {gamma:g}"


def _by_lag(norms: Tensor, gamma: float | None) -> Tensor:
    """For each lag t - k over all pairs: mean norm, largest norm, largest norm / bound (NaN where there is none)."""
    lags = [norms.diagonal(-lag) for lag in range(len(norms))]
    mean = torch.stack([lag.mean() for lag in lags])
    largest = torch.stack([lag.max() for lag in lags])
    bounds = torch.full_like(largest, torch.nan) if gamma is None else gamma ** torch.arange(len(lags)).double()
    return torch.stack((mean, largest, largest / bounds))


def _bound_of(cell: Cell) -> float | None:
    return bound(cell.layers[0]) if isinstance(cell, VanillaRNN) else None  # type: ignore[arg-type]


def _nets(options: FlowOptions) -> dict[str, Callable[[], Cell]]:
    """Every kind of cell, freshly drawn. A bidirectional cell's two nets are nets of these kinds."""
    inputs, hidden = options.input_size, options.hidden_size

    def vanilla(nonlinearity: str, gamma: float) -> Cell:
        cell = VanillaRNN(inputs, hidden, nonlinearity=nonlinearity)
        initialise(cell, "orthogonal")
        scale_recurrent(cell.layers[0], gamma)  # type: ignore[arg-type]
        return cell

    def started(cell: Cell, way: str = "default") -> Cell:
        initialise(cell, way, forget_bias=1.0)
        return cell

    nets: dict[str, Callable[[], Cell]] = {
        _vanilla_name(phi, gamma): lambda phi=phi, gamma=gamma: vanilla(phi, gamma)  # type: ignore[misc]
        for phi in ("tanh", "relu", "sigmoid")
        for gamma in options.gammas
    }
    return nets | {
        _IDENTITY: lambda: started(VanillaRNN(inputs, hidden, nonlinearity="relu"), "identity"),
        "gru": lambda: GRU(inputs, hidden),
        "gru-reset-after": lambda: GRUResetAfter(inputs, hidden),
        "lstm": lambda: started(LSTM(inputs, hidden)),
        "lstm-peephole": lambda: started(PeepholeLSTM(inputs, hidden)),
        "ntm": lambda: NTM(inputs, 1, hidden, slots=8, width=4),
    }


def _drawn(seen: Mapping[str, Tensor], gammas: tuple[float, ...]) -> Figure:
    """Left: vanilla nets, their largest norms under their bounds. Right: the mean norms of every kind."""
    from engram_models.training.pictures import figure

    drawn = figure(12, 5)
    left, right = drawn.subplots(1, 2)
    for place, gamma in enumerate(gammas):
        for phi, line in (("tanh", "-"), ("relu", "--")):
            largest = seen[_vanilla_name(phi, gamma)][:, _LARGEST].amax(0).clamp_min(_SMALLEST)
            left.semilogy(largest.numpy(), color=f"C{place}", linestyle=line, label=f"{phi}, gamma_W = {gamma:g}")
        left.semilogy(gamma ** torch.arange(len(largest)).double().numpy(), color=f"C{place}", linestyle=":")
    others = [name for name in seen if name == _IDENTITY or not name.startswith(VanillaRNN.kind)]
    for name in [_vanilla_name("tanh", gammas[0]), *others]:
        right.semilogy(seen[name][:, _MEAN].mean(0).clamp_min(_SMALLEST).numpy(), label=name)
    left.set(title="vanilla nets: largest norm, and its bound (dotted)", ylim=(_SMALLEST, 1 / _SMALLEST))
    right.set(title="every kind of cell: mean norm")
    for axes in (left, right):
        axes.set(xlabel="t - k", ylabel="norm of dh_t/dh_k")
        axes.legend(fontsize="small")
    return drawn
