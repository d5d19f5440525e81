"""Bundles on disk: the way there and back, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engram_models import LSTM, BundleError, Cell, Repository, load_bundle, load_cell, version_key, write_bundle
from engram_models.bundle import WEIGHTS, Bundle
from engram_models.examination import examine


def test_there_and_back(cell: Cell, tmp_path: Path) -> None:
    path = write_bundle(tmp_path, "some", "1.2", cell, 'says "so"\nin two lines, µ', allows_non_finite=True)
    bundle = load_bundle(path)
    assert (bundle.name, bundle.version, bundle.kind) == ("some", "1.2", cell.kind)
    assert bundle.description == 'says "so"\nin two lines, µ'
    assert bundle.allows_non_finite
    assert bundle.schema == cell.schema
    assert bundle.state_nbytes == sum(4 * spec.size for spec in cell.state_schema)
    assert bundle.schema.generates == (cell.input.shape == cell.output.shape)
    x = torch.randn(4, *cell.input.shape)
    again = load_cell(bundle)
    with torch.inference_mode():
        assert torch.equal(again(x, cell.initial_state(4))[0], cell(x, cell.initial_state(4))[0])
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_everyone_may_read_what_was_written(bundle_path: Path) -> None:
    assert sorted(path.name for path in bundle_path.iterdir()) == ["model.toml", "step.onnx", "weights.safetensors"]
    assert all(path.stat().st_mode & stat.S_IROTH for path in (bundle_path, *bundle_path.iterdir()))


def test_fingerprints_tell_weights_and_sizes_apart(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one, same = LSTM(3, 4), LSTM(3, 4)
    same.load_state_dict(one.state_dict())
    other = LSTM(3, 4)
    softmax = LSTM(3, 4, activation="softmax")
    softmax.load_state_dict(one.state_dict())
    cells = [one, same, other, softmax]
    prints = [load_bundle(write_bundle(tmp_path, "m", str(k), c)).fingerprint for k, c in enumerate(cells)]
    assert len(prints[0]) == 32
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def edit(old: str, new: str) -> Callable[[Path], None]:
    """Spoils model.toml."""

    def spoil(path: Path) -> None:
        text = (path / "model.toml").read_text()
        assert old in text
        (path / "model.toml").write_text(text.replace(old, new, 1))

    return spoil


def change(key: str, made: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Spoils, removes or adds a tensor."""

    def spoil(path: Path) -> None:
        tensors = load_file(path / "weights.safetensors")
        made_of = made(tensors.get(key, torch.zeros(1)))
        tensors.pop(key, None)
        save_file(tensors if made_of is None else {**tensors, key: made_of}, path / "weights.safetensors")

    return spoil


def mend(path: Path) -> None:
    """Puts the fingerprint right, where the files can be read."""
    try:
        load_bundle(path)
    except BundleError as error:
        if found := re.search(r"fingerprint (\w+) is recorded, (\w+) is what", str(error)):
            edit(found.group(1), found.group(2))(path)


WEIGHT = "weight.layers.0.weight"
SPOILS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no toml": (lambda path: (path / "model.toml").unlink(), "No such file"),
    "no weights": (lambda path: (path / "weights.safetensors").unlink(), "no such file"),
    "bad toml": (lambda path: (path / "model.toml").write_text("kind = = 1"), "not toml"),
    "not text": (lambda path: (path / "model.toml").write_bytes(b"\xff\xfe\x00"), "not toml"),
    "unknown key": (edit("format = 2", "format = 2\nspeed = 3"), "no key 'speed'"),
    "missing key": (edit('kind = "lstm"', ""), "'kind' is missing"),
    "wrong type": (edit("allows_non_finite = false", 'allows_non_finite = "no"'), "must be true or false"),
    "unknown kind": (edit('kind = "lstm"', 'kind = "transformer"'), "'transformer'"),
    "other format": (edit("format = 2", "format = 9"), "format 9"),
    "unknown option": (edit("hidden_size = 4", "hidden_size = 4\nwings = 2"), "config does not fit"),
    "wrong option": (edit("hidden_size = 4", 'hidden_size = "four"'), "config does not fit"),
    "wrong size": (edit("hidden_size = 4", "hidden_size = 5"), "recorded schema"),
    "wrong input": (edit("shape = [3]", "shape = [2]"), "the check vector fails"),
    "other fingerprint": (edit('fingerprint = "', 'fingerprint = "0'), "fingerprint"),
    "not safetensors": (
        lambda path: (path / "weights.safetensors").write_bytes(b"PK\x03\x04 pickled"),
        "not safetensors",
    ),
    "cut short": (lambda path: os.truncate(path / "weights.safetensors", 300), "not safetensors"),
    "missing weight": (change(WEIGHT, lambda w: None), "is missing from the weights"),
    "unexpected weight": (change("weight.extra", lambda w: w), "weight.extra is not a weight"),
    "stray tensor": (change("extra", lambda w: w), "extra is not a weight"),
    "wrong shape": (change(WEIGHT, lambda w: w[:, 1:].contiguous()), "expected float32 (16, 7)"),
    "wrong dtype": (change(WEIGHT, lambda w: w.double()), "is float64"),
    "not finite": (change(WEIGHT, lambda w: w * float("nan")), "NaN or infinity"),
    "changed weight": (change(WEIGHT, lambda w: w + 1), "fingerprint"),
    "check vector fails": (change("check.output.output", lambda w: w + 1e-3), "the check vector fails"),
    "check vector of NaN": (change("check.output.output", lambda w: w * float("nan")), "the check vector fails"),
    "check vector of another shape": (
        change("check.output.output", lambda w: w[:1].contiguous()),
        "the check vector fails",
    ),
    "check input too wide": (
        change("check.input.input", lambda w: torch.cat((w, w), -1)),
        "the check vector fails: check.input.input is",
    ),
    "check input without end": (
        change("check.input.input", lambda w: torch.empty(2**40, 0, 3)),
        "the check vector fails: check.input.input is",
    ),
    "check state of another type": (
        change("check.before.c0", lambda w: w.long()),
        "the check vector fails: check.before.c0 is",
    ),
    "weights larger than the file": (edit("hidden_size = 4", "hidden_size = 40000"), "bytes of weights"),
    "weights beyond any machine": (edit("hidden_size = 4", "hidden_size = 4294967296"), "config does not fit"),
    "number beyond 64 bits": (edit("hidden_size = 4", f"hidden_size = {2**64}"), "more than 64 bits"),
    "layers without end": (edit("layers = 1", "layers = 1000000000"), "at most 256"),
    "a date": (edit("layers = 1", "layers = 1979-05-27"), "config may have"),
    "nested without end": (edit("layers = 1", "layers = " + "[" * 5000), "not toml"),
    "no check vector": (change("check.before.c0", lambda w: None), "lacks check.before.c0"),
}


