"""The process that converts: reads a Request from standard input, leaves converted.onnx, or a file `refused` with one line.

Started by convert.py, and by nobody else: what it opens may be code, and runs here.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

_FILE_BYTES_MAX = 8 << 30


def main() -> int:
    request = json.load(sys.stdin)
    _limit(request["memory_mb"])
    warnings.simplefilter("ignore")
    from engram_models.importing.errors import ImportRefusedError

    directory = Path(request["output"]).parent
    try:
        notices = _convert(request)
    except ImportRefusedError as refusal:
        (directory / "refused").write_text(f"{refusal}\n")
        return 3
    except MemoryError:
        (directory / "refused").write_text(
            f"{request['source']}: takes more than {request['memory_mb']} MB to convert\n"
        )
        return 3
    (directory / "notices").write_text("".join(f"{line}\n" for line in notices))
    return 0


def _convert(request: dict[str, Any]) -> list[str]:
    """Writes the graph; gives what the user should know."""
    source, output = request["source"], Path(request["output"])
    if request["sort"] == "file":
        from engram_models.importing.archive import checked_names, torch_sort
        from engram_models.importing.errors import ImportRefusedError

        names = checked_names(Path(source))
        if "config.json" in names and "model.weights.h5" in names:
            from engram_models.importing.keras_steps import write_step

            return write_step(Path(source), output)
        if Path(source).suffix.lower() == ".keras":
            raise ImportRefusedError(
                f"{source}: has no config.json and model.weights.h5, which a .keras file of Keras 3 has"
            )
        torch_sort(source, names)  # what is no program is refused before torch is imported, which takes seconds
    try:
        import torch  # noqa: F401
    except ImportError:
        raise _refusal(f"{source}: converting it takes PyTorch: pip install 'engram[torch]'") from None
    from engram_models.importing.torch_programs import program
    from engram_models.importing.torch_steps import write_graph

    return write_graph(program(request), request["batch_axes"], output)


def _refusal(message: str) -> Exception:
    from engram_models.importing.errors import ImportRefusedError

    return ImportRefusedError(message)


def _limit(memory_mb: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, _FILE_BYTES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    sys.exit(main())
