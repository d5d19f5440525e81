"""A user's own data: read, split, normalised by the training part alone, learnt, and served in its own units."""

from __future__ import annotations

import json
import os
import re
from dataclasses import MISSING, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_models import (
    LSTM,
    BundleError,
    Cell,
    Normalised,
    VanillaRNN,
    cell_floor,
    load_bundle,
    load_cell,
    shipped_models_dir,
    write_bundle,
)
from engram_models.training import autoregression
from engram_models.training.errors import TrainingError
from engram_models.training.recipe import load_recipe
from engram_models.training.run import run
from engram_models.training.sequence import SequenceOptions as Options
from engram_models.training.tables import Columns, located, read_csv, read_npz
from engram_models.training.tasks import task
from engram_models.training.tasks.classify import Classify
from engram_models.training.tasks.forecast import Forecast


def save(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def made(name: str, path: Path, **keys: Any) -> Any:
    return task(name, {"file": path.name, **keys}, "recipe: [task]", path.parent)


# Normalised cells


def scaled(transform: str = "none") -> Normalised:
    torch.manual_seed(3)
    cell = Normalised(LSTM(2, 5, output_size=2), transform, inputs=["left", "right"], outputs=["a", "b"])
    with torch.no_grad():
        for name, values in (("input", ([50.0, -3e5], [9.0, 2e3])), ("output", ([1e4, 0.5], [700.0, 0.25]))):
            getattr(cell, f"{name}_mean").copy_(torch.tensor(values[0]))
            getattr(cell, f"{name}_scale").copy_(torch.tensor(values[1]))
    return cell.eval()


@pytest.mark.parametrize("transform", ["none", "root"])
def test_a_normalised_cell_takes_and_answers_raw_values(transform: str) -> None:
    cell = scaled(transform)
    noise = torch.randn(6, 2)
    y, state = cell(cell.inputs_like(noise), cell.initial_state(6))
    inner, after = cell.inner(noise, cell.inner.initial_state(6))
    expected = inner * cell.output_scale + cell.output_mean
    if transform == "root":
        expected = expected.sign() * expected.square()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=0)  # float32 has few digits left of -3e5 +- 2e3
    torch.testing.assert_close(state, after, rtol=0, atol=1e-2)


def test_a_normalised_cell_goes_into_a_bundle_and_comes_back(tmp_path: Path) -> None:
    cell = scaled("root")
    bundle = load_bundle(write_bundle(tmp_path, "scaled", "1", cell))
    assert load_cell(bundle).config == cell.config
    assert load_cell(bundle).config["config"]["hidden_size"] == 5
    assert load_cell(bundle).config["outputs"] == ["a", "b"]
    assert bundle.schema.state == cell.inner.state_schema
    x = cell.inputs_like(torch.randn(4, 2))
    with torch.inference_mode():
        assert torch.equal(load_cell(bundle)(x, cell.initial_state(4))[0], cell(x, cell.initial_state(4))[0])


def test_scales_are_part_of_the_fingerprint_and_of_the_check(tmp_path: Path) -> None:
    one, other = scaled(), scaled()
    other.input_mean[0] += 1
    prints = [load_bundle(write_bundle(tmp_path, "m", v, c)).fingerprint for v, c in (("1", one), ("2", other))]
    assert prints[0] != prints[1]
    manifest = tmp_path / "m" / "1" / "model.toml"
    manifest.write_text(manifest.read_text().replace('transform = "none"', 'transform = "cube"'))
    with pytest.raises(BundleError, match=r"fingerprint (\w+) is recorded, (\w+) is what") as error:
        load_bundle(manifest.parent)
    manifest.write_text(manifest.read_text().replace(prints[0], str(error.value).split(", ")[1].split()[0]))
    with pytest.raises(BundleError, match="transform 'cube' is not one of none, root"):
        load_cell(manifest.parent)


