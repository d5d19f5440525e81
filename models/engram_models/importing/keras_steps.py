"""One step of a Keras model as an ONNX graph: [batch, features] and recurrent layers' states, in and out. Runs in conversion.py.

A recurrent layer of Keras runs through [batch, time, features]; here each call is one moment, and what the layer carries from one
to the next are states `<layer>_h`, `<layer>_c` and `next_<layer>_h`, `next_<layer>_c`. They begin at zero, as in Keras.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.keras_file import Array, KerasFile, Layer
from engram_models.importing.nodes import Nodes

UNITS_MAX = 1 << 16
_SAME = (
    "Dropout", "SpatialDropout1D", "GaussianDropout", "GaussianNoise", "AlphaDropout", "ActivityRegularization", "Identity",
)  # fmt: skip
_OPERATORS: dict[str, tuple[str, dict[str, float]]] = {  # Keras's activation: an operator with attributes
    "tanh": ("Tanh", {}), "sigmoid": ("Sigmoid", {}), "relu": ("Relu", {}), "softmax": ("Softmax", {"axis": -1}),
    "log_softmax": ("LogSoftmax", {"axis": -1}), "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "elu": ("Elu", {}), "selu": ("Selu", {}), "softplus": ("Softplus", {}), "softsign": ("Softsign", {}),
    "exponential": ("Exp", {}), "leaky_relu": ("LeakyRelu", {"alpha": 0.2}), "mish": ("Mish", {}),
}  # fmt: skip


def write_step(source: Path, output: Path) -> list[str]:
    """Gives what the user should know. Raises ImportRefusedError."""
    file = KerasFile(source)
    try:
        graph = _Step(file)
        graph.write(output)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ImportRefusedError(
            f"{source}: its config.json does not describe a Keras 3 model ({type(error).__name__}: {error})"
        ) from None
    if graph.states:
        return ["a row is one moment of the sequence; its outputs are the last layer's at that moment"]
    return ["it has no recurrent layer: its sessions have no state"]


class _Step:
    """The graph while it is built; `here` is the value that the next layer takes, `width` how many features it has."""

    def __init__(self, file: KerasFile) -> None:
        self.file = file
        self.graph = Nodes()
        self.states: list[tuple[str, int]] = []
        self.input, self.features, layers = self._begin(file.layers)
        self.here, self.width, self.output = self.input, self.features, ""
        for layer in layers:
            self._add(layer)
            self.output = layer.name

    def write(self, output: Path) -> None:
        result = _plain(self.output) if _plain(self.output) != self.input else "output"
        self.graph.named(self.here, result)
        inputs = [(self.input, self.features), *self.states]
        self.graph.write(
            inputs, [(result, self.width), *((f"next_{name}", width) for name, width in self.states)], output
        )

    def _begin(self, layers: list[Layer]) -> tuple[str, int, list[Layer]]:
        first = layers[0]
        if first.kind != "InputLayer":
            raise ImportRefusedError(
                f"{self.file.path}: the model has no Input layer, so that its sizes are not known; build it, and save it again"
            )
        shape = first.config["batch_shape"]
        if len(shape) not in (2, 3) or not isinstance(shape[-1], int) or first.config.get("dtype") != "float32":
            raise ImportRefusedError(
                f"{self.file.path}: its input is {shape} {first.config.get('dtype')}; float32 of [batch, time, features] "
                "or [batch, features] is what steps are made of"
            )
        return _plain(first.name), self._units(first, shape[-1]), layers[1:]

    def _add(self, layer: Layer) -> None:
        policy = layer.config.get("dtype", "float32")
        policy = policy["config"]["name"] if isinstance(policy, dict) else policy
        if policy != "float32":
            raise self._refused(layer, f"computes in {shown(policy)}; save the model with the policy float32")
        if layer.kind in _SAME:
            return
        kinds: dict[str, Callable[[Layer], None]] = {
            "Dense": self._dense, "TimeDistributed": self._time_distributed, "Activation": self._activation_layer,
            "ReLU": self._relu_layer, "Softmax": self._softmax_layer, "LayerNormalization": self._normalisation, "LSTM": self._lstm,
            "GRU": self._gru, "SimpleRNN": self._simple,
        }  # fmt: skip
        if layer.kind not in kinds:
            known = ", ".join(sorted((*kinds, "Dropout")))
            raise self._refused(
                layer,
                f"is not rebuilt; layers that are: {known}. Export the model to ONNX where it was made, and import that",
            )
        if layer.config.get("go_backwards") or layer.config.get("return_state"):
            raise self._refused(layer, "goes backwards or returns its state, which a chain of steps has no place for")
        kinds[layer.kind](layer)

    def _dense(self, layer: Layer, inside: str = "") -> None:
        units, bias = self._units(layer, layer.config["units"]), layer.config.get("use_bias", True)
        if layer.config.get("quantization_config"):
            raise self._refused(layer, "is quantised; save the model as float32")
        kernel, *rest = self.file.weights(layer, [(self.width, units), *([(units,)] if bias else [])], inside)
        self.here = self._activate(
            layer, layer.config["activation"], self.graph.product(self.here, kernel, rest[0] if rest else None)
        )
        self.width = units

    def _time_distributed(self, layer: Layer) -> None:
        inner = layer.config["layer"]
        if inner["class_name"] != "Dense" or inner.get("registered_name"):
            raise self._refused(layer, f"distributes {shown(inner['class_name'])}; a Dense layer is rebuilt")
        self._dense(Layer(layer.name, "Dense", inner["config"], layer.group), "/layer")

    def _activation_layer(self, layer: Layer) -> None:
        self.here = self._activate(layer, layer.config["activation"], self.here)

    def _relu_layer(self, layer: Layer) -> None:
        config = layer.config
        if config.get("max_value") is not None or config.get("threshold") or config.get("negative_slope"):
            raise self._refused(layer, "has a limit, a slope or a threshold")
        self.here = self.graph.node("Relu", self.here)

    def _softmax_layer(self, layer: Layer) -> None:
        if layer.config.get("axis", -1) != -1:
            raise self._refused(layer, "has another axis than the last")
        self.here = self.graph.node("Softmax", self.here, axis=-1)

    def _normalisation(self, layer: Layer) -> None:
        config = layer.config
        axis = config["axis"] if isinstance(config["axis"], list) else [config["axis"]]
        if axis not in ([-1], [2]) or config.get("rms_scaling"):
            raise self._refused(layer, "has another axis than the last")
        count = bool(config.get("scale", True)) + bool(config.get("center", True))
        arrays = self.file.weights(layer, [(self.width,)] * count)
        scale = arrays.pop(0) if config.get("scale", True) else np.ones(self.width, np.float32)
        inputs = [self.here, self.graph.array(scale), *map(self.graph.array, arrays)]
        self.here = self.graph.node("LayerNormalization", *inputs, axis=-1, epsilon=float(config["epsilon"]))

    def _simple(self, layer: Layer) -> None:
        units, kernel, recurrent, bias = self._cell(layer, 1, False)
        h = self._state(layer, "h", units)
        total = self.graph.product(self._joined(h), np.concatenate([kernel, recurrent]), bias)
        self._next(layer, units, h=self._activate(layer, layer.config["activation"], total))

    def _lstm(self, layer: Layer) -> None:
        units, kernel, recurrent, bias = self._cell(layer, 4, False)
        h, c = self._state(layer, "h", units), self._state(layer, "c", units)
        total = self.graph.product(self._joined(h), np.concatenate([kernel, recurrent]), bias)
        i, f, g, o = self.graph.split(total, 4)
        i, f, o = (self._activate(layer, layer.config["recurrent_activation"], gate) for gate in (i, f, o))
        g = self._activate(layer, layer.config["activation"], g)
        after = self.graph.node("Add", self.graph.node("Mul", f, c), self.graph.node("Mul", i, g))
        self._next(
            layer, units, h=self.graph.node("Mul", o, self._activate(layer, layer.config["activation"], after)), c=after
        )

    def _gru(self, layer: Layer) -> None:
        """Keras keeps z, r, h in this order. With reset_after, r multiplies what the recurrent kernel made, its bias too."""
        after = layer.config.get("reset_after", True)
        units, kernel, recurrent, bias = self._cell(layer, 3, after)
        h, gate = self._state(layer, "h", units), layer.config["recurrent_activation"]
        if after:
            xz, xr, xh = self.graph.split(self.graph.product(self.here, kernel, None if bias is None else bias[0]), 3)
            hz, hr, hh = self.graph.split(self.graph.product(h, recurrent, None if bias is None else bias[1]), 3)
            z, r = (self._activate(layer, gate, self.graph.node("Add", *pair)) for pair in ((xz, hz), (xr, hr)))
            total = self.graph.node("Add", xh, self.graph.node("Mul", r, hh))
        else:
            both = np.concatenate([kernel, recurrent])
            first = self.graph.product(
                self._joined(h), both[:, : 2 * units], None if bias is None else bias[: 2 * units]
            )
            z, r = (self._activate(layer, gate, part) for part in self.graph.split(first, 2))
            joined = self._joined(self.graph.node("Mul", r, h))
            total = self.graph.product(joined, both[:, 2 * units :], None if bias is None else bias[2 * units :])
        candidate = self._activate(layer, layer.config["activation"], total)
        rest = self.graph.node("Sub", self.graph.array(np.float32(1)), z)
        self._next(
            layer,
            units,
            h=self.graph.node("Add", self.graph.node("Mul", z, h), self.graph.node("Mul", rest, candidate)),
        )

    def _cell(self, layer: Layer, gates: int, two: bool) -> tuple[int, Array, Array, Array | None]:
        units = self._units(layer, layer.config["units"])
        wide = gates * units
        biases = [(2, wide) if two else (wide,)] if layer.config.get("use_bias", True) else []
        kernel, recurrent, *bias = self.file.weights(layer, [(self.width, wide), (units, wide), *biases], "/cell")
        return units, kernel, recurrent, bias[0] if bias else None

    def _state(self, layer: Layer, letter: str, units: int) -> str:
        name = f"{_plain(layer.name)}_{letter}"
        self.states.append((name, units))
        return name

    def _next(self, layer: Layer, units: int, **after: str) -> None:
        for letter, value in after.items():
            self.graph.named(value, f"next_{_plain(layer.name)}_{letter}")
        self.here, self.width = after["h"], units

    def _joined(self, h: str) -> str:
        return self.graph.node("Concat", self.here, h, axis=1)

    def _activate(self, layer: Layer, activation: Any, value: str) -> str:
        if activation in (None, "linear"):
            return value
        if activation in ("silu", "swish"):
            return self.graph.node("Mul", value, self.graph.node("Sigmoid", value))
        if activation == "gelu":
            halved = self.graph.node("Mul", value, self.graph.array(np.float32(0.5)))
            erf = self.graph.node("Erf", self.graph.node("Mul", value, self.graph.array(np.float32(0.5**0.5))))
            return self.graph.node("Mul", halved, self.graph.node("Add", erf, self.graph.array(np.float32(1))))
        if not isinstance(activation, str) or activation not in _OPERATORS:
            named = activation if isinstance(activation, str) else "a function of its own"
            raise self._refused(
                layer,
                f"has the activation {shown(named)}, which is not rebuilt; known: {', '.join(sorted(_OPERATORS))}",
            )
        operator, attributes = _OPERATORS[activation]
        return self.graph.node(operator, value, **attributes)

    def _units(self, layer: Layer, units: Any) -> int:
        if not isinstance(units, int) or not 0 < units <= UNITS_MAX:
            raise self._refused(layer, f"has {units!r} units; from 1 to {UNITS_MAX}")
        return units

    def _refused(self, layer: Layer, why: str) -> ImportRefusedError:
        return ImportRefusedError(f"{self.file.path}: layer {shown(layer.name)} ({layer.kind}) {why}")


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in name)[:64]
