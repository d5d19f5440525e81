"""Rows: several tensors' bytes one after the other, and the numbers of a StepRequest as them; against torch's casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engram_models.spec import TensorSpec
from engram_service.rows import Rows

OBS, GAP, COUNT, SEEN = (
    TensorSpec("obs", "float32", (3,)), TensorSpec("gap", "float16", ()), TensorSpec("count", "int64", (1,)),
    TensorSpec("seen", "bool", (2,)),
)  # fmt: skip
MIXED = Rows([SEEN, OBS, GAP, COUNT])  # whatever stands where no multiple of its size is


def _packed(seen: list[int], obs: list[float], gap: float, count: int) -> bytes:
    return (
        bytes(seen) + np.array(obs, "<f4").tobytes() + np.array(gap, "<f2").tobytes() + np.array(count, "<i8").tobytes()
    )


def _rows(*rows: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)


def test_rows_say_what_they_are_made_of() -> None:
    assert str(Rows([TensorSpec("x", "float32", (8,))])) == "float32[8]"
    assert str(MIXED) == "seen bool[2], obs float32[3], gap float16[], count int64[1]"
    assert str(Rows([TensorSpec(f"t{n}", "int8", ()) for n in range(100)])).endswith("t7 int8[], and 92 more")
    assert (MIXED.nbytes, MIXED.size, MIXED.shape(5)) == (24, 7, (5, 7))
    assert Rows([TensorSpec("x", "uint8", (2, 4))]).shape(5) == (5, 2, 4)


def test_numbers_become_the_bytes_of_each_tensor_and_come_back() -> None:
    values = np.array([[1, 0, 0.1, -2, 3e5, 0.5, -7], [0, 0, 1, 2, 3, 4, 2**40]], np.float32)
    packed = MIXED.of_floats(values)
    assert packed.tobytes() == _packed([1, 0], [0.1, -2, 3e5], 0.5, -7) + _packed([0, 0], [1, 2, 3], 4, 2**40)
    assert MIXED.as_floats(packed).tolist() == values.tolist()
    assert MIXED.of_floats(values[:0]).shape == (0, 24) and MIXED.as_floats(packed[:0]).shape == (0, 7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_are_cast_as_torch_casts_them(dtype: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    values[:6] = [np.nan, np.inf, -np.inf, -0.0, 65519.99, 3.4e38]
    rows = Rows([TensorSpec("x", dtype, (2,))])
    packed = rows.of_floats(values.reshape(-1, 2))
    with np.errstate(invalid="ignore"):
        wanted = torch.from_numpy(values).to(getattr(torch, dtype))
    back = wanted.float().numpy().reshape(-1, 2)
    ours = rows.as_floats(packed)
    assert np.array_equal(np.isnan(ours), np.isnan(back))
    good = ~np.isnan(back)
    assert ours[good].view(np.uint32).tolist() == back[good].view(np.uint32).tolist()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int64", 1.5), ("int64", 2.0**63), ("int8", 128), ("int8", -129), ("uint8", -1), ("bool", 2), ("int32", np.nan)],
)
def test_a_number_that_is_none_of_the_dtype_is_named(dtype: str, value: float) -> None:
    rows = Rows([OBS, TensorSpec("n", dtype, ())])
    with pytest.raises(ValueError, match=f"n is {dtype}\\[\\], and .* is none of {dtype}"):
        rows.of_floats(np.array([[0, 0, 0, 0], [0, 0, 0, value]], np.float32))
    edge = {"int64": -(2.0**63), "int8": 127, "uint8": 255, "bool": 1, "int32": 2.0**30}[dtype]
    assert rows.as_floats(rows.of_floats(np.array([[0, 0, 0, edge]], np.float32)))[0, 3] == edge


def test_faults_are_found_in_their_rows_and_named() -> None:
    good = _packed([1, 0], [1, 2, 3], 4, -1)  # whose bytes as floats are NaN
    assert MIXED.faults(_rows(good, good), non_finite=False) == []
    rows = _rows(good, _packed([0, 0], [1, np.nan, 3], 4, 5), _packed([2, 0], [1, 2, 3], np.inf, 5))
    (bad, reason, message), (wrong, other, said) = MIXED.faults(rows, non_finite=False)
    assert (bad.tolist(), reason) == ([False, True, True], "NON_FINITE_INPUT") and "obs, gap has" in message
    assert (wrong.tolist(), other) == ([False, False, True], "INVALID_INPUT_DTYPE") and "seen is bool" in said
    assert [fault[1] for fault in MIXED.faults(rows, non_finite=True)] == ["INVALID_INPUT_DTYPE"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_not_finite_is_found_in_every_float(dtype: str) -> None:
    rows = Rows([TensorSpec("x", dtype, (4,))])
    for value in (np.nan, np.inf, -np.inf):
        packed = rows.of_floats(np.array([[0, 1, 2, 3], [0, 1, value, 3]], np.float32))
        ((bad, reason, _),) = rows.faults(packed, non_finite=False)
        assert (bad.tolist(), reason) == ([False, True], "NON_FINITE_INPUT")
        assert rows.faults(packed, non_finite=True) == [] == rows.faults(packed[:1].copy(), non_finite=False)