def test_the_probe_sees_numbers_of_the_size_of_the_data() -> None:
    """N(0, 1) would saturate a cell that expects -3e5 +- 2e3: every batch would look alike, whatever the kernels do."""
    cell = scaled()
    seen: list[torch.Tensor] = []
    cell.inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    cell_floor(cell, 8)
    assert max(float(x.abs().max()) for x in seen) < 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "normalised", "config": {}}, "cannot|can be normalised"),
        ({"kind": "no such", "config": {}}, "'no such'"),
        ({"kind": "lstm", "config": 3}, "table"),
        ({"kind": "lstm", "config": {"input_size": 2, "hidden_size": 3}, "transform": "log"}, "'log'"),
    ],
)
def test_a_wrong_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Normalised.from_config(config)


# Reading


def test_columns_sequences_labels_and_times(tmp_path: Path) -> None:
    path = save(
        tmp_path / "d.csv",
        "# a remark, with a comma\nwho,day,x,y,what\nb,2,1,2,up\na,1,5,6,down\nb,3,3,4.5e0,up\n\n# the end\n",
    )
    table = read_csv(path, Columns(sequence="who", label="what", time="day"))
    assert (table.names, table.ids, table.labels) == (("x", "y"), ("b", "a"), ("up", "down"))
    assert [values.tolist() for values in table.values] == [[[1, 2], [3, 4.5]], [[5, 6]]]
    assert table.times == (("2", "3"), ("1",))
    assert read_csv(path, Columns(("y",))).values[0].tolist() == [[2], [6], [4.5]]


BAD: dict[str, tuple[str, Columns, str]] = {
    "empty": ("", Columns(), "the file is empty"),
    "no rows": ("a,b\n", Columns(), "no rows under the header"),
    "no header": ("1,2\n3,4\n", Columns(), "the first row must name the columns"),
    "twice": ("a,a\n1,2\n", Columns(), "names the column 'a' twice"),
    "ragged": ("a,b\n1,2\n3\n", Columns(), "line 3 has 1 cells, the header names 2"),
    "no number": ("\na,b\n1,2\n3,four\n", Columns(), "line 4, column 'b': 'four' is not a number"),
    "underscore": ("a\n1_000\n", Columns(), "line 2, column 'a': '1_000' is not a number"),
    "missing": ("a,b\n1,\n", Columns(), "line 2, column 'b' is empty"),
    "nan": ("a,b\n1,2\nnan,2\n", Columns(), "line 3, column 'a' is nan"),
    "infinite": ("a,b\n1,2\n3,-inf\n", Columns(), "line 3, column 'b' is -inf"),
    "unknown column": ("a,b\n1,2\n", Columns(("c",)), "no column 'c'; there are: a, b"),
    "unknown sequence": ("a,b\n1,2\n", Columns(sequence="id"), "no column 'id'"),
    "two labels": ("s,a,l\n1,2,x\n1,3,y\n", Columns((), "s", "l"), "line 3, column 'l': 'y' after 'x'"),
    "no label": ("s,a,l\n1,2,x\n2,3,\n", Columns((), "s", "l"), "line 3, column 'l': no label"),
    "time falls": ("t,a\n9,2\n10,2\n8,2\n", Columns(time="t"), "line 4, column 't': 8 after 10"),
    "date repeats": ("t,a\n1999-01-02,2\n1999-01-02,2\n", Columns(time="t"), "line 3, column 't'"),
    "not text": ("a\n\udcff\udcfe\n", Columns(), "not CSV in UTF-8"),
    "latin-1": ("name,a\nx,1\nk\udcf6ln,2\n", Columns(("a",)), "line 3, byte 2 (0xf6) is not text in UTF-8"),
    "utf-16": ("\udcff\udcfea\0\n\0001\0\n\0", Columns(), "UTF-16"),
    "utf-16 without a mark": ("a\0\n\0001\0\n\0", Columns(), "line 1 has a NUL byte; UTF-16 and binary files"),
    "blank line": ("a\n1\n\n3\n", Columns(), "line 3 is blank"),
    "blank lines": ("a,b\r\n1,2\r\n \t\r\n\r\n3,4\r\n", Columns(), "line 3 is blank"),
    "blank line, quoted": ('a\n1\n""\n3\n', Columns(), "line 3, column 'a' is empty"),
    "a row of nothing": ("a,b\n1,2\n,\n3,4\n", Columns(), "line 3, column 'a' is empty"),
    "index": (",a\n0,5\n1,6\n", Columns(), "column 1 of the header has no name"),
    "index of an index": ("Unnamed: 0,a\n0,5\n1,6\n", Columns(), "column 1 of the header has no name ('Unnamed: 0')"),
    "an index by name": ("index,a\n0,5\n1,6\n2,8\n", Columns(), "column 'index' counts the rows"),
    "comma at the end": ("a,\n1,\n2,\n", Columns(), "column 2 of the header has no name"),
    "asked for twice": ("a,b\n1,2\n", Columns(("a", "a")), "`columns` names 'a' twice"),
    "missing by a word": ("a\n1\nNA\n", Columns(), "line 3, column 'a' is NA; fill or remove"),
    "decimal comma": ('a;b\n1;2\n1,5;2\n', Columns(), "line 3, column 'a': '1,5' is not a number; write a point"),
    "thousands": ('a,b\n1,2\n"1,234.5",2\n', Columns(), "line 3, column 'a': '1,234.5' is not a number; write a point"),
    "thousands with spaces": ("a,b\n1,2\n1 234,2\n", Columns(), "line 3, column 'a': '1 234' is not a number"),
    "bare thousands": ("a\n999\n1,000\n", Columns(), "line 3 has 2 cells, the header names 1"),
    "other digits": ("a\n\u0663\n", Columns(), "is not a number"),
    "too large": ("a\n1e39\n", Columns(), "line 2, column 'a' is 1e39, beyond the range of float32"),
    "an open quote": ('a,b\n1,"2\n3,4\n', Columns(), "line 2: a quote is left open"),
    "more after a quote": ('a,b\n1,"2"3\n', Columns(), "line 2: not CSV"),
    "no name of a sequence": ("s,a\nx,1\n,2\n", Columns((), "s"), "line 3, column 's' is empty"),
    "no time": ("t,a\n1,1\n,2\n", Columns(time="t"), "line 3, column 't' is empty"),
    "no zone": ("t,a\n2020-01-01T00:00Z,1\n2020-01-01T01:00,2\n", Columns(time="t"), "line 3, column 't': 2020-01-01T01:00"),
    "no day": ("t,a\n2020-02-28,1\n2020-02-30,2\n", Columns(time="t"), "line 3, column 't': 2020-02-30"),
    "midnight passes": ("t,a\n23:59,1\n0:00,2\n", Columns(time="t"), "line 3, column 't': 0:00 after 23:59"),
    "the clock is set back": (
        "t,a\n2020-10-25 02:59,1\n2020-10-25 02:00,2\n", Columns(time="t"), "the time zone's offset (+01:00)"
    ),
    "words as times": ("t,a\nMarch,1\nApril,2\n", Columns(time="t"), "'April' is not a time that is understood"),
    "mixed times": ("t,a\n1,1\nnan,2\n", Columns(time="t"), "line 3, column 't': nan"),
}  # fmt: skip


