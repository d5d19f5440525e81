"""`engram models import`: somebody's model becomes a bundle, or is refused in words that name the flag which decides."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_models.json_text import json_text

if TYPE_CHECKING:
    from engram_models.importing.importer import Imported
    from engram_models.importing.proposal import Proposal

HELP = (
    "make a bundle of a model of your own: ONNX; or .pt2, TorchScript, .keras and module:factory, which are converted"
)
_LISTS = {  # flag: (metavar, help, parse_flags' name)
    "--state": ("IN=OUT", "the output OUT is the next value of the input IN", "states"),
    "--batch-axis": ("TENSOR=K", "the dimension K (from 0) of a tensor is the batch; none: it has none", "axes"),
    "--constant": ("TENSOR=VALUE", "an input that is the same for a whole session, such as sr=16000", "constants"),
    "--context": (
        "TENSOR=K",
        "keep the last K numbers of this input and put them before the next one's; TENSOR=OUTPUT:K feeds an input with the last K "
        "numbers of an output",
        "contexts",
    ),
    "--shape": (
        "TENSOR=AxB",
        "sizes of an input's dynamic dimensions: what one step has, without batch and context; or DIMENSION=SIZE",
        "shapes",
    ),
    "--input": ("TENSOR", "this input comes with each step, whatever its name says", "inputs"),
    "--output": ("TENSOR", "this output answers a step, also if it is a state", "outputs"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an .onnx file; or .pt2, .pt, .keras, or module:factory")
    parser.add_argument("--models", type=Path, metavar="DIR", required=True, help="directory of bundles to write to")
    parser.add_argument("--name", default="", help="the model's name (default: the file's)")
    parser.add_argument("--version", default="1", help="its version (default: 1)")
    for flag, (metavar, words, name) in _LISTS.items():
        parser.add_argument(flag, dest=name, metavar=metavar, action="append", default=[], help=words)
    parser.add_argument("--initial", type=Path, metavar="NPZ", help="initial values of states, by name (default: zero)")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="NPZ",
        help="inputs and outputs of a run of yours, [steps, ...] by name: must come out again",
    )
    parser.add_argument(
        "--example",
        type=Path,
        metavar="NPZ",
        help="for conversions: the arrays of one call, by parameter; or --shape NAME=AxB of a whole array",
    )
    parser.add_argument("--description", default="", help="a line for `engram models show`")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from engram_models.importing.errors import ImportRefusedError

    seen: list[Proposal] = []

    def show(proposal: Proposal) -> None:
        seen.append(proposal)
        if not args.json:
            _print_proposal(proposal)

    # Else the sandbox's process would run on, and the stranger's file stay in the directory of temporary files.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        imported = _import(args, show)
    except KeyboardInterrupt:
        print("engram models import: interrupted, nothing is written", file=sys.stderr)
        raise
    except ImportRefusedError as error:
        if args.json:
            print(json_text({"ok": False, "error": str(error), **_described(seen)}, indent=2))
        elif seen and seen[-1].doubts:
            _print_doubts(seen[-1])
            return 1
        print(f"engram models import: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.json:
        print(json_text({**_result(imported), **_described(seen)}, indent=2))
    else:
        _print_result(imported, args.models)
    return 0


def _import(args: argparse.Namespace, show: Callable[[Proposal], None]) -> Imported:
    from engram_models.importing.convert import converted, example_shapes, needs_conversion
    from engram_models.importing.errors import ImportRefusedError, shown
    from engram_models.importing.importer import Request, check_target, import_model, name_of

    progress = _Progress(not args.json)

    def show_below(proposal: Proposal) -> None:
        progress.clear()
        show(proposal)

    flags = {name: getattr(args, name) for _, _, name in _LISTS.values()}
    try:
        name = args.name or name_of(args.file)
        check_target(args.models, name, args.version)
        with tempfile.TemporaryDirectory(prefix="engram-import-") as folder:
            path = Path(args.file)
            if needs_conversion(args.file):
                shapes, dtypes = example_shapes(flags["shapes"])
                axes = batch_axes(flags["axes"])
                path = converted(args.file, args.example, Path(folder), shapes=shapes, dtypes=dtypes, batch_axes=axes)
                flags |= {"shapes": [], "axes": []}  # the converted file has them
            elif path.suffix.lower() != ".onnx":
                raise ImportRefusedError(
                    f"{shown(args.file)}: .onnx, .pt2, .pt, .keras or module:factory can be imported"
                )
            request = Request(
                path, args.models, name, args.version, flags, args.initial, args.verify, args.description, args.file
            )
            return import_model(request, show_below, progress.say)
    except MemoryError:
        raise ImportRefusedError("this machine has not enough memory for it") from None
    except OSError as error:
        raise ImportRefusedError(f"{error.filename or args.file}: {error.strerror}") from None
    except ImportRefusedError:
        raise
    except Exception as error:  # a file may be wrong in ways that nobody has thought of
        raise ImportRefusedError(f"{shown(args.file)} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        progress.clear()


def batch_axes(flags: list[str]) -> dict[str, int]:
    """For the conversion, which traces the model with a batch there. Raises ImportRefusedError."""
    from engram_models.importing.errors import ImportRefusedError

    axes = {}
    for flag in flags:
        name, _, axis = flag.rpartition("=")
        if not name or not (axis.isascii() and axis.isdigit()) or len(axis) > 2:
            raise ImportRefusedError(f"--batch-axis {flag}: write --batch-axis TENSOR=K")
        axes[name] = int(axis)
    return axes


class _Progress:
    """One line on a terminal that is written over; nothing elsewhere."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted and sys.stderr.isatty()
        self._length = 0

    def say(self, line: str) -> None:
        if self._wanted:
            text = line[:100]
            print(f"\r{text.ljust(self._length)}", end="", file=sys.stderr, flush=True)
            self._length = len(text)

    def clear(self) -> None:
        if self._length:
            print(f"\r{' ' * self._length}\r", end="", file=sys.stderr, flush=True)
            self._length = 0


