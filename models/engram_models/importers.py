"""Cells of ours with the weights of torch.nn modules.

PyTorch keeps input and recurrent weights apart and has two biases for each gate; the sums are the same (MODELS.md's layouts:
gates i f g o and r z n, as here), but for the GRU's recurrent bias of n, which stays separate.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from engram_models.recurrent import HEADS, LSTM, GRUResetAfter, GRUResetAfterLayer, Layer, RecurrentCell, VanillaRNN

TOLERANCE = 1e-5  # of the largest output, where that is above 1
_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COMPUTED = ("_g", "_v", "_orig")  # how weight_norm, spectral_norm and prune rename a parameter

M = TypeVar("M", bound=nn.Module)


def bundle_from_torch(
    module: nn.RNN | nn.GRU | nn.LSTM, head: nn.Linear | None = None, activation: str = "none"
) -> RecurrentCell:
    """A cell that computes what `module`, then `head` and `activation` compute in evaluation mode, ready for write_bundle.

    The modules stay as they are, their mode too. Weights on another device or of another float dtype become float32 on the CPU.
    Raises TypeError for what is no such module, ValueError for what the cell contract has no place for: bidirectional modules,
    projections, weights that are computed from others. Checked by running both in float64 on random input: outputs that
    differ by more than TOLERANCE are a ValueError too.
    """
    _check_recurrent(module)
    if head is not None:
        _check_head(head, module.hidden_size)
    if not isinstance(activation, str):
        raise TypeError(f"activation is a {_name(activation)}; name one of {', '.join(HEADS)}")
    with torch.device("cpu"), torch.no_grad():
        source, linear = _copy(module), None if head is None else _copy(head)
        cell = _empty(source, linear, activation)
        for number, layer in enumerate(cell.layers):
            _copy_layer(source, number, layer)  # type: ignore[arg-type]
        if linear is not None and cell.head is not None:
            cell.head.weight.copy_(linear.weight)
            cell.head.bias.copy_(linear.state_dict().get("bias", torch.zeros(linear.out_features)))
        _compare(source, linear, cell)
    return cell


def _check_recurrent(module: object) -> None:
    name = _name(module)
    kind = next((kind for kind in _RECURRENT if isinstance(module, kind)), None)
    if kind is None or not isinstance(module, nn.RNNBase):
        raise TypeError(f"cannot import a {name}: give an nn.RNN, nn.GRU or nn.LSTM{_hint(module)}")
    if type(module).forward is not kind.forward:
        raise TypeError(
            f"cannot import a {name}: its forward is its own; give a plain nn.{kind.__name__} with its weights"
        )
    if module.bidirectional or module.proj_size:
        raise ValueError(
            f"cannot import this {name}: bidirectional modules and projections cannot be stepped online; import one direction "
            "without projection"
        )
    sizes = (module.input_size, module.hidden_size, module.num_layers, module.bias)
    _check_parameters(module, nn.RNNBase(module.mode, *sizes, device="meta"))


def _check_head(head: object, hidden_size: int) -> None:
    name = _name(head)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(f"cannot import a {name} as head: give a plain nn.Linear, and what follows it as `activation`")
    if any(map(is_lazy, head.parameters())):
        raise ValueError(f"cannot import this {name}: it has no weights before it was called once")
    _check_parameters(head, nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta"))
    if head.in_features != hidden_size:
        raise ValueError(f"the head takes {head.in_features} values, the module gives {hidden_size}")


def _check_parameters(module: nn.Module, plain: nn.Module) -> None:
    """Those that a plain module of its sizes has and no others, finite. Raises ValueError."""
    refused = f"cannot import this {_name(module)}:"
    found, wanted = dict(module.named_parameters()), dict(plain.named_parameters())
    for key in sorted(set(found) ^ set(wanted)):
        if key in found and (key.startswith("parametrizations.") or key.endswith(_COMPUTED)):
            raise ValueError(
                f"{refused} {key} stands for a weight that is computed; make it plain first (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm, remove_spectral_norm, prune.remove)"
            )
    if odd := sorted(set(found) ^ set(wanted)):
        raise ValueError(f"{refused} {odd[0]} is {'one parameter too many' if odd[0] in found else 'missing'}")
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise ValueError(f"{refused} {key} is {list(value.shape)}, its sizes ask for {list(wanted[key].shape)}")
        if value.is_meta:
            raise ValueError(f"{refused} {key} has no numbers (device meta); load its weights first")
        if value.dtype not in _FLOATS:
            raise ValueError(f"{refused} {key} is {value.dtype}; convert it to float32 first")
        if not torch.isfinite(value.detach().float()).all():
            raise ValueError(f"{refused} {key} has NaN or infinity, as float32 at least")


def _name(thing: object) -> str:
    """Of its class; with its module where torch.nn has another one of that name (quantized modules, say)."""
    kind = thing if isinstance(thing, type) else type(thing)
    ours = getattr(nn, kind.__name__, kind)
    name = kind.__name__ if ours is kind else f"{kind.__module__}.{kind.__name__}"
    return f"{name} class" if isinstance(thing, type) else name


def _hint(thing: object) -> str:
    """What to give instead, where that can be seen."""
    if isinstance(thing, nn.RNNCellBase):
        return "; load its weights into one of one layer: weight_ih as weight_ih_l0, and so on"
    if isinstance(thing, Mapping):
        return "; load the weights into one first (load_state_dict)"
    if isinstance(thing, nn.Module) and not isinstance(thing, torch.jit.ScriptModule):
        for path, inner in thing.named_modules():
            if isinstance(inner, _RECURRENT):
                return f", as its {path!r} is, and an nn.Linear that follows it as `head`"
    return ""


def _copy(module: M) -> M:
    """In evaluation mode, float32, on the CPU: the caller's stays in the mode it was in."""
    try:
        return copy.deepcopy(module).to("cpu", torch.float32).eval()
    except Exception as error:  # whatever a module's own parts raise
        raise ValueError(f"cannot import this {_name(module)}: it cannot be copied: {error}") from error


