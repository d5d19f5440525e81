"""W behind mosec, with the sessions' states in its process: volatile, and what benchmark_connections.py compares with.

Runs in an environment with mosec, NumPy, and torch or ONNX Runtime. A post is a session's number, 8 bytes, and its input; the
answer is the output. Figures of the machine are for mosec's own flags; --timeout and --capacity must be generous.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from mosec import Server, Worker

INPUT, HIDDEN = 64, 256
SLOTS = 1 << 16
ROW = np.dtype([("session", "<u8"), ("input", "<f4", INPUT)])
# Of a worker process, which mosec starts anew: weights (.npz, named as torch names them) and the graph of the same cell.
WEIGHTS, GRAPH, KIND = (os.environ.get(f"MOSEC_CELL_{name}", "") for name in ("WEIGHTS", "GRAPH", "KIND"))
BATCH, WAIT_MS = int(os.environ.get("MOSEC_CELL_BATCH", "1024")), 1


class Cell(Worker):
    """One process: states of all sessions as two arrays, a row each."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._slots: dict[int, int] = {}
        self._compute = in_torch() if KIND == "torch" else in_onnx()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        rows = np.frombuffer(b"".join(data), ROW)
        slots = self._slots
        places = np.array([slots.setdefault(session, len(slots)) for session in rows["session"].tolist()])
        outputs = self._compute(places, np.ascontiguousarray(rows["input"]))
        packed, width = outputs.tobytes(), 4 * outputs.shape[1]
        return [packed[start : start + width] for start in range(0, len(packed), width)]


def in_torch() -> Any:
    import torch

    torch.set_num_threads(1)
    weights = {name: torch.from_numpy(values) for name, values in np.load(WEIGHTS).items()}
    cell, head = torch.nn.LSTMCell(INPUT, HIDDEN), torch.nn.Linear(HIDDEN, len(weights["head.bias"]))
    cell.load_state_dict({name: values for name, values in weights.items() if not name.startswith("head")})
    head.load_state_dict({name.removeprefix("head."): weights[name] for name in ("head.weight", "head.bias")})
    hs, cs = (torch.zeros(SLOTS, HIDDEN) for _ in range(2))

    @torch.inference_mode()
    def compute(places: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(places)
        h, c = cell(torch.from_numpy(inputs), (hs[at], cs[at]))
        hs[at], cs[at] = h, c
        outputs: np.ndarray = head(h).numpy()
        return outputs

    return compute


def in_onnx() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(GRAPH, options, ["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    hs, cs = (np.zeros((SLOTS, HIDDEN), np.float32) for _ in range(2))

    def compute(places: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        y, hs[places], cs[places] = session.run(None, dict(zip(names, (inputs, hs[places], cs[places]), strict=True)))
        outputs: np.ndarray = y
        return outputs

    return compute


if __name__ == "__main__":
    server = Server()
    server.append_worker(Cell, num=1, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
