"""Digests by which models are told apart: of a bundle, and of its graph. For bundle.py and bundle_writing.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from engram_models.spec import Schema, TensorSpec
from engram_models.tensor_file import Tensors

IMPORTED = "onnx"  # the kind of models that are their graph, and no cell of ours


def fingerprint(kind: str, config: Mapping[str, Any], schema: Schema, graph: str, tensors: Tensors) -> str:
    """BLAKE2b over schema, equations and numbers, 32 hex digits.

    A cell's equations are its kind and config; a model that is its graph has them there. What computes it does not matter.
    """
    digest = new_digest()
    tables = [[spec_table(spec) for spec in specs] for specs in (schema.inputs, schema.outputs, schema.state)]
    equations: list[Any] = [kind, graph] if kind == IMPORTED else [kind, dict(config)]
    digest.update(json.dumps([*equations, tables], sort_keys=True).encode())
    for key in sorted(key for key in tensors if not key.startswith("check.")):
        digest.update(f"{key} {tensors[key].text}".encode())
        # In place: to copy a large tensor stops every other thread of the process.
        digest.update(np.ascontiguousarray(tensors[key].values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def graph_digest(graph: bytes) -> str:
    digest = new_digest()
    digest.update(graph)
    return digest.hexdigest()


def new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def spec_table(spec: TensorSpec) -> dict[str, Any]:
    table: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
    if spec.role:
        table |= {"role": spec.role, "initial": float(spec.initial)}
    return {**table, "shared": True} if spec.shared else table
