"""Forecast: the next row of a user's own series, from the rows so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engram_models.cell import Cell
from engram_models.normalised import TRANSFORMS
from engram_models.training import autoregression
from engram_models.training.bptt import Batch
from engram_models.training.errors import TrainingError
from engram_models.training.scales import Scales, check_share, padded, part
from engram_models.training.tables import Columns, Table, read_csv, read_npz
from engram_models.training.tasks import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


class _Split(NamedTuple):
    """Rows of one sequence: training [0, train), validation [train, validation), test [validation, end)."""

    train: int
    validation: int
    end: int


@dataclass(frozen=True)
class Forecast:
    """One or many sequences from `file`, a CSV (columns by name) or NPZ (X), cut in time: training, validation, test.

    Inputs are the `columns`, targets the `target` columns (none named: all) of the next row. Training takes random windows of
    `length` steps from the training part and counts the loss after `warm_up` steps; scales come from the training part alone.
    `validation` and `test` are fractions of each sequence, or numbers of rows. `noise` is added to the normalised inputs.
    `autoregression`, if not 0, is the highest order of the linear autoregressions that the forecast is compared with.

    Metrics are in the units of the data, for what the cell says of a row from all rows before it. Test metrics are only in the
    thorough evaluation: nothing can be chosen by them.
    """

    file: str
    columns: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    sequence: str = ""
    time: str = ""
    length: int = 50
    warm_up: int = 0
    validation: float = 0.15
    test: float = 0.15
    transform: str = "none"
    noise: float = 0.0
    autoregression: int = 0

    def __post_init__(self) -> None:
        check_share("validation", self.validation)
        check_share("test", self.test)
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform {self.transform!r} is not one of {', '.join(TRANSFORMS)}")
        if not 0 <= self.warm_up < self.length:
            raise ValueError(f"length {self.length} must be more than warm_up {self.warm_up}, which is at least 0")
        if min(self.noise, self.autoregression) < 0:
            raise ValueError("noise and autoregression must not be negative")

    @property
    def input_size(self) -> int:
        return len(self._table.names)

    @property
    def output_size(self) -> int:
        return len(self._targets)

    def batch(self, number: int, rows: int, seed: int) -> Batch:
        source = generator(seed, number)
        series, starts = self._windows
        at = starts[torch.randint(0, len(starts), (rows, 1), generator=source)] + torch.arange(self.length + 1)
        windows = series[at]
        inputs = windows[:, :-1]
        if self.noise:
            inputs = inputs + self.noise * torch.randn(inputs.shape, generator=source)
        weights = torch.ones(rows, self.length)
        weights[:, : self.warm_up] = 0
        return Batch(inputs, windows[:, 1:, list(self._targets)], weights)

    def evaluate(self, cell: Cell, seed: int, thorough: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        forecasts = self._forecasts(cell, thorough)
        linear = self._linear if thorough else {}
        baselines = {"persistence": self._persistence, **{name: rows for name, (rows, _) in linear.items()}}
        for name in ("validation", "test") if thorough else ("validation",):
            errors = self._errors(forecasts, name)
            if not errors.size:
                continue
            found[f"{name}_rmse"] = _rms(errors)
            for baseline, rows in baselines.items():
                if name == "validation" and baseline.endswith("refit"):
                    continue  # it knows these rows
                others = self._errors(rows, name)
                found[f"{name}_{baseline}_rmse"] = _rms(others)
                found[f"{name}_ratio_to_{baseline}"] = _ratio(errors / self._spread, others / self._spread)
            if thorough and len(self._targets) > 1:
                found[f"{name}_rmse_by_column"] = dict(zip(self._target_names, map(_rms, errors.T), strict=True))
        orders = {
            f"{name}_order": dict(zip(self._target_names, order, strict=True)) for name, (_, order) in linear.items()
        }
        return {**found, **orders, **self._counts} if thorough else found

    def pictures(self, cell: Cell, seed: int) -> Mapping[str, Callable[[], Figure]]:
        from engram_models.training.tasks import forecast_pictures as pictures

        split = self._splits[0]
        start, end = (split.validation if split.end > split.validation else split.train), split.end
        if start == end:
            return {}
        times = _axis(self._table, end)[start:]
        truth = self._table.values[0][start:end]
        wanted = truth[:, self._targets]
        made = self._forecasts(cell, True)[0][start - 1 : end - 1]
        drawn = {"forecast": lambda: pictures.forecast(times, wanted, made, self._target_names)}
        if cell.schema.generates:
            free = _free_run(cell, self._table.values[0][:start], end - start)
            drawn["free-run"] = lambda: pictures.free_run(times, truth, free, self._table.names)
        return drawn

    def wrap(self, cell: Cell) -> Cell:
        if cell.config.get("activation", "none") != "none":
            raise TrainingError("the task forecast predicts numbers: [model] activation must be none")
        return self._scales.wrap(cell, self._table.names, self._target_names, self._targets)

    @property
    def note(self) -> str:
        return f"Takes {', '.join(self._table.names)}; answers the next {', '.join(self._target_names)}."

    @cached_property
    def _table(self) -> Table:
        path = Path(self.file)
        if path.suffix == ".npz":
            return _chosen(read_npz(path, labelled=False), self.columns)
        return read_csv(path, Columns(self.columns, self.sequence, "", self.time))

    @cached_property
    def _targets(self) -> tuple[int, ...]:
        """Their places among the columns."""
        names = self._table.names
        if unknown := [name for name in self.target if name not in names]:
            raise TrainingError(f"{self.file}: target {unknown[0]!r} is not one of the columns: {', '.join(names)}")
        return tuple(names.index(name) for name in self.target or names)

    @property
    def _target_names(self) -> list[str]:
        return [self._table.names[at] for at in self._targets]

    @cached_property
    def _splits(self) -> tuple[_Split, ...]:
        return tuple(self._split(number, len(values)) for number, values in enumerate(self._table.values))

    def _split(self, number: int, rows: int) -> _Split:
        test = part(self.test, rows)
        train = rows - test - part(self.validation, rows)
        if train < self.length + 1:
            name = f" of sequence {self._table.ids[number]!r}" if len(self._table.ids) > 1 else ""
            raise TrainingError(
                f"{self.file}: too few rows: {rows} rows{name} leave {max(train, 0)} for training, a window of length "
                f"{self.length} needs {self.length + 1}; a smaller length, validation or test may do"
            )
        return _Split(train, rows - test, rows)

    def _training(self) -> list[Array]:
        return [values[: split.train] for values, split in zip(self._table.values, self._splits, strict=True)]

    @cached_property
    def _scales(self) -> Scales:
        return Scales.of(np.concatenate(self._training()), self.transform)

    @cached_property
    def _spread(self) -> Array:
        """Standard deviation of each target in training: errors of columns of unlike units are compared by it."""
        spread: Array = np.concatenate(self._training())[:, self._targets].std(0)
        return np.where(spread > 0, spread, 1.0)

    @cached_property
    def _windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All training parts normalised, one after another [rows, columns], and where windows of length + 1 may start."""
        training = self._training()
        begins = np.cumsum([0, *map(len, training)])[:-1]
        starts = [begin + np.arange(len(values) - self.length) for begin, values in zip(begins, training, strict=True)]
        return self._scales.normalised(np.concatenate(training)), torch.from_numpy(np.concatenate(starts))

    def _forecasts(self, cell: Cell, thorough: bool) -> list[Array]:
        """What the cell says after each row, [rows, targets] a sequence; of the test rows only if thorough."""
        ends = [split.end if thorough else split.validation for split in self._splits]
        inputs = [torch.from_numpy(v[:end]).float() for v, end in zip(self._table.values, ends, strict=True)]
        with torch.inference_mode():
            outputs = cell.sequence(padded(inputs))[0].double().numpy()
        return [rows[:end] for rows, end in zip(outputs, ends, strict=True)]

    @cached_property
    def _persistence(self) -> list[Array]:
        """That the next row will be as this one."""
        return [values[:, self._targets] for values in self._table.values]

    @cached_property
    def _linear(self) -> dict[str, tuple[list[Array], list[int]]]:
        """Linear autoregressions of each target: fitted to the training part ("ar"), to training and validation ("ar_refit"),
        and to that after the transform, where there is one. Forecasts after each row, and each target's order."""
        if not self.autoregression:
            return {}
        training, known = [split.train for split in self._splits], [split.validation for split in self._splits]
        found = {"ar": self._fitted(training, "none"), "ar_refit": self._fitted(known, "none")}
        if self.transform != "none":
            found[f"ar_{self.transform}_refit"] = self._fitted(known, self.transform)
        return found

    def _fitted(self, ends: list[int], transform: str) -> tuple[list[Array], list[int]]:
        forth, back = TRANSFORMS[transform]
        made: list[list[Array]] = [[] for _ in ends]
        orders = []
        for at in self._targets:
            series = [forth(torch.from_numpy(values[:, at].copy())).numpy() for values in self._table.values]
            try:
                found = autoregression.fit(
                    [one[:end] for one, end in zip(series, ends, strict=True)], self.autoregression
                )
            except ValueError as error:
                raise TrainingError(f"{self.file}: autoregression: {error}") from error
            orders.append(len(found) - 1)
            for rows, one in zip(made, series, strict=True):
                next_rows = np.append(autoregression.forecasts(one, found)[1:], np.nan)
                rows.append(back(torch.from_numpy(next_rows)).numpy())
        return [np.stack(rows, 1) for rows in made], orders

    @property
    def _counts(self) -> dict[str, int]:
        train, validation = (sum(s.train for s in self._splits), sum(s.validation for s in self._splits))
        end = sum(split.end for split in self._splits)
        return {"training_rows": train, "validation_rows": validation - train, "test_rows": end - validation}

    def _errors(self, forecasts: list[Array], name: str) -> Array:
        """Of the rows of the validation or test part, [rows, targets]: forecasts[t - 1] is about row t."""
        errors = []
        for made, values, split in zip(forecasts, self._table.values, self._splits, strict=True):
            start, end = (split.train, split.validation) if name == "validation" else (split.validation, split.end)
            errors.append(made[start - 1 : end - 1] - values[start:end, self._targets])
        return np.concatenate(errors)


