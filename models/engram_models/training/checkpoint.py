"""Checkpoints of an experiment: one safetensors file, replaced whole, so that a kill at any moment leaves a usable one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engram_models.files import require_regular
from engram_models.training.errors import TrainingError
from engram_models.training.output import write_whole


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], recipe: str, digest: str, seed: int) -> None:
    """Writes beside, syncs, then renames. Raises TrainingError (disk full, say), and leaves the last one as it was."""
    metadata = {"recipe": recipe, "digest": digest, "seed": str(seed)}
    write_whole(path, save({key: value.detach().contiguous() for key, value in tensors.items()}, metadata))


def load_checkpoint(path: Path, digest: str, seed: int) -> dict[str, Tensor]:
    """The tensors. Raises TrainingError where the file is damaged or belongs to another recipe or seed."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("digest") != digest:
                raise TrainingError(
                    f"{path} is a checkpoint of another recipe ({metadata.get('recipe', 'unknown')}, or this one before it "
                    "was changed); choose another --out, or start over without --resume"
                )
            if metadata.get("seed") != str(seed):
                raise TrainingError(f"{path} is a checkpoint of seed {metadata.get('seed')}, not of {seed}")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise TrainingError(f"{path}: not a checkpoint: {error.strerror or error}") from error
    except SafetensorError as error:
        raise TrainingError(f"{path}: not a checkpoint: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its moments and counts by name, for a checkpoint; `restore_optimizer` takes them back."""
    states = optimizer.state_dict()["state"]
    return {
        f"{place}.{key}": torch.as_tensor(value)
        for place, state in states.items()
        for key, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, key = name.partition(".")
        state.setdefault(int(place), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, named without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
