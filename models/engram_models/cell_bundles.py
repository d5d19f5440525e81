"""Bundles of cells: writes one with its step as a graph, and makes the cell of one again, for training and GPUs. Has torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_models.bundle import WEIGHTS, Bundle, BundleError, load_bundle
from engram_models.bundle_writing import write
from engram_models.cell import Cell, State, torch_dtype
from engram_models.check import CHECK_ROWS, CHECK_STEPS, Arrays, CheckError, CheckVector
from engram_models.probe import batch_floor
from engram_models.registry import cell_type
from engram_models.spec import TensorSpec
from engram_models.tensor_file import StoredTensor


def write_bundle(
    directory: Path, name: str, version: str, cell: Cell, description: str = "", allows_non_finite: bool = False
) -> Path:
    """Writes <directory>/<name>/<version>, whole or not at all. Raises BundleError if it is there already or cannot be."""
    weights = {f"weight.{key}": _stored(value) for key, value in cell.state_dict().items()}
    check = record_check(cell)
    return write(
        directory, name, version, cell.kind, cell.config, cell.schema, _graph(cell), {**weights, **check.tensors(cell.schema)},
        description=description, allows_non_finite=allows_non_finite,
    )  # fmt: skip


def load_cell(bundle: Bundle | Path, device: torch.device | str = "cpu") -> Cell:
    """The cell of a bundle, verified, in evaluation mode. Raises BundleError, whatever is wrong with it."""
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    try:
        return _load(bundle, device)
    except (BundleError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file may be wrong in ways that nobody has thought of
        raise BundleError(f"{bundle.path}: {type(error).__name__}: {error}") from error


class CellStep:
    """A cell as a step over NumPy arrays, for the check and the probe."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._device = next((one.device for one in (*cell.parameters(), *cell.buffers())), torch.device("cpu"))

    def __call__(self, inputs: Arrays, states: Arrays) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        cell = self._cell
        with torch.inference_mode():
            state: State = cell.state_type(*map(self._tensor, states, cell.state_schema))
            y, after = cell(self._tensor(inputs[0], cell.input), state)
            return [_array(y)], [_array(tensor) for tensor in after]

    def _tensor(self, values: NDArray[Any], spec: TensorSpec) -> Tensor:
        tensor = torch.from_numpy(np.array(values))  # a copy: torch would write into what is read-only
        return (tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor).to(self._device)


def cell_floor(cell: Cell, batch_max: int, sizes: Iterable[int] | None = None) -> int | None:
    """The floor of a cell in torch, where it is; as probe.batch_floor."""
    return batch_floor(CellStep(cell), cell.schema, record_check(cell), batch_max, sizes)


def record_check(cell: Cell) -> CheckVector:
    """A seeded run of CHECK_STEPS steps over CHECK_ROWS rows, from a random state."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        inputs = torch.stack([cell.inputs_like(_random(cell.input, generator)) for _ in range(CHECK_STEPS)])
    before = [_random(spec, generator) for spec in cell.state_schema]
    was_training = cell.training
    cell.eval()
    check = CheckVector.record(cell.schema, CellStep(cell), [_array(inputs)], [_array(one) for one in before])
    cell.train(was_training)
    return check


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _stored(tensor: Tensor) -> StoredTensor:
    return StoredTensor(str(tensor.dtype).removeprefix("torch."), _array(tensor))


def _graph(cell: Cell) -> bytes:
    """None of bytes: a plug-in's cell, which torch computes."""
    from engram_models.graphs import step_graph

    try:
        return bytes(step_graph(cell).SerializeToString())
    except TypeError:
        return b""


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    shape = (CHECK_ROWS, *spec.shape)
    if spec.is_float:
        return torch.randn(shape, generator=generator).to(torch_dtype(spec))
    return torch.randint(0, 2, shape, generator=generator).to(torch_dtype(spec))


def _load(bundle: Bundle, device: torch.device | str) -> Cell:
    weights = bundle.read_weights()
    cell = _empty(bundle, (bundle.path / WEIGHTS).stat().st_size)
    _load_weights(bundle.path, cell, weights)
    cell.to(device).eval().requires_grad_(False)
    try:
        bundle.check.verify(bundle.schema, CellStep(cell))
    except CheckError as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    return cell


def _empty(bundle: Bundle, nbytes: int) -> Cell:
    """The untrained cell that the manifest describes, with the schema that it records. Its weights' file has `nbytes`."""
    kind = cell_type(bundle.kind)
    if kind is None:
        raise BundleError(f"{bundle.path}: kind {bundle.kind!r} is not a cell that this version has")
    try:
        _check_size(kind, bundle.config, nbytes)
        cell = kind.from_config(bundle.config)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BundleError(f"{bundle.path}: config does not fit kind {bundle.kind}: {error}") from error
    if cell.schema != bundle.schema:
        raise BundleError(
            f"{bundle.path}: the recorded schema is not the one that its config gives: {_other(cell, bundle)}"
        )
    return cell


def _other(cell: Cell, bundle: Bundle) -> str:
    own, found = cell.schema, bundle.schema
    pairs = [*zip(own.inputs, found.inputs, strict=False), *zip(own.outputs, found.outputs, strict=False)]
    pairs += zip(own.state, found.state, strict=False)
    given, recorded = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
    return f"{recorded} is recorded, {given} is what it gives" if given else "they have not as many tensors"


def _check_size(kind: type[Cell], config: Mapping[str, Any], nbytes: int) -> None:
    """A config of a few bytes must not have us make more weights than its bundle brings along. Raises ValueError."""
    with torch.device("meta"):  # shapes alone
        wanted = sum(tensor.numel() * tensor.itemsize for tensor in kind.from_config(config).state_dict().values())
    if wanted > nbytes:
        raise ValueError(f"it asks for {wanted} bytes of weights, weights.safetensors has {nbytes} bytes of tensors")


def _load_weights(path: Path, cell: Cell, weights: Mapping[str, StoredTensor]) -> None:
    wanted = {key: _stored(value) for key, value in cell.state_dict().items()}
    if missing := sorted(set(wanted) - set(weights)):
        raise BundleError(f"{path}: weight.{missing[0]} is missing from the weights")
    if unexpected := sorted(set(weights) - set(wanted)):
        raise BundleError(f"{path}: weight.{unexpected[0]} is not a weight of kind {cell.kind} with this config")
    for key, tensor in weights.items():
        if tensor.text != wanted[key].text:
            raise BundleError(f"{path}: weight.{key} is {tensor.text}, expected {wanted[key].text}")
    tensors = {key: torch.from_numpy(np.array(tensor.values)) for key, tensor in weights.items()}
    bfloats = [key for key, tensor in weights.items() if tensor.dtype == "bfloat16"]
    cell.load_state_dict(tensors | {key: tensors[key].view(torch.bfloat16) for key in bfloats})