def _chosen(table: Table, names: tuple[str, ...]) -> Table:
    """An NPZ file's columns of these names."""
    if unknown := [name for name in names if name not in table.names]:
        raise TrainingError(f"{table.path}: there is no column {unknown[0]!r}; there are: {', '.join(table.names)}")
    places = [table.names.index(name) for name in names or table.names]
    values = tuple(rows[:, places] for rows in table.values)
    return Table(table.path, names or table.names, values, table.ids, (), ())


def _free_run(cell: Cell, known: Array, steps: int) -> Array:
    """The cell reads what is known and then its own outputs: `generate` without a server. [steps, columns]."""
    with torch.inference_mode():
        outputs, state = cell.sequence(torch.from_numpy(known).float()[None])
        rows = [outputs[:, -1]]
        while len(rows) < steps:
            y, state = cell(rows[-1], state)
            rows.append(y)
    return torch.cat(rows).double().numpy()


def _axis(table: Table, rows: int) -> Array:
    """What the pictures of the first sequence have below: times, if they are numbers, else row numbers."""
    try:
        return np.array([float(time) for time in table.times[0]][:rows])
    except (ValueError, IndexError):
        return np.arange(float(rows))


def _rms(errors: Array) -> float:
    return float(np.sqrt(np.square(errors).mean()))


def _ratio(errors: Array, others: Array) -> float:
    return _rms(errors) / _rms(others) if _rms(others) else float("inf")
