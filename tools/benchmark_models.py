"""`make bench-models`: the steps of our cells as ONNX graphs beside torch's, written to docs/benchmarks/models.md and .json.

Each shipped bundle, and LSTMs and GRUs of some sizes, at batches of 1, 64 and 512 rows, on one thread: torch's recorded step
(what the CPU server ran before it had graphs) and the graph on ONNX Runtime, in turn, a few milliseconds each, so that
whatever else the machine does meets both. Takes half a minute; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from engram._json import json_text
from engram_models import GRU, LSTM, Cell, Repository, load_cell, shipped_models_dir
from engram_models.graphs import step_graph
from engram_service.bench.report import machine

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
BATCHES = (1, 64, 512)
BURST_S = 0.004
STEPS_BEFORE = 3
GOALS = {"shipped": 1.0, "lstm and gru": 1.8}
SAID = ("cores", "processor", "memory", "system", "python", "engram", "torch", "numpy")

Step = Callable[..., tuple[Any, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each model and batch (default: 0.8)")
    parser.add_argument("--name", default="models", help="of the files (default: models)")
    args = parser.parse_args()
    busy = os.getloadavg()[0]
    torch.set_num_threads(1)
    rows = [row for name, cell in cells().items() for row in measured(name, cell, args.seconds)]
    described = {key: value for key, value in machine().items() if key in SAID}
    described |= {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    described["load average"] = f"{busy:.1f} before it began; niceness {os.nice(0)}"
    found = {"machine": described, "date": f"{datetime.now(UTC):%Y-%m-%d}", "goals": GOALS, "models": rows}
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    (DIRECTORY / f"{args.name}.json").write_text(json_text(found, indent=2) + "\n")
    text = page(found)
    (DIRECTORY / f"{args.name}.md").write_text(text)
    print(text)
    return 0


def cells() -> dict[str, Cell]:
    """The shipped models, then sizes that others have been measured at."""
    torch.manual_seed(0)
    refs, _ = Repository([shipped_models_dir()]).scan()
    found = {ref.name: load_cell(ref.path) for ref in refs}
    found |= {"LSTM 8-96": LSTM(8, 96), "LSTM 64-256": LSTM(64, 256), "GRU 64-256": GRU(64, 256)}
    return {name: cell.eval().requires_grad_(False) for name, cell in found.items()}


def measured(name: str, cell: Cell, seconds: float) -> list[dict[str, Any]]:
    say(name)
    session = graph_session(cell)
    recorded = torch_step(cell, example(cell, 32))
    rows = []
    for batch in BATCHES:
        tensors = example(cell, batch)
        names = [tensor.name for tensor in session.get_inputs()]
        feed = {key: tensor.numpy() for key, tensor in zip(names, tensors, strict=True)}
        difference = max(
            float((np.abs(ours - theirs.numpy()) / np.maximum(1, np.abs(ours))).max())
            for ours, theirs in zip(session.run(None, feed), recorded(*tensors), strict=True)
        )
        theirs_us, ours_us = in_turn(
            lambda tensors=tensors: recorded(*tensors), lambda feed=feed: session.run(None, feed), seconds
        )
        rows.append(
            {"model": name, "kind": cell.kind, "batch": batch, "torch_us": theirs_us, "graph_us": ours_us,
             "ratio": theirs_us / ours_us, "difference": difference}
        )  # fmt: skip
    return rows


def example(cell: Cell, batch: int) -> list[Tensor]:
    """An input, and states as they are after a few steps from the start."""
    generator = torch.Generator().manual_seed(batch)
    noise = torch.randn(batch, STEPS_BEFORE + 1, *cell.input.shape, generator=generator)
    xs = cell.inputs_like(noise)
    with torch.no_grad():
        _, state = cell.sequence(xs[:, 1:])
    return [xs[:, 0].contiguous(), *(tensor.contiguous() for tensor in state)]


def torch_step(cell: Cell, tensors: list[Tensor]) -> Step:
    """The cell's step recorded by torch, which leaves Python out of it."""

    def step(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, after = cell(x, cell.state_type(*state))
        return (y, *after)

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        recorded = torch.jit.trace(step, tuple(tensors), check_trace=False)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            out = recorded(*values)
        return out if isinstance(out, tuple) else (out,)

    return run


def graph_session(cell: Cell) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = step_graph(cell).SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def in_turn(one: Callable[[], object], other: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Microseconds of processor time a call of each, the medians of bursts that take turns."""
    works = (one, other)
    calls = [max(1, round(BURST_S / _seconds(work, 3))) for work in works]
    took: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not took[1]:
        for work, count, seen in zip(works, calls, took, strict=True):
            seen.append(1e6 * _seconds(work, count))
    return statistics.median(took[0]), statistics.median(took[1])


def _seconds(work: Callable[[], object], count: int) -> float:
    """Of this thread, which does all the work: what another process takes of the time is not counted."""
    begun = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - begun) / count


def page(found: dict[str, Any]) -> str:
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in found["models"]:
        by_model.setdefault(row["model"], []).append(row)
    worst = max(row["difference"] for row in found["models"])
    lines = [
        "# Our cells as ONNX graphs", "",
        f"Written by `make bench-models` on {found['date']}, one thread:", "",
        *(f"- {key}: {value}" for key, value in found["machine"].items()), "",
        "Microseconds of processor time a step of a whole batch: torch's recorded step, the graph on ONNX Runtime, and how",
        "many times as fast that is. Medians of short bursts that took turns. The rows' states are given and taken as arrays;",
        "gathering them from an arena and scattering them back is in neither.",
        f"The largest difference between the two is {worst:.0e}.", "",
        "| model |" + "".join(f" {batch}: torch | graph | x |" for batch in BATCHES),
        "|---|" + "---:|---:|---:|" * len(BATCHES),
        *(
            f"| {name} |" + "".join(f" {r['torch_us']:,.0f} | {r['graph_us']:,.0f} | {r['ratio']:.2f} |" for r in rows)
            for name, rows in by_model.items()
        ), "",
    ]  # fmt: skip
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
