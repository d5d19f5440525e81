"""Starting values of recurrent cells' weights: identity for ReLU nets, orthogonal ones, the forget gate's bias."""

from __future__ import annotations

import torch
from torch import nn

from engram_models.cell import Cell
from engram_models.recurrent import Layer, LSTMLayer
from engram_models.training.experiment import TrainingError

_FORGET = 1  # the forget gate's place among i, f, g, o


def initialise(cell: Cell, way: str = "default", forget_bias: float = 0.0) -> None:
    """Changes a fresh cell's weights in place. Raises TrainingError where the way is unknown or does not fit the cell.

    "identity": W = I, b = 0, U from N(0, 0.001^2), of a ReLU net (Le, Jaitly and Hinton 2015). "orthogonal": each gate's W is
    orthogonal. `forget_bias` is added to the forget gates' bias (Gers et al. 2000).
    """
    layers = [module for module in cell.modules() if isinstance(module, Layer)]
    if way not in ("default", "identity", "orthogonal"):
        raise TrainingError(f"initialisation {way!r} is not one of default, identity, orthogonal")
    if way != "default" and not layers:
        raise TrainingError(f"initialisation {way!r} is for recurrent layers; kind {cell.kind} has none")
    with torch.no_grad():
        for layer in layers:
            if way == "identity":
                _identity(layer)
            elif way == "orthogonal":
                for gate in layer.weight[:, layer.input_size :].split(layer.hidden_size):
                    nn.init.orthogonal_(gate)
            if forget_bias and isinstance(layer, LSTMLayer):
                layer.bias[_FORGET * layer.hidden_size : (_FORGET + 1) * layer.hidden_size] += forget_bias


def _identity(layer: Layer) -> None:
    if layer.gates != 1:
        raise TrainingError("initialisation 'identity' is for the vanilla RNN")
    nn.init.normal_(layer.weight[:, : layer.input_size], std=1e-3)
    nn.init.eye_(layer.weight[:, layer.input_size :])
    nn.init.zeros_(layer.bias)
