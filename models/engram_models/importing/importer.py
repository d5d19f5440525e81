"""The whole import of a file: read, understand, prove, compare, write. Called by `engram models import`; prints nothing itself.

read        reading.read_model
understand  flags, roles, initial, axes       a proposal; with one doubt it ends here
rewrite     normal_form
prove       proof.prove, proof.verify
write       bundle_writing.write_graph_bundle, whole or not at all
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from engram_models.bundle import NAME, BundleError
from engram_models.bundle_writing import checked_target, write_graph_bundle
from engram_models.importing import axes, initial, normal_form
from engram_models.importing.arrays import read_arrays
from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.flags import Flags, parse_flags
from engram_models.importing.interface import Dim, Interface
from engram_models.importing.names import is_batch_dim
from engram_models.importing.proof import Proof, Verified, prove, verify
from engram_models.importing.proposal import Array, Proposal
from engram_models.importing.reading import read_model
from engram_models.importing.roles import propose
from engram_models.importing.table import understood

_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """What the user asks for. `flags` are lists of words as parse_flags takes them."""

    source: Path  # an .onnx file
    models: Path
    name: str
    version: str
    flags: Mapping[str, list[str]] = field(default_factory=dict)
    initial: Path | None = None
    verify: Path | None = None
    description: str = ""
    origin: str = ""  # as the user named it: `source` may be what was made of it


@dataclass(frozen=True)
class Imported:
    path: Path
    name: str
    version: str
    proof: Proof
    verified: Verified | None


Say = Callable[[str], None]


def import_model(request: Request, show: Callable[[Proposal], None], progress: Say | None = None) -> Imported:
    """Writes the bundle. `show` gets the proposal when it is complete, or when doubts end the import.

    Raises ImportRefusedError, whose message is one line; nothing is written then.
    """
    say = progress or (lambda line: None)
    check_target(request.models, request.name, request.version)
    say("reads the file")
    model = read_model(request.source)
    vector = read_arrays(request.verify) if request.verify else {}
    proposal = understand(model, request, say)
    show(proposal)
    if proposal.doubts:
        raise ImportRefusedError(
            f"{len(proposal.doubts)} thing{'s' * (len(proposal.doubts) > 1)} to decide, nothing is written: "
            + "; ".join(proposal.doubts)
        )
    form = normal_form.write(model, proposal)
    del model
    run = _of_run(vector, form.names)
    proof = prove(form.graph, form.schema, form.initials, one_by_one=proposal.why, examples=run, progress=say)
    verified = verify(form.graph, form.schema, form.initials, run, progress=say) if request.verify else None
    say("writes the bundle")
    path = _write(request, proposal, form, proof)
    return Imported(path, request.name, request.version, proof, verified)


def understand(model: onnx.ModelProto, request: Request, progress: Say | None = None) -> Proposal:
    """What each tensor is. Raises ImportRefusedError where flags or file cannot be."""
    interface = Interface.of(model)
    flags = parse_flags(interface, **request.flags)
    given = read_arrays(request.initial) if request.initial else {}
    proposal = propose(interface, flags)
    values = initial.gather(model, proposal, flags, given)
    _shapes_of(given, proposal, flags)
    axes.settle(model, proposal, flags, values, progress)
    if not proposal.doubts:
        initial.fill(proposal, values)
    return proposal


def _shapes_of(given: Mapping[str, Array], proposal: Proposal, flags: Flags) -> None:
    """An initial value says what sizes its state has."""
    for line in proposal.states:
        if line.tensor in given and line.dims is not None and any(isinstance(dim, str) for dim in line.dims):
            shape = given[line.tensor].shape
            whole = len(shape) == len(line.dims)
            fits = all(dim in (size, 1) or isinstance(dim, str) for dim, size in zip(line.dims, shape, strict=False))
            if all(shape) and (fits if whole else len(shape) == len(line.dims) - 1 and _sizes_fit(line.dims, shape)):
                flags.shapes.setdefault(line.tensor, shape)


def _sizes_fit(dims: Sequence[Dim], shape: Sequence[int]) -> bool:
    """Whether the shape is what is left of the dimensions without one of them."""
    places = [n for n, dim in enumerate(dims) if isinstance(dim, str) and is_batch_dim(dim)] or range(len(dims))
    return any(
        all(isinstance(dim, str) or dim == size for dim, size in zip([*dims[:n], *dims[n + 1 :]], shape, strict=True))
        for n in places
    )


def _of_run(vector: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    """A recorded run under the schema's names."""
    return {names.get(name, name): array for name, array in vector.items()}


def _write(request: Request, proposal: Proposal, form: normal_form.NormalForm, proof: Proof) -> Path:
    config = {
        "file": Path(request.origin).name or request.source.name,
        "sha256": _sha256(request.source),
        "tensors": understood(proposal),
        "notes": [*proposal.notes, *proof.notes],
    }
    try:
        return write_graph_bundle(
            request.models, request.name, request.version, form.graph, form.schema, proof.check, config=config,
            description=request.description, allows_non_finite=not proof.finite, initials=form.initials,
            one_by_one=proof.why if proof.one_by_one else "", tolerance=proof.tolerance,
        )  # fmt: skip
    except BundleError as error:
        raise ImportRefusedError(str(error)) from error


def check_target(models: Path, name: str, version: str) -> None:
    """Before all work. Raises ImportRefusedError."""
    try:
        checked_target(models, name, version)
    except BundleError as error:
        raise ImportRefusedError(f"{error} (--models, --name, --version)") from error


def name_of(source: str) -> str:
    """A model's name from its file's, or from module:factory. Raises ImportRefusedError."""
    stem = Path(source).stem.rpartition(":")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]
    if not NAME.fullmatch(name):
        raise ImportRefusedError(f"no name can be made of {shown(stem)}: give one with --name")
    return name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASHED_BYTES):
            digest.update(part)
    return digest.hexdigest()
