"""Patterns in every way to write them: the SDK's arrays, and the text of `engram store`, `engram recall` and `engram forget`."""

from __future__ import annotations

import io
import json
import pathlib
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import engram
from engram._commands.patterns import cue_of, read_lines, read_npz
from engram._patterns import bits_of, check_labels
from engram_models import Hopfield, PatternMemory, write_bundle

ROWS = np.random.default_rng(0).choice([-1, 1], (5, 13))


def test_bits_are_those_of_the_models() -> None:
    expected = PatternMemory.pack(ROWS, 13)
    for written in (ROWS, ROWS.astype(np.float64), (ROWS + 1) // 2, ROWS > 0, ROWS.tolist()):
        packed = bits_of(written)
        assert np.array_equal(packed.bits, expected) and packed.size == 13 and not packed.single
        given = np.asarray(written)
        assert np.array_equal(packed.written(packed.bits), given)
        assert packed.written(packed.bits).dtype == (np.bool_ if given.dtype == np.bool_ else np.int8)
    assert bits_of(ROWS[0]).single
    mask = np.arange(13) < 4
    masked = bits_of(np.where(mask, np.nan, ROWS), mask, "cue")
    assert masked.unknown is not None
    assert np.array_equal(np.unpackbits(masked.unknown, axis=1, count=13).astype(bool), np.tile(mask, (5, 1)))
    assert np.array_equal(masked.bits, np.packbits((ROWS > 0) & ~mask, axis=1))


@pytest.mark.parametrize(
    ("values", "mask", "reason"),
    [
        ([1, -1, np.nan], None, "INVALID_PATTERN"),
        ([1, -1, 0], None, "INVALID_PATTERN"),
        ([[1, -1], [1]], None, "INVALID_PATTERN"),
        ([0.5, 1], None, "INVALID_PATTERN"),
        (["a", "b"], None, "INVALID_PATTERN"),
        ([], None, "INVALID_PATTERN"),
        (np.zeros((2, 2, 2)), None, "INVALID_PATTERN"),
        ([1, 1], [1, 0], "INVALID_PATTERN"),
        ([1, 1], [True], "INVALID_PATTERN"),
        ([[1, 1], [1, 1]], [[True, False], [True, True]], "CUE_ALL_MASKED"),
    ],
)
def test_what_is_no_pattern_is_refused_before_it_is_sent(values: Any, mask: Any, reason: str) -> None:
    with pytest.raises(engram.InvalidInputError) as caught:
        bits_of(values, mask)
    assert caught.value.reason == reason


def test_labels_are_checked_before_they_are_sent() -> None:
    assert check_labels(None, 3) == [] and check_labels("one", 1) == ["one"]
    for labels in (["a"], ["a", ""], ["a", 1]):
        with pytest.raises(engram.InvalidInputError):
            check_labels(labels, 2)  # type: ignore[arg-type]
    with pytest.raises(engram.AlreadyExistsError, match="'b'"):
        check_labels(["a", "b", "b"], 3)


def blocks(*lines: str) -> list[bytes]:
    return ["\n".join(lines).encode()]


def test_lines_of_text() -> None:
    for text in ("0110", "0 1 1 0", "0,1,1,0", "-1,+1,1,-1"):
        labels, patterns = read_lines(blocks(text, "", text + "\r\n"))
        assert labels is None and (patterns == 1).tolist() == [[False, True, True, False]] * 2
    labels, patterns = read_lines(blocks("a\t01", "b,1,0", "c d , 1 1"))
    assert labels == ["a", "b", "c d"] and patterns.tolist() == [[0, 1], [1, 0], [1, 1]]
    cue, unknown = cue_of("0?1_")
    assert unknown.tolist() == [False, True, False, True] and cue[[0, 2]].tolist() == [0, 1]
    for bad in (["01", "011"], ["a\t01", "01"], [""], ["012"], ["0,-1"], ["01?"], ["a\t"]):
        with pytest.raises(ValueError, match=r"."):
            read_lines(blocks(*bad))


def test_an_npz_executes_nothing() -> None:
    def file(**arrays: Any) -> io.BytesIO:
        data = io.BytesIO()
        np.savez(data, **arrays)
        data.seek(0)
        return data

    labels, patterns = read_npz(file(patterns=ROWS, labels=np.array(list("abcde"))))
    assert labels == list("abcde") and np.array_equal(patterns, ROWS)
    assert read_npz(file(patterns=ROWS))[0] is None
    for bad in (file(other=ROWS), io.BytesIO(b"none"), file(patterns=np.array([{}], object))):
        with pytest.raises(ValueError, match=r"."):
            read_npz(bad)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_server: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("memories")
    write_bundle(path / "models", "bits", "1", Hopfield(13))
    flags = ("--models", str(path / "models"), "--shipped-models", "false", "--batch-rows-max", "32")
    with type(shared_server)(path, *flags) as one:
        yield one


def command(server: Any, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "engram", words[0], *words[1:], "--address", server.address]
    return subprocess.run(line, input=text, capture_output=True, text=True, check=False, timeout=60)


def line_of(row: np.ndarray) -> str:
    return "".join("1" if bit > 0 else "0" for bit in row)


def test_store_recall_and_forget_by_command(server: Any, tmp_path: pathlib.Path) -> None:
    lines = "".join(f"{label}\t{line_of(row)}\n" for label, row in zip("abcd", ROWS[:4], strict=True))
    missing = command(server, "store", "s", text=lines)
    assert missing.returncode == 1 and "SESSION_NOT_FOUND" in missing.stderr
    stored = command(server, "store", "s", "--model", "bits", text=lines)
    assert (stored.returncode, stored.stderr) == (0, "") and "stored 4" in stored.stdout
    np.savez(tmp_path / "more.npz", patterns=ROWS[4:], labels=np.array(["e"]))
    more = command(server, "store", "s", str(tmp_path / "more.npz"), "--model", "bits", "--json")
    assert json.loads(more.stdout)["labels"] == ["e"] and json.loads(more.stdout)["count"] == 5
    cue = line_of(ROWS[2])
    found = command(server, "recall", "s", text=f"{cue}\n{cue[:8]}?____\n")
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 2
    assert all(line.split("\t")[0] == "c" and line.endswith(cue) for line in found.stdout.splitlines()), found.stdout
    as_json = json.loads(command(server, "recall", "s", "--cue", line_of(ROWS[4]), "--json").stdout)
    assert as_json["label"] == "e" and as_json["converged"] and not as_json["spurious"]
    assert as_json["pattern"] == line_of(ROWS[4]) and len(as_json["energies"]) == as_json["sweeps"] + 1
    assert command(server, "forget", "s", "a", "e").stdout == "forgot 2\n"
    assert command(server, "recall", "s", "--cue", "01").returncode == 1
    assert command(server, "forget", "s", "a").returncode == 1
    assert command(server, "forget", "s").returncode == 2
    assert "forgot 3" in command(server, "forget", "s", "--all").stdout


def test_a_store_in_parts_is_taken_back_if_one_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from engram import _memories

    monkeypatch.setattr(_memories, "_PART_BYTES", 16)
    rows = np.random.default_rng(1).choice([-1, 1], (40, 13))
    with engram.Client(server.address) as client:
        session = client.open("bits", f"parts-{secrets.token_hex(4)}")
        assert session.store(rows).labels == [f"p{number}" for number in range(40)]
        with pytest.raises(engram.AlreadyExistsError):
            session.store(-rows, [*(f"new {number}" for number in range(39)), "p7"])
        assert session.patterns().labels == [f"p{number}" for number in range(40)]
        monkeypatch.setattr(_memories, "_PAGE", 7)
        found = session.patterns(values=True)
        assert found.patterns is not None and np.array_equal(found.patterns, rows) and found.size == 13
        assert [hit.label for hit in session.recall(rows)] == found.labels or len(np.unique(rows, axis=0)) < 40
