"""Starting values of weights: identity for ReLU nets, orthogonal ones, the forget gate's bias, heads that walk or seek."""

from __future__ import annotations

import torch
from torch import nn

from engram_models.cell import Cell
from engram_models.ntm import NTM
from engram_models.recurrent import Layer, LSTMLayer
from engram_models.training.errors import TrainingError

_FORGET = 1  # the forget gate's place among i, f, g, o
_WAYS = ("default", "identity", "orthogonal", "walk", "seek")
INPUT_STD = 1e-3  # Le et al.'s
_WALK = 1.0  # logits; more would leave no gradient to learn other moves by
_LOOK = 15.0  # strength of a key: enough for one location of many to stand out, and below where it would be clipped
_INPUT, _PAST = (
    2.0,
    0.2,
)  # factors of the controller's weights, so that it says nearly the same whenever it sees the same


def initialise(cell: Cell, way: str = "default", forget_bias: float = 0.0, input_std: float = INPUT_STD) -> None:
    """Changes a fresh cell's weights in place. Raises TrainingError where the way is unknown or does not fit the cell.

    "identity": W = I, b = 0, U from N(0, input_std^2), of a ReLU net (Le, Jaitly and Hinton 2015). "orthogonal": each gate's W is
    orthogonal. "walk": a Turing machine's write heads begin by moving one location on at each step and its read heads by staying,
    rather than all by moving to both sides alike, which blurs; and what is written is large enough to be read. It has then
    to learn when to do otherwise, not to find out that places come one after the other. "seek": write heads walk as well, and
    a read head begins by looking for what the machine would write now, and goes to the location after the one that is most
    like it. It has then to learn when not to look. `forget_bias` is added to the forget gates' bias (Gers et al. 2000).
    """
    layers = [module for module in cell.modules() if isinstance(module, Layer)]
    if way not in _WAYS:
        raise TrainingError(f"initialisation {way!r} is not one of {', '.join(_WAYS)}")
    if way == "walk":
        _walk(cell)
    elif way == "seek":
        _seek(cell)
    elif way != "default" and not layers:
        raise TrainingError(f"initialisation {way!r} is for recurrent layers; kind {cell.kind} has none")
    with torch.no_grad():
        for layer in layers:
            if way == "identity":
                _identity(layer, input_std)
            elif way == "orthogonal":
                for gate in torch.split(layer.weight[:, layer.input_size :], layer.hidden_size):
                    nn.init.orthogonal_(gate)
            if forget_bias and isinstance(layer, LSTMLayer):
                layer.bias[_FORGET * layer.hidden_size : (_FORGET + 1) * layer.hidden_size] += forget_bias


def _identity(layer: Layer, input_std: float) -> None:
    if layer.gates != 1:
        raise TrainingError("initialisation 'identity' is for the vanilla RNN")
    nn.init.normal_(layer.weight[:, : layer.input_size], std=input_std)
    nn.init.eye_(layer.weight[:, layer.input_size :])
    nn.init.zeros_(layer.bias)


def _walk(cell: Cell) -> NTM:
    if not isinstance(cell, NTM) or not cell.reach:
        raise TrainingError("initialisations 'walk' and 'seek' are for a Turing machine with heads that can shift")
    with torch.no_grad():
        _, _, gate, shifts, gamma, erase, _ = torch.split(cell.emit.bias, cell.sizes)
        gate -= _WALK  # towards the last weighting, away from content
        by_head = shifts.view(cell.heads, -1)
        by_head[: cell.read_heads, cell.reach] += _WALK
        by_head[cell.read_heads :, cell.reach + 1] += _WALK
        gamma += _WALK
        erase += _WALK  # what is written replaces what was there
        *_, add = torch.split(cell.emit.weight, cell.sizes)
        add.uniform_(-1, 1)  # what is written can be read from the start
    return cell


def _seek(cell: Cell) -> None:
    machine = _walk(cell)
    reads, writes = machine.read_heads, machine.heads - machine.read_heads
    with torch.no_grad():
        # What is written and what is looked for: alike where the input is, whatever came before it.
        machine.controller.weight[:, : machine.input.shape[0]] *= _INPUT
        machine.controller.weight[:, machine.input.shape[0] :] *= _PAST
        machine.controller.bias.zero_()
        key, *_, add = torch.split(machine.emit.weight, machine.sizes)
        key.view(machine.heads, machine.width, -1)[:reads] = add.view(writes, machine.width, -1)[0]
        key, strength, gate, shifts, gamma, _, add = torch.split(machine.emit.bias, machine.sizes)
        key.zero_()
        add.zero_()
        strength[:reads] += _LOOK
        gate[:reads] += 2 * _WALK  # towards content
        ahead = shifts.view(machine.heads, -1)[:reads]
        ahead[:, machine.reach] -= _WALK
        ahead[:, machine.reach + 1] += 2 * _WALK
        gamma += 2 * _WALK
