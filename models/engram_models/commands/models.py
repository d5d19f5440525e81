"""`engram models list|show|check|import`: what bundles there are, what one is, and whether one can be served here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_models.commands import check_cell, import_model
from engram_models.json_text import json_text

if TYPE_CHECKING:
    from engram_models.bundle import Bundle, BundleRef
    from engram_models.spec import TensorSpec

HELP = "the models on disk: list them, show one, check whether one can be served"
_BATCH_MAX = 1024


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every version of every model")
    show = actions.add_parser("show", help="everything about one version")
    check = actions.add_parser("check", help="load one version, verify it, and find how it may be batched here")
    import_model.configure(actions.add_parser("import", help=import_model.HELP))
    for action in (show, check):
        action.add_argument(
            "model", metavar="MODEL", nargs="?" if action is check else None,
            help="NAME (the latest version), NAME/VERSION, or the path of a bundle",
        )  # fmt: skip
    check_cell.configure(check)
    check.add_argument(
        "--batch-max", type=int, default=_BATCH_MAX, help=f"largest batch to try (default: {_BATCH_MAX})"
    )
    check.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    for action in (listing, show, check):
        action.add_argument(
            "--models", type=Path, metavar="DIR", help="directory of bundles (default: the shipped ones)"
        )
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from engram_models.bundle import BundleError

    if args.action == "import":
        return import_model.run(args)
    if args.action == "check" and args.cell and not args.model:
        return check_cell.run(args)
    action = {"list": _list, "show": _show, "check": _check}[args.action]
    try:
        return action(args)
    except BundleError as error:
        if args.json:
            print(json_text({"ok": False, "error": str(error)}))
        print(f"engram models {args.action}: {error}", file=sys.stderr)
        return 1


def _list(args: argparse.Namespace) -> int:
    refs, errors = _scan(args.models)
    latest = {ref.name: ref.version for ref in refs}  # ascending: the last one stays
    rows = [_row(ref, latest, errors) for ref in refs]
    if args.json:
        print(json_text({"models": rows, "errors": errors}, indent=2))
    else:
        _table(rows)
    for error in errors:
        print(f"engram models list: {error}", file=sys.stderr)
    return 1 if errors else 0


def _row(ref: BundleRef, latest: dict[str, str], errors: list[str]) -> dict[str, Any]:
    """One line of the list. A bundle that does not load is listed too, with dashes, and its error is added to `errors`."""
    from engram_models.bundle import BundleError, load_bundle

    row: dict[str, Any] = {"name": ref.name, "version": ref.version, "latest": latest[ref.name] == ref.version}
    try:
        bundle = load_bundle(ref.path)
    except BundleError as error:
        errors.append(str(error))
        return row
    described = _described(bundle)
    return row | {key: described[key] for key in ("kind", "inputs", "outputs", "state_bytes", "fingerprint")}


def _show(args: argparse.Namespace) -> int:
    from engram_models.fingerprints import IMPORTED

    bundle = _load(args)
    described = _described(bundle)
    if args.json:
        print(json_text(described, indent=2))
        return 0
    config = [f"{key} {item}" for key, value in described["config"].items() for item in _items(value)]
    inputs, outputs, state = ([_spec_line(spec, bundle) for spec in specs] for specs in _specs(bundle))
    lines = {
        **described,
        "inputs": inputs,
        "outputs": outputs,
        "config": config if bundle.kind == IMPORTED else ", ".join(config),
        "state": state,
        "batch": import_model.batching_words(bundle.one_by_one, bundle.why, bundle.tolerance),
    }
    for key in ("tolerance", "parameters") if bundle.kind == IMPORTED else ("tolerance",):
        del lines[key]  # said in words, or not counted
    for key, value in lines.items():
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            print(f"{key if number == 0 else '':<18} {item}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from engram_models.bundle import BundleError

    if args.batch_max < 1:
        raise BundleError(f"--batch-max {args.batch_max}: at least 1")
    if not args.model:
        raise BundleError("name a MODEL, or a cell with --cell")
    if args.cell:
        _register(args.cell)
    bundle = _load(args)
    on_torch = args.device != "cpu" or not bundle.graph
    batches = _examined_on_torch(bundle, args) if on_torch else _examined(bundle, args.batch_max)
    found = {
        "ok": True, "model": bundle.reference, "fingerprint": bundle.fingerprint, "check_vector": "passed", **batches,
        "batch_max": args.batch_max, "device": args.device, "runtime": "torch" if on_torch else "ONNX Runtime",
    }  # fmt: skip
    if args.json:
        print(json_text(found, indent=2))
        return 0
    print(f"{found['model']}  fingerprint {bundle.fingerprint}\ncheck vector  passed")
    print(f"batches       {found['batches']} (tried up to {args.batch_max}, {args.device}, {found['runtime']})")
    return 0


def _register(name: str) -> None:
    """The plug-in that the bundle is of."""
    from engram_models.bundle import BundleError
    from engram_models.plug_ins import PlugInError, register_cells

    try:
        register_cells([name])
    except PlugInError as error:
        raise BundleError(str(error)) from error


def _examined(bundle: Bundle, batch_max: int) -> dict[str, Any]:
    from engram_models.examination import examine

    found = examine(bundle, batch_max)
    return {"batch_floor": found.floor, "batches": found.batching.text}


def _examined_on_torch(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    from engram_models.bundle import BundleError

    try:
        from engram_models.cell_bundles import CellStep, load_cell
    except ImportError as error:
        install = "torch is not installed, and this needs it: pip install 'engram[torch]'"
        raise BundleError(f"{bundle.reference} on {args.device}: {install}") from error
    from engram_models.batching import Batching
    from engram_models.probe import batch_floor

    floor = batch_floor(CellStep(load_cell(bundle, args.device)), bundle.schema, bundle.check, args.batch_max)
    return {"batch_floor": floor, "batches": Batching(floor, 1).text}


def _scan(directory: Path | None) -> tuple[list[BundleRef], list[str]]:
    from engram_models.bundle import Repository, shipped_models_dir

    return Repository([directory or shipped_models_dir()]).scan()


def _load(args: argparse.Namespace) -> Bundle:
    from engram_models.bundle import load_bundle

    return load_bundle(_find(args.model, args.models))


def _find(model: str, directory: Path | None) -> Path:
    from engram_models.bundle import BundleError

    refs, errors = _scan(directory)
    name, _, version = model.partition("/")
    matching: Sequence[BundleRef] = [ref for ref in refs if ref.name == name and version in ("", ref.version)]
    if matching:
        return matching[-1].path
    if (Path(model) / "model.toml").exists():
        return Path(model).resolve()
    known = ", ".join(sorted({f"{ref.name}/{ref.version}" for ref in refs})) or "; ".join(errors) or "none"
    raise BundleError(f"no model {model!r} and no bundle at that path; there are: {known}")


def _described(bundle: Bundle) -> dict[str, Any]:
    inputs, outputs, state = _specs(bundle)
    weights = bundle.read_weights().values()
    return {
        "name": bundle.name, "version": bundle.version, "kind": bundle.kind, "description": bundle.description,
        "fingerprint": bundle.fingerprint, "inputs": [{"name": s.name, **_shape(s)} for s in inputs],
        "outputs": [{"name": s.name, **_shape(s)} for s in outputs],
        "state": [{"name": s.name, **_shape(s), "role": s.role, "initial": s.initial, "shared": s.shared} for s in state],
        "state_bytes": bundle.state_nbytes, "generates": bundle.schema.generates,
        "allows_non_finite": bundle.allows_non_finite,
        "batch": f"{bundle.batch}: {bundle.why}" if bundle.why else bundle.batch,
        "tolerance": bundle.tolerance,
        "parameters": sum(tensor.values.size for tensor in weights), "config": dict(bundle.config), "path": str(bundle.path),
    }  # fmt: skip


def _specs(bundle: Bundle) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec], Sequence[TensorSpec]]:
    return bundle.schema.inputs, bundle.schema.outputs, bundle.schema.state


def _shape(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


def _spec_line(spec: TensorSpec, bundle: Bundle) -> str:
    line = f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}"
    if not spec.role:
        return line
    initial = "an array" if spec.name in bundle.initials else f"{spec.initial:.10g}"
    shared = ", shared: only sessions with equal values share a call" if spec.shared else ""
    return f"{line}, {spec.role}, {'by default' if spec.role == 'constant' else 'initially'} {initial}{shared}"


def _items(value: Any) -> Sequence[Any]:
    """Of an import, how each tensor was understood; one of a cell's sizes."""
    texts = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return value if texts else [] if value == [] else [value]


def _table(rows: Sequence[dict[str, Any]]) -> None:
    header = ("NAME", "VERSION", "KIND", "INPUT", "OUTPUT", "STATE BYTES", "FINGERPRINT")
    cells: list[tuple[str, ...]] = [header]
    for row in rows:
        sizes = [_sizes(row[key]) if key in row else "-" for key in ("inputs", "outputs")]
        version = f"{row['version']} (latest)" if row["latest"] else str(row["version"])
        rest = (str(row.get("state_bytes", "-")), str(row.get("fingerprint", "does not load")))
        cells.append((str(row["name"]), version, str(row.get("kind", "-")), *sizes, *rest))
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


def _sizes(specs: Sequence[dict[str, Any]]) -> str:
    return " + ".join("x".join(map(str, spec["shape"])) or "1" for spec in specs)