READ: dict[str, str] = {
    "a mark at the beginning": "\ufeffa,b\n1,2\n3,4\n",
    "lines of Windows": "a,b\r\n1,2\r\n3,4\r\n\r\n",
    "lines of old": "a,b\r1,2\r3,4",
    "semicolons": "a;b\n1;2\n3;4\n",
    "tabs": "a\tb\n1\t2\n3\t4\n",
    "quotes": '"a","b"\n"1","2"\n"3", "4"\n',
    "blank lines around": "\n  \na,b\n1,2\n3,4\n\n\n",
    "spaces": " a , b \n 1 ,2\n3 , 4 \n",
    "other ways of a number": "a,b\n+1.0,.2e1\n3.,4E+00\n",
}


@pytest.mark.parametrize("name", READ)
def test_what_other_programs_write_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(READ[name].encode())
    table = read_csv(path, Columns())
    assert table.names == ("a", "b")
    assert table.values[0].tolist() == [[1, 2], [3, 4]]


def test_a_column_without_a_name_may_stay_where_others_are_chosen(tmp_path: Path) -> None:
    path = save(tmp_path / "d.csv", ",a\n0,5\n1,6\n")
    assert read_csv(path, Columns(("a",))).values[0].tolist() == [[5], [6]]


def test_a_remark_is_left_out_and_a_quoted_one_is_none(tmp_path: Path) -> None:
    path = save(tmp_path / "d.csv", '# x,y\nwho,a\n"#1",5\n# an "open quote\n"#1",6\n')
    assert read_csv(path, Columns(sequence="who")).ids == ("#1",)


