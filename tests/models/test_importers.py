"""Weights of torch.nn modules in cells of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engram_models import bundle_from_torch, load_bundle, write_bundle


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_an_imported_cell_computes_the_same(make: Any, batch_first: bool, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = make(5, 12, 2, batch_first=batch_first, bias=bias)
    head = nn.Linear(12, 3, bias=bias)
    bundle = load_bundle(write_bundle(tmp_path, "imported", "1", bundle_from_torch(module, head, "softmax")))
    xs = torch.randn(4, 50, 5)
    with torch.no_grad():
        hidden = module(xs)[0] if batch_first else module(xs.transpose(0, 1))[0].transpose(0, 1)
        expected = torch.softmax(head(hidden), -1)
        torch.testing.assert_close(bundle.cell.sequence(xs)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("module", "head", "message"),
    [
        (nn.LSTM(3, 4, bidirectional=True), None, "bidirectional"),
        (nn.LSTM(3, 4, proj_size=2), None, "projections"),
        (nn.GRU(3, 4), nn.Linear(5, 2), "head takes 5"),
    ],
)
def test_what_cannot_be_stepped_is_refused(module: Any, head: nn.Linear | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bundle_from_torch(module, head)
