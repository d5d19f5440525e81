"""Reads a .keras file of Keras 3 as data, executing nothing: its layers in order, and their weights. Called by keras_steps.py."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.importing.archive import read_entry
from engram_models.importing.errors import ImportRefusedError, shown

_CONFIG_BYTES_MAX = 16 << 20
_WEIGHTS_BYTES_MAX = 2 << 30
_LAYERS_MAX = 1000
Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str  # its class name
    config: dict[str, Any]
    group: str  # of its weights


class KerasFile:
    """The layers of a model whose layers follow one another, with their weights."""

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError:
            raise ImportRefusedError(f"{path}: reading Keras weights takes h5py: pip install 'engram[keras]'") from None
        self.path, self._h5py = path, h5py
        try:
            config = json.loads(read_entry(path, "config.json", _CONFIG_BYTES_MAX))
        except (ValueError, RecursionError):
            raise ImportRefusedError(f"{path}: its config.json is not JSON") from None
        try:
            self.layers = self._layers(config)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ImportRefusedError(
                f"{path}: its config.json does not describe a Keras 3 model ({type(error).__name__}: {error})"
            ) from None
        data = read_entry(path, "model.weights.h5", _WEIGHTS_BYTES_MAX)
        try:
            self._weights = h5py.File(io.BytesIO(data), "r")
            self._groups = self._by_layer_name()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ImportRefusedError(f"{path}: its model.weights.h5 is not a whole HDF5 file ({error})") from None

    def weights(self, layer: Layer, shapes: Sequence[tuple[int, ...]], inside: str = "") -> list[Array]:
        """A layer's arrays, float32; their shapes must be these."""
        group = self._groups.get(layer.name, layer.group) + inside
        found = []
        for place, shape in enumerate(shapes):
            dataset = self._dataset(f"{group}/vars/{place}")
            if dataset is None or tuple(dataset.shape) != shape:
                there = "is not there" if dataset is None else f"has the shape {list(dataset.shape)}, not {list(shape)}"
                raise ImportRefusedError(
                    f"{self.path}: layer {shown(layer.name)} ({layer.kind}): weight {place} {there}"
                )
            if dataset.dtype != np.float32:
                raise ImportRefusedError(
                    f"{self.path}: layer {shown(layer.name)}: weight {place} is {dataset.dtype}, not float32"
                )
            try:
                found.append(np.ascontiguousarray(dataset[()]))
            except (OSError, ValueError, RuntimeError) as error:
                raise ImportRefusedError(
                    f"{self.path}: layer {shown(layer.name)}: weight {place} cannot be read ({error})"
                ) from None
        return found

    def _dataset(self, place: str) -> Any:
        here = self._at(place)
        if not isinstance(here, self._h5py.Dataset) or here.external or here.is_virtual:
            return None
        return here

    def _at(self, place: str) -> Any:
        """By hard links alone: an HDF5 file may point to other files."""
        here: Any = self._weights
        for part in place.split("/"):
            if not isinstance(here, self._h5py.Group) or not isinstance(
                here.get(part, getlink=True), self._h5py.HardLink
            ):
                return None
            here = here[part]
        return here

    def _by_layer_name(self) -> dict[str, str]:
        """Groups by the name of the layer that Keras noted at them."""
        found: dict[str, str] = {}
        layers = self._at("layers")
        for key in list(layers)[:_LAYERS_MAX] if isinstance(layers, self._h5py.Group) else ():
            noted = self._at(f"layers/{key}/vars")
            name = noted.attrs.get("name") if noted is not None else None
            if isinstance(name, str):
                found.setdefault(name, f"layers/{key}")
        return found

    def _layers(self, config: dict[str, Any]) -> list[Layer]:
        kind, module = config["class_name"], config.get("module", "")
        if kind not in ("Sequential", "Functional") or not module.startswith("keras"):
            raise ImportRefusedError(
                f"{self.path}: a {shown(kind)} model, code of its own; Sequential models and chains of layers are rebuilt. "
                "Export it to ONNX where it was made, with its states as inputs and outputs, and import that"
            )
        described = config["config"]["layers"]
        if not 0 < len(described) <= _LAYERS_MAX:
            raise ImportRefusedError(f"{self.path}: {len(described)} layers; from 1 to {_LAYERS_MAX} are read")
        if kind == "Functional":
            self._check_chain(described)
        counted: dict[str, int] = {}
        layers = []
        for one in described:
            snake = re.sub(
                r"([a-z])([A-Z])",
                r"\1_\2",
                re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", one["class_name"])),
            ).lower()
            number = counted[snake] = counted.get(snake, -1) + 1
            group = f"layers/{snake}" + (f"_{number}" if number else "")
            if one.get("registered_name") or not str(one.get("module", "")).startswith("keras.layers"):
                raise ImportRefusedError(
                    f"{self.path}: layer {shown(one['config'].get('name', ''))} ({shown(one['class_name'])}) is no layer of Keras, "
                    "and its code is not in the file"
                )
            layers.append(Layer(str(one["config"]["name"]), one["class_name"], one["config"], group))
        return layers

    def _check_chain(self, described: list[dict[str, Any]]) -> None:
        """Each layer takes what the one before it gives, and nothing else."""
        before = None
        for one in described:
            taken = re.findall(
                r"\"keras_history\": \[\"((?:[^\"\\]|\\.)*)\"", json.dumps(one["inbound_nodes"], allow_nan=False)
            )
            if taken != ([] if before is None else [before]):
                raise ImportRefusedError(
                    f"{self.path}: layer {shown(one['config']['name'])} takes {', '.join(map(shown, taken)) or 'nothing'}: "
                    "only models whose layers follow one another are rebuilt; export it to ONNX where it was made, and import that"
                )
            before = one["config"]["name"]
