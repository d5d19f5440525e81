"""Text as other programs write it, into and out of the commands: read, or refused with line and column; never a traceback."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import engram
from engram._commands.patterns import read_lines
from engram._commands.rows import Rows
from engram._commands.text import TextError, numbered, row_of
from engram._types import TensorSpec
from engram_models import bundle_from_torch, shipped_models_dir, write_bundle

MODEL = "digits-reader"
ROW = "0,0,5,13,9,1,0,0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_type: Any) -> Iterator[Any]:
    """digits-reader, letters-hopfield, and a model whose state is past the largest float after some 130 steps."""
    path = tmp_path_factory.mktemp("text")
    growing = torch.nn.RNN(1, 2, nonlinearity="relu")
    with torch.no_grad():
        for weights in growing.parameters():
            weights.zero_()
        growing.weight_hh_l0.copy_(2 * torch.eye(2))
        growing.weight_ih_l0[0, 0] = 1
    write_bundle(path / "models", "grow", "1", bundle_from_torch(growing))
    for name in (MODEL, "letters-hopfield"):
        (path / "models" / name).symlink_to(shipped_models_dir() / name)
    with server_type(path, "--models", str(path / "models")) as one:
        yield one


def command(server: Any, *words: str, data: bytes = b"", **environment: str) -> tuple[int, bytes, str]:
    """Exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "engram", *words], input=data, capture_output=True, check=False, timeout=60,
        env={**os.environ, "ENGRAM_ADDRESS": server.address, **environment},
    )  # fmt: skip
    said = done.stderr.decode()
    assert "Traceback" not in said, said
    return done.returncode, done.stdout, said