def _empty(module: nn.RNNBase, head: nn.Linear | None, activation: str) -> RecurrentCell:
    outputs = None if head is None else int(head.out_features)
    sizes = (int(module.input_size), int(module.hidden_size), int(module.num_layers), outputs, activation)
    if isinstance(module, nn.LSTM):
        return LSTM(*sizes).float()
    if isinstance(module, nn.GRU):
        return GRUResetAfter(*sizes).float()
    return VanillaRNN(*sizes, nonlinearity=module.nonlinearity).float()


def _copy_layer(module: nn.RNNBase, number: int, layer: Layer) -> None:
    w_ih, w_hh = (getattr(module, f"weight_{name}_l{number}") for name in ("ih", "hh"))
    layer.weight.copy_(torch.cat((w_ih, w_hh), 1))
    zeros = torch.zeros(len(w_ih))
    b_ih, b_hh = (getattr(module, f"bias_{name}_l{number}") if module.bias else zeros for name in ("ih", "hh"))
    if isinstance(layer, GRUResetAfterLayer):
        split = 2 * layer.hidden_size
        layer.bias.copy_(torch.cat((b_ih[:split] + b_hh[:split], b_ih[split:])))
        layer.bias_n.copy_(b_hh[split:])
    else:
        layer.bias.copy_(b_ih + b_hh)


def _compare(module: nn.RNNBase, head: nn.Linear | None, cell: RecurrentCell) -> None:
    """Never trust a layout: runs both, in float64, where large weights do not make much of rounding.

    Before the activation, which is one function for both and may hide or enlarge a difference.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 8, module.input_size, generator=generator, dtype=torch.float64)
    ours = copy.deepcopy(cell).double()
    ours.activate = HEADS["none"]
    try:
        raw: Tensor = module.double()(x if module.batch_first else x.transpose(0, 1))[0]
        raw = raw if module.batch_first else raw.transpose(0, 1)
        expected = raw if head is None else head.double()(raw)
        difference = (ours.sequence(x)[0] - expected).abs().max().item()
    except Exception as error:  # a hook's, say
        raise ValueError(f"cannot import this {_name(module)}: it does not run: {error}") from error
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ValueError(
            f"the imported cell differs from the module by {difference:.2g}, at most {allowed:.2g} is allowed: has the "
            f"{_name(module)} or its head a hook?"
        )