TIMES: dict[str, list[str]] = {
    "numbers": ["-1", "9", "10", "1e2"],
    "nanoseconds": ["1700000000000000000", "1700000000000000100", "1700000000000000200"],
    "days": ["1999-12-31", "2000-01-01", "2000-02-29"],
    "months": ["1999-11", "1999-12", "2000-01"],
    "UTC": ["2020-01-01T00:00:00Z", "2020-01-01T00:00:00.25Z", "2020-01-01T00:00:00.250000001Z", "2020-01-01T00:00:01Z"],
    "spaces": ["2020-01-01 9:00", "2020-01-01 10:00"],
    "a clock change": ["2020-10-25T02:30:00+02:00", "2020-10-25T02:00:00+01:00", "2020-10-25 03:00:00+0100"],
    "some zones": ["2020-01-01T00:00+02:00", "2019-12-31T23:00Z", "2019-12-31T23:00:00.5-00:00"],
    "hours": ["8:00", "9:59", "10:00", "24:00"],
    "seconds": ["8:00:00", "8:00:00.5", "08:00:01"],
    "half days": ["11:59 AM", "12:00 PM", "1:00 pm"],
    "day first": ["31/12/2019", "01/01/2020", "1/2/2020"],
    "month first": ["12/31/2019 8:00", "01/01/2020 7:00", "1/13/2020 6:00"],
    "points": ["31.12.19", "01.01.20"],
    "quarters": ["2019Q4", "2020Q1"],
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
def test_times_are_understood(name: str, tmp_path: Path) -> None:
    times = TIMES[name]
    path = save(tmp_path / "d.csv", "t,a\n" + "".join(f"{time},1\n" for time in times))
    assert read_csv(path, Columns(time="t")).times == (tuple(times),)
    back = save(tmp_path / "back.csv", "t,a\n" + "".join(f"{time},1\n" for time in reversed(times)))
    with pytest.raises(TrainingError, match=r"line 3, column 't'"):
        read_csv(back, Columns(time="t"))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A named pipe would wait for a writer, for ever."""
    for name in ("pipe.csv", "pipe.npz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(TrainingError, match=f"{name}: not a regular file"):
            made("forecast", tmp_path / name).input_size  # noqa: B018


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_line_and_column(name: str, tmp_path: Path) -> None:
    text, columns, message = BAD[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TrainingError) as caught:
        read_csv(path, columns)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_npz_shapes(tmp_path: Path) -> None:
    X = np.arange(24.0).reshape(2, 4, 3)
    np.savez(tmp_path / "d.npz", X=X, y=["p", "q"])
    table = read_npz(tmp_path / "d.npz", labelled=True)
    assert (table.names, table.labels, len(table.values)) == (("0", "1", "2"), ("p", "q"), 2)
    assert table.values[1].tolist() == X[1].tolist()
    np.savez(tmp_path / "one.npz", X=np.arange(5))
    assert read_npz(tmp_path / "one.npz", labelled=False).values[0].shape == (5, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"Z": np.ones(3)}, "no array 'X'; there are: Z"),
        ({"X": np.ones((2, 3, 1))}, "no array 'y'"),
        ({"X": np.ones((2, 3, 1)), "y": [1, 2, 3]}, "one label for each of 2 sequences"),
        ({"X": np.array([[[1.0], [np.nan]]]), "y": [1]}, "X has nan in sequence 0, row 1, column 0"),
        ({"X": np.array([["a"]]), "y": [1]}, "numbers of shape"),
        ({"X": np.ones((0, 3, 1)), "y": []}, "X is empty"),
        ({"X": np.array([{}]), "y": [1]}, "not an NPZ file of plain arrays"),
        ({"X": np.array([[[1e39]]]), "y": [1]}, "X has 1e\\+39 in sequence 0, row 0, column 0"),
        ({"X": np.ones((2, 3, 1)), "y": [1.0, np.nan]}, "y has no label for sequence 1"),
        ({"X": np.ones((2, 3, 1)), "y": ["", "a"]}, "y has no label for sequence 0"),
    ],
)
def test_a_bad_npz_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(TrainingError, match=message):
        read_npz(tmp_path / "d.npz", labelled=True)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.npz"):
        with pytest.raises(TrainingError, match=f"{name}: No such file"):
            made("forecast", tmp_path / name).input_size  # noqa: B018
    save(tmp_path / "text.npz", "not zipped")
    with pytest.raises(TrainingError, match="not an NPZ file"):
        read_npz(tmp_path / "text.npz", labelled=False)


def test_a_file_lies_beside_the_recipe_or_comes_with_the_package(tmp_path: Path) -> None:
    assert located("own/d.csv", tmp_path) == tmp_path / "own/d.csv"
    assert read_csv(located("sunspots", tmp_path), Columns(("sunspots",), time="year")).values[0].shape == (309, 1)
    (tmp_path / "sunspots").write_text("a\n1\n")
    assert located("sunspots", tmp_path) == tmp_path / "sunspots"


# Forecasts


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    """60 rows of a and b; the last 20 are far above what training may see."""
    rows = [f"{k},{k % 7},{100 * k + (10_000 if k >= 40 else 0)}" for k in range(60)]
    return save(tmp_path / "walk.csv", "t,a,b\n" + "\n".join(rows) + "\n")


def test_batches_and_scales_come_from_the_training_part_alone(walk: Path) -> None:
    forecast = made("forecast", walk, time="t", target=["b"], length=8, warm_up=3, validation=10, test=10)
    assert (forecast.input_size, forecast.output_size) == (2, 1)
    cell = forecast.wrap(LSTM(2, 4, output_size=1))
    b = 100 * np.arange(40)
    assert cell.input_mean.tolist() == pytest.approx([np.mean(np.arange(40) % 7), b.mean()])
    assert cell.output_scale.tolist() == pytest.approx([b.std()])
    batch = forecast.batch(3, 200, seed=1)
    assert batch.inputs.shape == (200, 8, 2)
    assert batch.weights.sum(0).tolist() == [0, 0, 0, 200, 200, 200, 200, 200]
    raw = batch.targets * cell.output_scale + cell.output_mean
    before = batch.inputs[..., 1:] * cell.input_scale[1] + cell.input_mean[1]
    torch.testing.assert_close(raw - before, torch.full_like(raw, 100), rtol=0, atol=0.01)
    assert raw.max() == pytest.approx(3900, abs=0.1)
    assert raw.min() >= 99
    again = forecast.batch(3, 200, seed=1)
    assert torch.equal(batch.inputs, again.inputs)
    assert not torch.equal(batch.inputs, forecast.batch(4, 200, seed=1).inputs)


class Known(VanillaRNN):
    """Answers what it was given, plus 100: right for b, wherever there is no jump."""

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        return x[:, 1:] + 100, state


def test_errors_are_of_the_next_row_in_its_units(walk: Path) -> None:
    forecast = made("forecast", walk, time="t", target=["b"], length=8, validation=0.25, test=5, autoregression=2)
    found = forecast.evaluate(Known(2, 1), 1, thorough=True)
    jump = 10_000  # between rows 39 and 40, the first of validation
    assert found["validation_rmse"] == pytest.approx(jump / 15**0.5)
    assert found["validation_persistence_rmse"] == pytest.approx(((10_100**2 + 14 * 100**2) / 15) ** 0.5)
    assert found["test_rmse"] == 0
    assert found["test_persistence_rmse"] == pytest.approx(100)
    assert found["test_ar_rmse"] == pytest.approx(0, abs=1e-6)  # b rises by 100, which an autoregression can say
    assert (found["training_rows"], found["validation_rows"], found["test_rows"]) == (40, 15, 5)
    assert not [key for key in forecast.evaluate(Known(2, 1), 1, thorough=False) if "test" in key]


def test_sequences_are_cut_one_by_one_and_windows_stay_inside(tmp_path: Path) -> None:
    rows = [
        f"{name},{start + k}" for name, start in (("p", 0), ("q", 1000), ("r", 5000)) for k in range(20 + start // 100)
    ]
    path = save(tmp_path / "many.csv", "who,x\n" + "\n".join(rows) + "\n")
    forecast = made("forecast", path, sequence="who", length=5, validation=0.2, test=0.1)
    cell = forecast.wrap(LSTM(1, 3, output_size=1))
    batch = forecast.batch(0, 500, seed=1)
    raw = cell.raw(torch.cat((batch.inputs, batch.targets[:, -1:]), 1)).squeeze(2)
    steps = raw.diff(dim=1)
    torch.testing.assert_close(steps, torch.ones_like(steps), rtol=0, atol=0.01)
    assert {round(float(x), -3) for x in raw[:, 0]} == {0, 1000, 5000}
    assert made("forecast", path, sequence="who", length=5).evaluate(cell, 1, True)["training_rows"] == 14 + 22 + 50


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"length": 50}, "too few rows: 60 rows leave 42 for training, a window of length 50 needs 51"),
        ({"validation": 1.5}, "validation must be a fraction below 1 or a whole number"),
        ({"length": 4, "warm_up": 4}, "length 4 must be more than warm_up 4"),
        ({"transform": "log"}, "transform 'log' is not one of none, root"),
        ({"length": 5, "target": ["c"]}, "target 'c' is not one of the columns: t, a, b"),
        ({"columns": ["z"]}, "there is no column 'z'"),
        ({"window": 3}, "there is no key 'window'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(walk: Path, keys: dict[str, Any], message: str) -> None:
    def wrapped() -> Cell:
        forecast = made("forecast", walk, **keys)
        cell: Cell = forecast.wrap(LSTM(forecast.input_size, 2, output_size=forecast.output_size))
        return cell

    with pytest.raises(TrainingError, match=message):
        wrapped()


def test_an_autoregression_is_found_again() -> None:
    source = np.random.default_rng(4)
    series = np.zeros(3000)
    for t in range(2, len(series)):
        series[t] = 3 + 1.4 * series[t - 1] - 0.7 * series[t - 2] + source.normal()
    found = autoregression.fit([series[:1500], series[1500:]], 2)
    assert found == pytest.approx([3, 1.4, -0.7], abs=0.25)
    errors = (autoregression.forecasts(series, found) - series)[2:]
    assert errors.std() == pytest.approx(1, abs=0.05)
    assert 2 <= len(autoregression.fit([series], 12)) - 1 <= 6  # Akaike's criterion takes a few too many
    with pytest.raises(ValueError, match="too few"):
        autoregression.fit([series[:20]], 10)


# Classes


def test_a_split_by_class_and_padded_batches(tmp_path: Path) -> None:
    rows = [f"{k},{k % 5 + t},{'even' if k % 2 == 0 else 'odd'}" for k in range(40) for t in range(3 + k % 3)]
    path = save(tmp_path / "c.csv", "sequence,x,label\n" + "\n".join(rows) + "\n")
    classify = made("classify", path, validation=0.25, test=2)
    found = classify.evaluate(classify.wrap(LSTM(1, 3, output_size=2, activation="softmax")), 9, thorough=True)
    assert [found[f"{name}_sequences"] for name in ("train", "validation", "test")] == [26, 10, 4]
    assert found["classes"] == ["even", "odd"]
    parts = classify._parts
    assert sorted(chain(*parts.values())) == list(range(40))
    assert made("classify", path, validation=0.25, test=2)._parts == parts
    assert made("classify", path, validation=0.25, test=2, split_seed=2)._parts != parts
    batch = classify.batch(0, 64, seed=1)
    lengths = (batch.weights > 0).sum(1)
    assert set(lengths.tolist()) == {3, 4, 5}
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(64))
    assert torch.equal(batch.weights.argmax(1), lengths - 1)
    assert all(not row[n:].any() for row, n in zip(batch.inputs, lengths, strict=True))


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("sequence,x,label\n1,2,a\n2,3,a\n", {}, "one class only, 'a'"),
        ("sequence,x,label\n1,2,a\n2,3,b\n3,3,b\n", {}, "class 'a' has too few sequences: of 1"),
        ("id,x,label\n1,2,a\n", {}, "there is no column 'sequence'"),
        ("sequence,x,label\n1,2,a\n", {"label": ""}, "`sequence` and `label` must name columns"),
    ],
)
def test_classes_that_cannot_be_learnt_are_refused(
    text: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    classify = made("classify", save(tmp_path / "c.csv", text), **keys)
    with pytest.raises(TrainingError, match=message):
        classify.wrap(LSTM(1, 3, output_size=classify.output_size, activation="softmax"))


# From a recipe to a bundle

OWN = """
procedure = "sequence"
[model]
kind = "rnn"
hidden_size = 8
[task]
name = "forecast"
file = "own.csv"
length = 12
validation = 20
test = 20
[options]
sequences = {sequences}
batch = 16
learning_rate = 2e-2
evaluate_every = 160
metric = "validation_rmse"
keep_best = true
[bundle]
name = "own"
version = "1"
description = "Mine."
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A recipe beside its data: a slow wave around 1,000."""
    wave = 1000 + 50 * np.sin(np.arange(150) / 3)
    save(tmp_path / "own.csv", "height\n" + "\n".join(f"{x:.2f}" for x in wave) + "\n")
    return save(tmp_path / "own.toml", OWN.format(sequences=960))


def test_a_bundle_forecasts_raw_values(own: Path, tmp_path: Path) -> None:
    result = run(load_recipe(own), 1, tmp_path / "out")
    assert result["metrics"]["test_ratio_to_persistence"] < 0.7
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["test_rows"] == 20
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} >= {"forecast", "free-run", "loss"}
    bundle = load_bundle(tmp_path / "out" / "models" / "own" / "1")
    assert bundle.schema.generates
    assert bundle.description == "Mine. Takes height; answers the next height."
    wave = torch.tensor(read_csv(own.with_suffix(".csv"), Columns()).values[0]).float()
    with torch.inference_mode():
        said = load_cell(bundle).sequence(wave[None])[0][0]
    errors = (said[129:149] - wave[130:150]).double()
    assert errors.square().mean().sqrt().item() == pytest.approx(result["metrics"]["test_rmse"], rel=1e-4)


def test_bad_data_leave_nothing_behind(own: Path, tmp_path: Path) -> None:
    data = own.with_suffix(".csv")
    data.write_text(data.read_text().replace("\n", "\nNaN\n", 1))
    with pytest.raises(TrainingError, match=r"own\.csv: line 2, column 'height' is NaN"):
        run(load_recipe(own), 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_its_task_is_refused(own: Path, tmp_path: Path) -> None:
    own.write_text(own.read_text().replace("hidden_size = 8", 'hidden_size = 8\nactivation = "softmax"'))
    with pytest.raises(TrainingError, match="activation must be none"):
        run(load_recipe(own), 1, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "heading"),
    [
        (Options, "`[options]`"),
        (Forecast, '`[task]` with `name = "forecast"`'),
        (Classify, '`[task]` with `name = "classify"`'),
    ],
)
def test_the_documents_name_every_key_and_its_default(kind: Any, heading: str) -> None:
    document = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text()
    section = document.split(f"### {heading}\n")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", section, re.M))
    words = {MISSING: ("needed",), None: ("none",), "": ("none",), (): ("all",), False: ("false", "0", "0.0")}
    assert list(rows) == [field.name for field in fields(kind)]
    for field in fields(kind):
        assert rows[field.name] in words.get(field.default, (str(field.default),)), field.name


def test_the_shipped_sunspots_bundle_beats_its_baselines_on_years_held_out() -> None:
    recipe = load_recipe("sunspots")
    keys = {key: value for key, value in recipe.task.items() if key != "name"}
    bundle = load_bundle(shipped_models_dir() / "sunspots" / "1")
    found = task("forecast", keys, "sunspots", recipe.path.parent).evaluate(load_cell(bundle), 1, thorough=True)
    assert recipe.verdict(found) == []
    recorded = json.loads((bundle.path / "training.json").read_text())
    assert recorded["digest"] == recipe.digest
    assert found["test_rmse"] == pytest.approx(recorded["metrics"]["test_rmse"], rel=1e-3)
