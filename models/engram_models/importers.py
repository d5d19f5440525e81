"""Cells of ours with the weights of torch.nn modules.

PyTorch keeps input and recurrent weights apart and has two biases for each gate; the sums are the same (MODELS.md's layouts:
gates i f g o and r z n, as here), but for the GRU's recurrent bias of n, which stays separate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engram_models.recurrent import LSTM, GRUResetAfter, GRUResetAfterLayer, Layer, RecurrentCell, VanillaRNN


def bundle_from_torch(
    module: nn.RNN | nn.GRU | nn.LSTM, head: nn.Linear | None = None, activation: str = "none"
) -> RecurrentCell:
    """A cell that computes what `module` and then `head` and `activation` compute, ready for write_bundle.

    Raises ValueError for what the cell contract has no place for: bidirectional modules and projections. Checked by running
    both on random input: a difference above 1e-5 is a ValueError too.
    """
    if module.bidirectional or module.proj_size:
        raise ValueError(
            "bidirectional modules and projections cannot be stepped online; import one direction without projection"
        )
    if head is not None and head.in_features != module.hidden_size:
        raise ValueError(f"the head takes {head.in_features} values, the module gives {module.hidden_size}")
    sizes = (
        module.input_size,
        module.hidden_size,
        module.num_layers,
        None if head is None else head.out_features,
        activation,
    )
    if isinstance(module, nn.LSTM):
        cell: RecurrentCell = LSTM(*sizes)
    elif isinstance(module, nn.GRU):
        cell = GRUResetAfter(*sizes)
    else:
        cell = VanillaRNN(*sizes, nonlinearity=module.nonlinearity)
    with torch.no_grad():
        for number, layer in enumerate(cell.layers):
            _copy_layer(module, number, layer)  # type: ignore[arg-type]
        if head is not None and cell.head is not None:
            cell.head.weight.copy_(head.weight)
            cell.head.bias.copy_(head.state_dict().get("bias", torch.zeros(head.out_features)))
    _compare(module, head, cell)
    return cell


def _copy_layer(module: nn.RNN | nn.GRU | nn.LSTM, number: int, layer: Layer) -> None:
    w_ih, w_hh = (getattr(module, f"weight_{name}_l{number}") for name in ("ih", "hh"))
    layer.weight.copy_(torch.cat((w_ih, w_hh), 1))
    zeros = torch.zeros(len(w_ih))
    weights = dict(module.named_parameters())
    b_ih, b_hh = (
        getattr(module, f"bias_{name}_l{number}") if "bias_ih_l0" in weights else zeros for name in ("ih", "hh")
    )
    if isinstance(layer, GRUResetAfterLayer):
        split = 2 * layer.hidden_size
        layer.bias.copy_(torch.cat((b_ih[:split] + b_hh[:split], b_ih[split:])))
        layer.bias_n.copy_(b_hh[split:])
    else:
        layer.bias.copy_(b_ih + b_hh)


def _compare(module: nn.RNN | nn.GRU | nn.LSTM, head: nn.Linear | None, cell: RecurrentCell) -> None:
    """Never trust a layout: runs both."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 8, module.input_size, generator=generator)
    with torch.no_grad():
        raw: Tensor = module(x if module.batch_first else x.transpose(0, 1))[0]
        raw = raw if module.batch_first else raw.transpose(0, 1)
        expected = cell.activate(raw if head is None else head(raw))
        difference = (cell.sequence(x)[0] - expected).abs().max().item()
    if not difference <= 1e-5:
        raise ValueError(f"the imported cell differs from the module by {difference:.2g}")
