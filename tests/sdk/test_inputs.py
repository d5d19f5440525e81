"""What people give as inputs: buffers that are used again, missing values, and numbers that do not fit. Sent as they were when
the call was made, or refused by name; nothing is lost on the way without a word."""

from __future__ import annotations

import asyncio
import collections.abc
import decimal
from typing import Any

import numpy as np
import pytest
import torch

import engram
from engram._arrays import RowCodec
from engram._patterns import bits_of
from engram._types import TensorSpec
from engram_models import RBM, Hopfield, write_bundle

ROWS = np.random.default_rng(0).uniform(0, 16, (50, 8)).astype(np.float32)
SIZE = 16


def codec(dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> RowCodec:
    return RowCodec(TensorSpec("x", dtype, shape), "the input")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_type: Any) -> collections.abc.Iterator[Any]:
    """Models whose answers say what was sent: digits, patterns, and a machine that fills in what is unknown."""
    from engram_models import shipped_models_dir

    path = tmp_path_factory.mktemp("inputs")
    write_bundle(path / "models", "bits", "1", Hopfield(SIZE))
    write_bundle(path / "models", "visible", "1", RBM(SIZE, 4))
    (path / "models" / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    with server_type(path, "--models", str(path / "models")) as one:
        yield one


# Buffers that are used again


def one_buffer(rows: np.ndarray) -> collections.abc.Iterator[np.ndarray]:
    """As drivers of audio devices and cameras give it."""
    buffer = np.zeros_like(rows[0])
    for row in rows:
        buffer[:] = row
        yield buffer


async def one_buffer_async(rows: np.ndarray) -> collections.abc.AsyncIterator[np.ndarray]:
    for buffer in one_buffer(rows):
        yield buffer
        await asyncio.sleep(0)


@pytest.mark.parametrize("source", [one_buffer, one_buffer_async])
def test_stream_copies_what_it_takes(server: Any, source: Any) -> None:
    with engram.Client(server.address) as client:
        right = client.open("digits-reader").run(ROWS)
        got = np.stack(list(client.open("digits-reader").stream(source(ROWS))))
    assert np.array_equal(got, right)


@pytest.mark.parametrize("ahead", [1, 4])
def test_stream_takes_one_item_more_than_it_sends(server: Any, ahead: int) -> None:
    taken: list[int] = []

    def source() -> collections.abc.Iterator[np.ndarray]:
        for number in range(1000):
            taken.append(number)
            yield ROWS[number % 50]

    with engram.Client(server.address) as client:
        session = client.open("digits-reader")
        outputs = session.stream(source(), ahead=ahead)
        for given in range(1, 4):
            next(outputs)
            # So many were given out, `ahead` may be on their way, and one more taken.
            assert len(taken) <= given + ahead + 1
        outputs.close()  # type: ignore[attr-defined]
        assert len(taken) <= 3 + ahead + 1
        with pytest.raises(engram.InvalidInputError, match="ahead"):
            next(session.stream(source(), ahead=0))


def test_arrays_are_copied_when_the_call_is_made(server: Any) -> None:
    """The loop has not turned since: the caller may fill its buffer again at once."""

    async def main() -> None:
        async with engram.AsyncClient(server.address) as client:
            reference = await client.open("digits-reader")
            right = [await reference.step(ROWS[0]), *(await reference.run(ROWS[1:4]))]
            await reference.prefill(ROWS[4:6])
            right.append((await client.step_many([reference], ROWS[6:7]))[0])
            session = await client.open("digits-reader")
            buffer = np.empty((3, 8), np.float32)
            calls: list[Any] = []

            def call(method: Any, rows: np.ndarray, *more: Any) -> None:
                buffer[: len(rows)] = rows
                calls.append(asyncio.ensure_future(method(*more, buffer[: len(rows)])))
                buffer.fill(9999)

            buffer[0] = ROWS[0]
            calls.append(asyncio.ensure_future(session.step(buffer[0])))
            call(session.run, ROWS[1:4])
            call(session.prefill, ROWS[4:6])
            call(client.step_many, ROWS[6:7], [session])
            first, ran, _, many = await asyncio.gather(*calls)
            assert np.array_equal(np.stack([first, *ran, many[0]]), np.stack(right))

    asyncio.run(main())


def test_patterns_and_cues_are_copied_when_the_call_is_made(server: Any) -> None:
    rows = np.random.default_rng(1).choice([-1, 1], (2, SIZE))

    async def main() -> None:
        async with engram.AsyncClient(server.address) as client:
            session = await client.open("bits")
            buffer, labels = rows.copy(), ["a", "b"]
            storing = asyncio.ensure_future(session.store(buffer, labels))
            buffer.fill(0)
            labels.clear()
            assert (await storing).labels == ["a", "b"]
            cue = rows[1].copy()
            recalling = asyncio.ensure_future(client.sessions.recall(session.id, cue))
            cue.fill(0)
            assert (await recalling).label == "b"
            visible = np.full(SIZE, 0.5, np.float32)
            right = (await client.models.recreate("visible", visible)).values
            recreating = asyncio.ensure_future(client.models.recreate("visible", visible))
            visible.fill(0)
            assert np.array_equal((await recreating).values, right)

    asyncio.run(main())


def test_a_bad_input_is_raised_where_the_call_is_awaited(server: Any) -> None:
    async def main() -> None:
        async with engram.AsyncClient(server.address) as client:
            session = await client.open("digits-reader")
            calls = [session.step(ROWS[0]), session.step(ROWS[0][:3]), session.run(ROWS[:, :2]), session.step(ROWS[1])]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [isinstance(one, engram.InvalidInputError) for one in found] == [False, True, True, False]
            assert session.seq == 2

    asyncio.run(main())


# Missing values


MASKED = np.ma.masked_array(np.where(np.arange(8) == 3, 9999, ROWS[0]), mask=np.arange(8) == 3)


def test_masked_inputs_are_refused_by_name(server: Any) -> None:
    with engram.Client(server.address) as client:
        session = client.open("digits-reader")
        for call in (
            lambda: session.step(MASKED),
            lambda: session.step(list(MASKED)),
            lambda: session.run(np.ma.stack([MASKED, MASKED])),
            lambda: session.run([MASKED, MASKED]),
            lambda: session.prefill(np.ma.stack([MASKED])),
            lambda: client.step_many([session], [MASKED]),
            lambda: list(session.stream(np.ma.stack([MASKED]))),
        ):
            with pytest.raises(engram.InvalidInputError, match=r"\.filled\("):
                call()
        assert session.seq == 0
        whole = np.ma.masked_array(ROWS[0], mask=False)
        assert np.array_equal(session.step(whole), client.open("digits-reader").step(ROWS[0]))


def test_a_mask_is_one_of_unknown_values_where_there_is_such_a_thing(server: Any) -> None:
    rows = np.random.default_rng(2).choice([-1, 1], (3, SIZE))
    unknown = np.arange(SIZE) < 5
    wrong = np.where(unknown, -rows[1], rows[1])
    with engram.Client(server.address) as client:
        session = client.open("bits")
        with pytest.raises(engram.InvalidInputError, match=r"\.filled\("):
            session.store(np.ma.masked_array(rows, mask=rows > 0))
        session.store(rows)
        masked = session.recall(np.ma.masked_array(wrong, mask=unknown))
        given = session.recall(wrong, unknown)
        assert (masked.label, masked.overlap) == (given.label, given.overlap) == ("p1", 1.0)
        with pytest.raises(engram.InvalidInputError) as caught:
            session.recall(np.ma.masked_array(wrong, mask=unknown), ~unknown)
        assert caught.value.reason == "CUE_ALL_MASKED"
        x = np.linspace(0, 1, SIZE, dtype=np.float32)
        right = client.models.recreate("visible", np.where(unknown, 0, x).astype(np.float32), unknown)
        hidden = np.ma.masked_array(np.where(unknown, np.nan, x), mask=unknown)
        assert np.array_equal(client.models.recreate("visible", hidden).values, right.values)


# What is no number, or does not fit


class Table:
    """A table of another library, whose missing values have no number."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array([1.0, None, 3.0], object)


def sparse() -> Any:
    from scipy import sparse

    return sparse.csr_matrix(np.eye(3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: np.array([1 + 2j, 0, 0]), "complex128"),
        (lambda: [1j, 0, 0], "complex128"),
        (lambda: ["1", "2", "3"], "<U1"),
        (lambda: np.array([b"1", b"2", b"3"]), "S1"),
        (lambda: np.array(["2026-01-01"] * 3, "datetime64[D]"), "datetime64"),
        (lambda: np.array([1, 2, 3], "timedelta64[s]"), "timedelta64"),
        (lambda: np.array([1.0, None, 3.0], object), "objects"),
        (lambda: [1.0, None, 3.0], "objects"),
        (lambda: [decimal.Decimal(1)] * 3, "objects"),
        (Table, "Table"),
        (sparse, r"toarray\(\)"),
        (lambda: {1.0, 2.0, 3.0}, "set"),
        (lambda: (x for x in (1.0, 2.0, 3.0)), "generator"),
        (lambda: torch.ones(3, requires_grad=True), "detach"),
        (lambda: torch.ones(3, dtype=torch.bfloat16), "Tensor"),
        (lambda: [[1.0], [1.0, 2.0], [1.0]], "ragged"),
        (lambda: np.array([0, 1e300, 0]), r"1e\+300 at \[1\] does not fit float32"),
        (lambda: [0.0, 0.0, -1e39], "does not fit float32"),
        (lambda: [2**24 + 1, 0, 0], "16777217 at .0. does not fit float32"),
        (lambda: [0, -(2**63), 2**62 + 1], "does not fit float32"),
        (lambda: [10**30, 0, 0], "objects"),
        (lambda: np.array([2**24 + 1, 0, 0]), "int64"),
    ],
)
def test_what_is_no_input_is_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(engram.InvalidInputError, match=said):
        codec().one(given())
    many = given()
    with pytest.raises(engram.InvalidInputError):
        codec().many(many[None] if hasattr(many, "dtype") and not hasattr(many, "toarray") else [many])


@pytest.mark.parametrize(
    ("dtype", "given", "sent"),
    [
        ("float32", [True, False, True], [1, 0, 1]),
        ("float32", [2**24, -(2**24), 2**60], [2.0**24, -(2.0**24), 2.0**60]),
        ("float32", [1e-300, np.inf, -np.inf], [0, np.inf, -np.inf]),
        ("float32", np.array([1, 2, 3], ">f4"), [1, 2, 3]),
        ("float32", np.array([[1, 2, 3]] * 2, np.float32)[:, ::-1][0], [3, 2, 1]),
        ("float32", torch.arange(3.0), [0, 1, 2]),
        ("int64", [2**62 + 1, -(2**63), True], [2**62 + 1, -(2**63), 1]),
    ],
)
def test_what_fits_is_sent_as_it_is(dtype: str, given: Any, sent: list[float]) -> None:
    rows = codec(dtype)
    assert rows.decode(rows.one(given), 1)[0].tolist() == sent
    whole = given if isinstance(given, list) else np.asarray(given)
    assert rows.decode(rows.many([whole] if isinstance(whole, list) else whole[None]).tobytes(), 1)[0].tolist() == sent


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)])
def test_narrow_floats_overflow_with_a_word(dtype: str, largest: float) -> None:
    assert codec(dtype).decode(codec(dtype).one([largest, 0.0, np.inf]), 1)[0].tolist() == [largest, 0, np.inf]
    with pytest.raises(engram.InvalidInputError, match=f"does not fit {dtype}"):
        codec(dtype).one([largest * 1.003, 0.0, 0.0])
    with pytest.raises(engram.InvalidInputError, match="does not"):
        codec(dtype).one([0.0, 0.0, 1e300])


@pytest.mark.parametrize(
    "bad", [["1", "-1"], [1j, 1], np.array([1, -1], object), np.array(["1", "-1"], "S2"), [1, None], [[1], [1, 1]]]
)
def test_what_is_no_pattern_is_refused(bad: Any) -> None:
    for what in ("pattern", "cue"):
        with pytest.raises(engram.InvalidInputError) as caught:
            bits_of(bad, None, what)
        assert caught.value.reason == "INVALID_PATTERN"


@pytest.mark.parametrize("bad", [["0.5"] * SIZE, [0.5j] * SIZE, [2**24 + 1] * SIZE, [1e300] * SIZE, [None] * SIZE])
def test_what_is_no_number_is_not_recreated_or_looked_up(server: Any, bad: Any) -> None:
    with engram.Client(server.address) as client:
        with pytest.raises(engram.InvalidInputError):
            client.models.recreate("visible", bad)
        with pytest.raises(engram.InvalidInputError):
            client.sessions.address("nobody", bad)