@pytest.mark.promise(8)
@pytest.mark.parametrize("name", SPOILS)
def test_a_spoilt_bundle_is_refused_with_the_reason(name: str, bundle_path: Path) -> None:
    """The fingerprint would find most of it: whoever spoils a bundle may put it right."""
    spoil, message = SPOILS[name]
    spoil(bundle_path)
    if message != "fingerprint":
        mend(bundle_path)
    with pytest.raises(BundleError) as caught:
        load_cell(bundle_path)
    assert message in str(caught.value)
    assert str(bundle_path) in str(caught.value)


def test_a_small_difference_of_another_machine_passes(bundle_path: Path) -> None:
    change("check.output.output", lambda w: w + 1e-7)(bundle_path)
    load_cell(bundle_path)


def test_a_check_vector_that_the_graph_does_not_give_is_refused(bundle_path: Path) -> None:
    change("check.output.output", lambda w: w + 1e-3)(bundle_path)
    with pytest.raises(BundleError, match="the check vector fails"):
        examine(load_bundle(bundle_path), 32)


def test_a_version_is_never_overwritten(bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="exists"):
        write_bundle(bundle_path.parent.parent, "small", "1", LSTM(3, 4))


@pytest.mark.parametrize(
    ("name", "version"), [("", "1"), ("../up", "1"), ("a b", "1"), ("m", ".hidden"), ("m" * 65, "1")]
)
def test_names_are_checked(name: str, version: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="letters, digits"):
        write_bundle(tmp_path, name, version, LSTM(3, 4))


def test_nothing_is_left_of_a_bundle_that_cannot_be_written(tmp_path: Path) -> None:
    cell = LSTM(3, 4)
    with torch.no_grad():
        cell.layers[0].bias.fill_(float("inf"))
    with pytest.raises(BundleError, match="infinity"):
        write_bundle(tmp_path, "m", "1", cell)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="directory"):
        write_bundle(tmp_path / "file", "m", "1", LSTM(3, 4))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for version in ("10", "2", "1.10", "1.9", "2-beta"):
        write_bundle(tmp_path, "m", version, LSTM(1, 1))
    refs, errors = Repository([tmp_path]).scan()
    assert errors == []
    assert [ref.version for ref in refs] == ["1.9", "1.10", "2", "2-beta", "10"]
    assert version_key("2") < version_key("10")


def test_a_scan_tells_what_is_wrong_and_keeps_the_rest(tmp_path: Path, bundle_path: Path) -> None:
    bad = tmp_path / "a name with spaces" / "1"
    bad.mkdir(parents=True)
    (bad / "model.toml").write_text("")
    (tmp_path / "notes.txt").write_text("not a bundle")
    refs, errors = Repository([tmp_path, tmp_path / "absent"]).scan()
    assert [ref.path for ref in refs] == [bundle_path]
    assert len(errors) == 2
    assert "absent: no such directory" in errors[1]


def test_the_earlier_directory_wins(tmp_path: Path, bundle_path: Path) -> None:
    other = write_bundle(tmp_path / "other", "small", "1", LSTM(1, 1))
    refs, _ = Repository([tmp_path / "other", bundle_path.parent.parent]).scan()
    assert [ref.path for ref in refs if ref.name == "small"] == [other]


def test_a_bundle_is_read_without_its_weights(bundle_path: Path) -> None:
    """And whatever is wrong with the file that has them, it is a BundleError."""
    whole, part = load_bundle(bundle_path), load_bundle(bundle_path, whole=False)
    for item in fields(Bundle):
        if item.name not in ("check", "initials"):
            assert getattr(whole, item.name) == getattr(part, item.name)
    for one, other in zip(
        (*whole.check.inputs, *whole.check.before), (*part.check.inputs, *part.check.before), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert part.read_weights().keys() == whole.read_weights().keys()
    file = bundle_path / WEIGHTS
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.startswith("check."))

    def with_offsets(*offsets: object) -> bytes:
        named = json.dumps(header | {name: header[name] | {"data_offsets": offsets}}).encode()
        return len(named).to_bytes(8, "little") + named + data[8 + length :]

    wrong = [
        b"", data[:7], data[:100], b"\xff" * 8 + data[8:], (2).to_bytes(8, "little") + b"[]", data[:8] + b"[" * length,
        with_offsets(-8, 8), with_offsets(8, 0), with_offsets(0, 1 << 70), with_offsets(1 << 70, 1 << 71), with_offsets("0", "8"),
        with_offsets(0), with_offsets(0, 4),
    ]  # fmt: skip
    for content in wrong:
        file.write_bytes(content)
        with pytest.raises(BundleError):
            load_bundle(bundle_path, whole=False)
