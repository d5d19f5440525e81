"""What is asked of a model beside its steps: an NTM's memory by content, a Boltzmann machine's recreation. For api/memory.py.

Changes nothing: neither arena nor session.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from engram_models import Bundle, TensorSpec, content_addressing

Floats = NDArray[np.float32]


@runtime_checkable
class Recreator(Protocol):
    """A cell that recreates its inputs; engram_models has the RBM and the DBN."""

    def recreate(self, x: torch.Tensor, mask: torch.Tensor | None, sweeps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x [batch, visible], mask bool: units that are known -> recreations [batch, visible], energies [batch, sweeps + 1]"""
        ...


def one_thread() -> None:
    """For threads that ask: torch splits small work at a loss."""
    torch.set_num_threads(1)


def addressable(bundle: Bundle) -> TensorSpec | None:
    """The state tensor, float32 [locations, width], that can be asked by content; None: the model has none."""
    found = [
        spec for spec in bundle.state if spec.role == "memory" and spec.dtype == "float32" and len(spec.shape) == 2
    ]
    return found[0] if found else None


def address(bundle: Bundle, state: NDArray[np.uint8], keys: Floats, strengths: Floats) -> tuple[Floats, Floats]:
    """Weightings [n, N] and reads [n, M] of keys [n, M] with strengths [n], in the memory of a state [state_nbytes].

    Graves, Wayne and Danihelka 2014, section 3.3.1 and (2). `bundle` is addressable. One key after the other: how a matrix library
    rounds depends on how many rows it is given, and a key's bits shall not depend on the others.
    """
    start = 0
    wanted = addressable(bundle)
    assert wanted is not None
    for spec in bundle.state:
        if spec is wanted:
            break
        start += spec.nbytes
    values = np.frombuffer(state.tobytes(), np.float32, wanted.size, start).reshape(1, *wanted.shape)
    with torch.inference_mode():
        memory = torch.from_numpy(values.copy())
        weightings = [
            content_addressing(
                memory, torch.from_numpy(keys[None, n : n + 1]), torch.from_numpy(strengths[None, n : n + 1])
            )
            for n in range(len(keys))
        ]
        reads = [torch.bmm(weighting, memory) for weighting in weightings]
    return torch.cat(weightings, 1)[0].numpy(), torch.cat(reads, 1)[0].numpy()


def recreate(cell: Recreator, inputs: Floats, unknown: NDArray[np.bool_] | None, sweeps: int) -> tuple[Floats, Floats]:
    """Recreations [n, visible] of inputs [n, visible], and energies [n, sweeps + 1]; known units keep their values.

    Without `unknown` every unit is recreated. Raises ValueError where a known unit is not within 0..1.
    """
    assert isinstance(cell, torch.nn.Module)
    device = next(cell.parameters()).device
    known = None if unknown is None else torch.from_numpy(~unknown).to(device)
    with torch.inference_mode():
        recreations, energies = cell.recreate(torch.from_numpy(inputs).to(device), known, sweeps)
        return recreations.cpu().numpy(), energies.cpu().numpy().astype(np.float32)
