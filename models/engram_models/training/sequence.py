"""The procedure "sequence": trains a cell on a task by (truncated) BPTT. Every recipe with a [model] and a [task] is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram_models.cell import Cell
from engram_models.registry import cell_type, kinds
from engram_models.training.bptt import LOSSES, truncated
from engram_models.training.checkpoint import optimizer_tensors, restore_optimizer, under
from engram_models.training.errors import TrainingError
from engram_models.training.experiment import Outcome
from engram_models.training.initialise import INPUT_STD, initialise
from engram_models.training.recipe import Recipe
from engram_models.training.tasks import Task, Wrapping, task

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.AdamW,  # Adam, where weight_decay is 0
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "one-cycle": lambda part: min(1.0, part / 0.3 + 0.04) if part < 0.3 else _SCHEDULES["cosine"]((part - 0.3) / 0.7),
}


@dataclass(frozen=True)
class SequenceOptions:
    """The [options] of a recipe. 0 stands for "not", wherever that makes sense."""

    sequences: int
    batch: int = 32
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    momentum: float = 0.0  # rmsprop and sgd
    decay: float = 0.99  # rmsprop: of the mean square
    weight_decay: float = 0.0
    clip_value: float = 0.0  # each gradient to at most this, before the norm is looked at
    clip_norm: float = 0.0  # all gradients together to at most this
    k1: int = 0  # truncated BPTT: how often, and how far back; 0: the whole sequence
    k2: int = 0
    initialisation: str = "default"  # or "identity", "orthogonal", "walk", "seek": see initialise.py
    input_std: float = INPUT_STD  # of "identity": the standard deviation of the input weights
    forget_bias: float = 0.0  # added to the forget gates' bias
    slots: int = 0  # of a Turing machine in the second half of its training; its weights do not depend on them
    evaluate_every: int = 0  # sequences
    metric: str = ""  # which of the task's is watched
    higher_is_better: bool = False
    stop_at: float | None = None  # training ends when the metric is as good as this in three evaluations in a row
    keep_best: bool = False  # the weights of the best evaluation, not the last ones

    def __post_init__(self) -> None:
        for name, known in (("optimizer", _OPTIMIZERS), ("schedule", _SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if min(self.sequences, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError("sequences, batch and learning_rate must be greater than 0")
        if self.input_std <= 0:
            raise ValueError("input_std must be greater than 0")
        if (self.stop_at is not None or self.keep_best) and not (self.evaluate_every and self.metric):
            raise ValueError("stop_at and keep_best need evaluate_every and metric")


class SequenceTraining:
    """An Experiment. `total` and `done` count sequences."""

    Options = SequenceOptions
    _PATIENCE = 3

    def __init__(self, recipe: Recipe, options: SequenceOptions, seed: int) -> None:
        table = dict(recipe.task)
        self.task: Task = task(str(table.pop("name", "")), table, f"{recipe.path}: [task]", recipe.path.parent)
        self.options, self.seed = options, seed
        self._config = _config(recipe, self.task)
        torch.manual_seed(seed)
        # The loss wants the numbers before the activation; `served` is the cell with it, and takes over the weights.
        self._inner = _made(recipe, self._config)
        self.served = self.task.wrap(self._inner) if isinstance(self.task, Wrapping) else self._inner
        self.cell = _made(recipe, {**self._config, "activation": "none"})
        initialise(self.cell, options.initialisation, options.forget_bias, options.input_std)
        self._late = self.cell
        if options.slots:
            # In a small memory, whatever is written beside what matters does harm at once, and is unlearnt.
            self._late = _made(recipe, {**self._config, "slots": options.slots, "activation": "none"})
            self._late.load_state_dict(self.cell.state_dict(keep_vars=True), assign=True)  # the very same parameters
        self._loss = LOSSES[str(self._config.get("activation", "none"))]
        self._optimizer = _optimizer(self.cell, options)
        self.done, self.total = 0, -(-options.sequences // options.batch) * options.batch
        self._curve: list[float] = []
        self._watched: list[float] = []  # the metric at each evaluation
        self._best: dict[str, Tensor] = {}

    def advance(self) -> str:
        options = self.options
        number = self.done // options.batch
        batch = self.task.batch(number, options.batch, self.seed)
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * _SCHEDULES[options.schedule](self.done / self.total)
        self._optimizer.zero_grad()
        time = batch.inputs.shape[1]
        cell = self.cell if 2 * self.done < self.total else self._late
        loss = truncated(cell, batch, self._loss, options.k1 or time, options.k2 or time)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} after {self.done} sequences; a smaller learning_rate or clip_norm may do"
            )
        self._clip()
        self._optimizer.step()
        self._curve.append(loss)
        self.done += options.batch
        every = options.evaluate_every
        if every and self.done // every != (self.done - options.batch) // every:
            self._evaluate()
        watched = f", {options.metric} {self._watched[-1]:.4g}" if self._watched else ""
        return f"loss {sum(self._curve[-100:]) / len(self._curve[-100:]):.4g}{watched}"

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"cell.{key}": value for key, value in self.cell.state_dict().items()}
        kept |= {f"best.{key}": value for key, value in self._best.items()}
        kept |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self._optimizer).items()}
        kept["curve"] = torch.tensor(self._curve, dtype=torch.float64)
        kept["watched"] = torch.tensor(self._watched, dtype=torch.float64)
        kept["counts"] = torch.tensor([self.done, self.total])
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.cell.load_state_dict(under("cell.", tensors))
        self._best = under("best.", tensors)
        restore_optimizer(self._optimizer, under("optimizer.", tensors))
        self._curve, self._watched = tensors["curve"].tolist(), tensors["watched"].tolist()
        self.done, self.total = tensors["counts"].tolist()

    def finish(self) -> Outcome:
        if self._best:
            self.cell.load_state_dict(self._best)
        cell = self._to_serve()
        metrics = {**self.task.evaluate(cell, self.seed, thorough=True), "sequences": self.done}
        curves = {"loss": self._curve} | ({self.options.metric: self._watched} if self._watched else {})
        note = self.task.note if isinstance(self.task, Wrapping) else ""
        return Outcome(metrics, curves, self.task.pictures(cell, self.seed), cell, note)

    def _evaluate(self) -> None:
        options = self.options
        found = self.task.evaluate(self._to_serve(), self.seed, thorough=False)
        if options.metric not in found:
            raise TrainingError(f"metric {options.metric!r} is not one of this task's: {', '.join(found)}")
        sign = 1 if options.higher_is_better else -1
        if options.keep_best and all(found[options.metric] * sign >= past * sign for past in self._watched):
            self._best = {key: value.clone() for key, value in self.cell.state_dict().items()}
        self._watched.append(float(found[options.metric]))
        last = self._watched[-self._PATIENCE :]
        stop = options.stop_at
        if stop is not None and len(last) == self._PATIENCE and all(one * sign >= stop * sign for one in last):
            self.total = self.done

    def _to_serve(self) -> Cell:
        self._inner.load_state_dict(self.cell.state_dict())
        return self.served.eval()

    def _clip(self) -> None:
        parameters, options = list(self.cell.parameters()), self.options
        if options.clip_value:
            torch.nn.utils.clip_grad_value_(parameters, options.clip_value)
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)


def _config(recipe: Recipe, of: Task) -> dict[str, Any]:
    """The model's config with the sizes that the task gives."""
    config = dict(recipe.model)
    config.pop("kind", None)
    for key, size in (("input_size", of.input_size), ("output_size", of.output_size)):
        if config.setdefault(key, size) != size:
            raise TrainingError(f"{recipe.path}: [model] {key} is {config[key]}, the task's is {size}")
    if config.get("activation", "none") not in LOSSES:
        raise TrainingError(f"{recipe.path}: [model] activation must be one of {', '.join(LOSSES)}")
    return config


def _made(recipe: Recipe, config: Mapping[str, Any]) -> Cell:
    kind = cell_type(str(recipe.model.get("kind")))
    if kind is None:
        raise TrainingError(f"{recipe.path}: [model] kind must be one of {', '.join(kinds())}")
    try:
        return kind.from_config(config)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{recipe.path}: [model] does not fit kind {kind.kind}: {error}") from error


def _optimizer(cell: Cell, options: SequenceOptions) -> torch.optim.Optimizer:
    extra: dict[str, Any] = {"weight_decay": options.weight_decay}
    if options.optimizer == "rmsprop":
        extra |= {"alpha": options.decay, "momentum": options.momentum}
    elif options.optimizer == "sgd":
        extra |= {"momentum": options.momentum}
    return _OPTIMIZERS[options.optimizer](cell.parameters(), lr=options.learning_rate, **extra)