def _print_proposal(proposal: Proposal) -> None:
    from engram_models.importing.table import table

    print("\n".join(table(proposal)))
    for note in proposal.notes:
        print(f"note: {note}")


def _print_doubts(proposal: Proposal) -> None:
    print("engram models import: nothing is written, for it is not clear:", file=sys.stderr)
    for doubt in proposal.doubts:
        print(f"  {doubt}", file=sys.stderr)


def _print_result(imported: Imported, models: Path) -> None:
    proof = imported.proof
    sizes = f"in batches of {', '.join(map(str, proof.sizes))}" if proof.sizes else "one at a time"
    print(f"\nproved: {proof.calls} calls, {proof.rows} rows {sizes}")
    print(f"batches: {batching_words(proof.one_by_one, proof.why, proof.tolerance)}")
    for note in proof.notes:
        print(f"note: {note}")
    if imported.verified is not None:
        done = imported.verified
        print(
            f"verified: {done.steps} steps of {done.rows} row{'s' * (done.rows > 1)} came out as recorded, to {done.largest:.2g}"
        )
    print(f"wrote {imported.path}\nserve it: engram serve --models {models}")


def batching_words(one_by_one: bool, why: str, tolerance: float) -> str:
    """For `import` and `show`."""
    if one_by_one:
        return f"one by one: {why}"
    return (
        f"any batch: rows differ by up to {tolerance:.2g} from what they are alone"
        if tolerance
        else "any batch: same bits"
    )


def _described(seen: list[Proposal]) -> dict[str, Any]:
    from engram_models.importing.table import as_json

    if not seen:
        return {}
    return {"tensors": as_json(seen[-1]), "doubts": seen[-1].doubts, "notes": seen[-1].notes}


def _result(imported: Imported) -> dict[str, Any]:
    proof, done = imported.proof, imported.verified
    return {
        "ok": True, "model": f"{imported.name}/{imported.version}", "path": str(imported.path),
        "batch": "one-by-one" if proof.one_by_one else "any", "why": proof.why, "tolerance": proof.tolerance,
        "verified": None if done is None else {"steps": done.steps, "rows": done.rows, "largest": done.largest},
    }  # fmt: skip