# Lines


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\nb\n", [(1, "a"), (2, "b")]),
        (b"a\r\n\r\nb", [(1, "a"), (3, "b")]),
        ("\ufeffa\n\ufeffb".encode(), [(1, "a"), (2, "\ufeffb")]),
        (b"\n \t \na b\t\n", [(3, "a b\t")]),
        ("caf\u00e9\n".encode(), [(1, "caf\u00e9")]),
        (b"", []),
    ],
)
def test_lines_are_numbered_as_a_person_counts_them(data: bytes, lines: list[tuple[int, str]]) -> None:
    assert list(numbered([data])) == lines
    assert list(numbered(data[at : at + 1] for at in range(len(data)))) == lines


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"ok\ncaf\xe9,1\n", "line 2, column 4: byte 0xE9"),
        ("ok".encode("utf-16"), "line 1: this is UTF-16"),
        (b"a\rb\rc", "line 1, column 2: a carriage return"),
        (b"a\n\nb\0\n", "line 3, column 2: a NUL"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(data: bytes, where: str) -> None:
    with pytest.raises(TextError, match=where):
        list(numbered([data]))


# Numbers


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", [1, 2]),
        ("1\t2", [1, 2]),
        (" 1 , -2.5 ", [1, -2.5]),
        ("+1,.5,5.,1e3,1E-3", [1, 0.5, 5.0, 1000.0, 0.001]),
        ("9007199254740993,-9223372036854775807", [9007199254740993, -9223372036854775807]),
    ],
)
def test_rows_of_numbers(text: str, values: list[float]) -> None:
    assert row_of(text) == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,1_3", "column 2: '1_3' is not one number"),
        ('1,"1,234"', "column 2: .* is quoted"),
        ("1\t1,5", "column 2: '1,5' has a comma within a number"),
        ("1,5;2,5", "column 2: '5;2' has a semicolon"),
        ("1;2", "column 1: '1;2' has a semicolon"),
        ("1,1 234", "column 2: '1 234' is not one number"),
        ("1,1\u00a0234", "column 2: .* is not one number"),
        ("1,1'234", "column 2: .* is not one number"),
        ("1,2,", "column 3: there is no number"),
        ("1,,2", "column 2: there is no number"),
        ("\t1", "column 1: there is no number"),
        ("nan,1", "column 1: 'nan' is no number that a model takes"),
        ("1,-inf", "column 2: '-inf' is no number"),
        ("1,NA", "column 2: 'NA' is no number"),
        ("x0,x1", "column 1: 'x0' is not a number; leave out a line of names"),
        ("1,\u0661", "column 2: .* is not a number"),
        ("1,\uff11", "column 2: .* is not a number"),
        ("1,\u22125", "column 2: .* is not a number"),
        ("0x10", "column 1: '0x10' is not a number"),
        ("1e", "column 1: '1e' is not a number"),
        ("\ufeff1", "column 1: .* is not a number"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(text: str, said: str) -> None:
    with pytest.raises(TextError, match=said):
        row_of(text)


def parse(text: str, dtype: str) -> np.ndarray:
    """Read for a model of two numbers."""
    read = Rows([TensorSpec("numbers", dtype, (2,))]).read(text)
    assert read is not None
    return read[0]


@pytest.mark.parametrize(
    ("text", "dtype", "said"),
    [
        ("[1, NaN]", "float32", "NaN is no number"),
        ("[1, -Infinity]", "float32", "-Infinity is no number"),
        ('["1", 2]', "float32", 'column 1: "1" is not a JSON number'),
        ("[1, null]", "float32", "column 2: null is not a JSON number"),
        ('{"x": [1, 2], "x": [3, 4]}', "float32", "key twice"),
        ("[[1], [2, 3]]", "float32", "unequal length"),
        ("[1, 2", "float32", "column 6: not JSON"),
        ("[" * 100_000, "float32", "not JSON"),
        ("[1, 1e999]", "float32", "column 2: the model takes float32"),
        ("1,1e39", "float32", "column 2: the model takes float32"),
        ("1,65520", "float16", "column 2: the model takes float16"),
        ("1,0.5", "int64", "column 2: the model takes int64"),
        ("1,9223372036854775808", "int64", "column 2: the model takes int64"),
        ("1,2", "bool", "column 2: the model takes bool"),
        ("1,2,3", "float32", "3 values, but the model takes 2"),
    ],
)
def test_values_that_the_model_does_not_take(text: str, dtype: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text, dtype)


def test_whole_numbers_are_whole() -> None:
    for text in ("9007199254740993,-9223372036854775808", "[9007199254740993, -9223372036854775808]"):
        assert parse(text, "int64").tolist() == [9007199254740993, -9223372036854775808]
    assert parse("[true, 0]", "bool").tolist() == [True, False]


def test_labels_of_patterns_may_be_of_any_script() -> None:
    labels, _ = read_lines(["\ufeffcaf\u00e9\t01\r\n".encode(), "\u0661,10".encode()])
    assert labels == ["caf\u00e9", "\u0661"]
    with pytest.raises(ValueError, match="line 2, column 4: byte 0xE9"):
        read_lines([b"a\t01\n", b"caf\xe9\t01\n"])


# The commands


def test_stream_reads_what_spreadsheets_write(server: Any) -> None:
    status, plain, _ = command(server, "stream", MODEL, data=f"{ROW}\n{ROW}\n".encode())
    assert status == 0 and len(plain.splitlines()) == 2
    for data in ("\ufeff" + f"{ROW}\r\n\r\n{ROW}\r\n", f"{ROW}\n{ROW}"):
        assert command(server, "stream", MODEL, data=data.encode()) == (0, plain, "")
    tabs = command(server, "stream", MODEL, data=f"{ROW}\n{ROW}".replace(",", "\t").encode())
    assert tabs == (0, plain.replace(b",", b"\t"), "")
    status, out, said = command(server, "stream", MODEL, data=f"{ROW}\n{ROW.replace('13', '1_3')}\n{ROW}".encode())
    assert (status, len(out.splitlines())) == (1, 1) and "line 2, column 4: '1_3'" in said
    status, out, said = command(server, "stream", MODEL, data=f"{ROW}\n".encode() + b"\xe9\n")
    assert (status, len(out.splitlines())) == (1, 1) and "line 2, column 1: byte 0xE9" in said


def test_terminals_of_ascii_alone(server: Any) -> None:
    name = f"kamera-\u00fc-{secrets.token_hex(4)}"
    escaped = name.replace("\u00fc", "\\xfc").encode()
    assert command(server, "stream", MODEL, "--session", name, data=f"{ROW}\n".encode())[0] == 0
    status, out, _ = command(server, "sessions", "show", name, PYTHONIOENCODING="ascii")
    assert status == 0 and escaped in out
    status, out, _ = command(server, "sessions", "list", PYTHONIOENCODING="ascii")
    assert status == 0 and escaped in out
    status, _, said = command(server, "sessions", "show", "no-\u00fc", PYTHONIOENCODING="ascii")
    assert status == 1 and "no-\\xfc" in said
    label = "caf\u00e9"
    bits = "01" * 128
    stored = command(
        server, "store", name, "--model", "letters-hopfield/1", data=f"{label}\t{bits}\n".encode(), PYTHONIOENCODING="ascii"
    )  # fmt: skip
    assert stored[0] == 1  # the session is of another model; what was read is not the trouble
    memory = f"memory-{secrets.token_hex(4)}"
    for encoding in ("ascii", "latin-1", "utf-8"):
        line = f"{label}-{encoding}\t{bits}\n".replace("01", "01" if encoding == "ascii" else "10", 3)
        done = command(
            server, "store", memory, "--model", "letters-hopfield", data=line.encode(), PYTHONIOENCODING=encoding
        )
        assert done[0] == 0, done
    status, out, _ = command(server, "recall", memory, data=f"\ufeff{bits}\r\n".encode(), PYTHONIOENCODING="ascii")
    assert status == 0 and out.startswith(b"caf\\xe9-ascii\t")
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"engram", b"sessions", b"show", b"caf\xe9"], capture_output=True, check=False
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"'caf\\udce9'" in done.stderr


def strict(text: bytes) -> Any:
    def no_constant(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=no_constant)


def test_json_has_null_for_what_is_not_finite(server: Any) -> None:
    name = f"grown-{secrets.token_hex(4)}"
    with engram.Client(server.address) as client:
        session = client.open("grow", name)
        assert not np.isfinite(session.run(np.ones((140, 1), np.float32))[-1]).all()
        session.detach()
    status, out, said = command(server, "stream", "grow", "--session", name, "--json", data=b"[1]\n")
    assert (status, said, None in strict(out)["output"]) == (0, "", True)
    status, out, _ = command(server, "stream", "grow", "--session", name, data=b"[1]\n")
    assert status == 0 and None in strict(out)
    status, out, _ = command(server, "stream", "grow", "--session", name, data=b"1\n")
    assert status == 0 and not np.isfinite([float(part) for part in out.split(b",")]).all()
    status, out, _ = command(server, "sessions", "state", name, "--json")
    assert status == 0 and None in next(iter(strict(out).values()))
