"""The yardstick: the server an engineer writes in a day to serve a recurrent model with its state in Redis.

Unary gRPC; for each call GET the state, run torch on the one row, SET the new state, reply. It comes in the two styles that
one would try, a thread pool and asyncio: the first answers one caller sooner, the second many callers. Nothing in it is
made slow on purpose: raw bytes for messages and state, no JSON, inference mode. It is what `engram bench` compares Engram
with. It has none of Engram's promises: two calls of one session at once lose a step, and a lost reply applies a step twice
when it is tried again.

    request   16 bytes session id + float32[64]      reply   float32[16]
    Redis     plain:<session id> -> float32[256] h + float32[256] c

    python tests/yardstick/plain_server.py --style asyncio --listen 127.0.0.1:0 --redis-url redis://127.0.0.1:6379
prints "listening PORT" when it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import numpy as np
import redis
import redis.asyncio
import torch
from torch import nn

INPUT, HIDDEN, OUTPUT = 64, 256, 16
SEED = 20240607  # the weights of engram_service/bench/workload.py
ID_BYTES = 16
METHOD = "/plain.Plain/Step"


class Model(nn.Module):
    """One LSTM and a linear head, one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        generator, bound = np.random.default_rng(SEED), HIDDEN**-0.5
        shapes = {
            "weight_ih": (4 * HIDDEN, INPUT),
            "weight_hh": (4 * HIDDEN, HIDDEN),
            "bias_ih": (4 * HIDDEN,),
            "bias_hh": (4 * HIDDEN,),
        }
        shapes |= {"weight": (OUTPUT, HIDDEN), "bias": (OUTPUT,)}
        made = {
            name: torch.from_numpy(generator.uniform(-bound, bound, s).astype(np.float32)) for name, s in shapes.items()
        }
        self.lstm = nn.LSTM(INPUT, HIDDEN)  # for who checks whole sequences
        self.cell = nn.LSTMCell(INPUT, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUTPUT)
        self.head.load_state_dict({name: made.pop(name) for name in ("weight", "bias")})
        self.cell.load_state_dict(made)
        self.lstm.load_state_dict({f"{name}_l0": values for name, values in made.items()})

    def step(self, x: np.ndarray, state: bytes | None) -> tuple[bytes, bytes]:
        """x float32[64] and the stored state (None: a new session) to the output and the new state, as bytes."""
        flat = np.zeros(2 * HIDDEN, np.float32) if state is None else np.frombuffer(state, np.float32).copy()
        h, c = torch.from_numpy(flat).view(2, 1, HIDDEN)
        with torch.inference_mode():
            h, c = self.cell(torch.from_numpy(x).view(1, INPUT), (h, c))
            out = self.head(h)
        return out.numpy().tobytes(), h.numpy().tobytes() + c.numpy().tobytes()


def parts(request: bytes) -> tuple[bytes, np.ndarray]:
    """The key of the session and its input."""
    if len(request) != ID_BYTES + 4 * INPUT:
        raise ValueError("a session id of 16 bytes, then 64 float32")
    return b"plain:" + request[:ID_BYTES], np.frombuffer(request, np.float32, offset=ID_BYTES).copy()


def method(step: Callable[..., Any]) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler("plain.Plain", {"Step": grpc.unary_unary_rpc_method_handler(step)})


def serve_threads(listen: str, redis_url: str, workers: int) -> None:
    model, store = Model(), redis.Redis.from_url(redis_url)

    def step(request: bytes, context: grpc.ServicerContext) -> bytes:
        key, x = parts(request)
        output, state = model.step(x, store.get(key))
        store.set(key, state)
        return output

    server = grpc.server(ThreadPoolExecutor(workers))
    server.add_generic_rpc_handlers((method(step),))
    port = server.add_insecure_port(listen)
    server.start()
    print(f"listening {port}", flush=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    server.stop(1).wait()


async def serve_asyncio(listen: str, redis_url: str) -> None:
    torch.set_num_threads(1)
    model, store = Model(), redis.asyncio.Redis.from_url(redis_url)

    async def step(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        key, x = parts(request)
        output, state = model.step(x, await store.get(key))
        await store.set(key, state)
        return output

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((method(step),))
    port = server.add_insecure_port(listen)
    await server.start()
    print(f"listening {port}", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(1)
    await store.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=("threads", "asyncio"), default="threads")
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--workers", type=int, default=4, help="of the thread pool")
    args = parser.parse_args()
    if args.style == "threads":
        serve_threads(args.listen, args.redis_url, args.workers)
    else:
        asyncio.run(serve_asyncio(args.listen, args.redis_url))


if __name__ == "__main__":
    main()
