"""Who takes part in `make bench-connections`: how each is started, where it listens, and which processes are its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from engram_service.bench.plain_onnx import lstm_graph
from engram_service.bench.workload import OUTPUT, W, weights_w, workload_w, write_w
from engram_service.local import LocalServer
from engram_service.ports import free_port
from engram_service.store.private import PrivateRedis, PrivateSettings

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("clients/python", "service", "models")
FLAGS = ("--log-level", "warning", "--log-format", "human", "--arena-slots-max", "16384")
MOSEC = "mosec==0.9.8"
START_S, STOP_S = 60.0, 20.0

# W with the same weights, written by an edition that has its own form of bundles.
WRITE = """
import sys
from pathlib import Path
import numpy, torch
from engram_models import bundle_from_torch, write_bundle
weights = {name: torch.from_numpy(values) for name, values in numpy.load(sys.argv[1]).items()}
hidden, inputs = weights["weight_hh"].shape[1], weights["weight_ih"].shape[1]
lstm, head = torch.nn.LSTM(inputs, hidden).eval(), torch.nn.Linear(hidden, len(weights["head.bias"]))
lstm.load_state_dict({f"{name}_l0": values for name, values in weights.items() if not name.startswith("head")})
head.load_state_dict({name.removeprefix("head."): weights[name] for name in ("head.weight", "head.bias")})
write_bundle(Path(sys.argv[2]), sys.argv[3], "1", bundle_from_torch(lstm, head), "W")
"""


@dataclass(frozen=True)
class Target:
    """One that can be driven. pids: the roots of its processes."""

    address: str
    pids: tuple[int, ...]
    model: str = W
    reference: Path | None = None  # None: the run's
    tls_ca: Path | None = None

    def processes(self) -> list[psutil.Process]:
        roots = [psutil.Process(pid) for pid in self.pids if psutil.pid_exists(pid)]
        return [one for root in roots for one in (root, *root.children(recursive=True))]

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of processor so far: its own, and its Redis's."""
        own = redis = 0.0
        for process in self.processes():
            times = process.cpu_times()
            if is_redis(process):
                redis += times.user + times.system
            else:
                own += times.user + times.system
        return own, redis

    def memory(self) -> int:
        """Bytes that its processes hold, without Redis."""
        return sum(one.memory_info().rss for one in self.processes() if not is_redis(one))


def is_redis(process: psutil.Process) -> bool:
    return any(name in process.name() for name in ("redis", "valkey"))


def write_weights(scratch: Path) -> Path:
    """W for those that read no bundle: weights.npz and, beside it, w.onnx."""
    np.savez(scratch / "weights.npz", **weights_w())  # type: ignore[arg-type]
    (scratch / "w.onnx").write_bytes(lstm_graph(weights_w(), workload_w().schema))
    return scratch / "weights.npz"


@contextmanager
def server(
    scratch: Path, name: str, flags: tuple[str, ...] = (), redis: str = "", tls: bool = False
) -> Iterator[Target]:
    """This checkout's."""
    bundle = write_w(scratch / f"{name}-models")
    own, ca = [*FLAGS, *flags], None
    if redis:
        own += ["--redis-url", redis]
    if tls:
        ca, key = certificate(scratch)
        own += ["--tls-cert", str(ca), "--tls-key", str(key)]
    pids = (redis_pid(redis),) if redis else ()
    with LocalServer(scratch / name, bundle.parent.parent, tuple(own)) as running:
        yield Target(running.address, tuple(pid for pid in (running.pid, *pids) if pid), tls_ca=ca)


@contextmanager
def older(scratch: Path, tree: Path, weights: Path) -> Iterator[Target]:
    """Another checkout's, in this Python."""
    path = os.pathsep.join(str(tree.resolve() / package) for package in PACKAGES)
    variables = {"PYTHONPATH": path, "XDG_CACHE_HOME": str(scratch / "older-cache")}
    models = scratch / "older-models"
    if not models.exists():
        command = [sys.executable, "-c", WRITE, str(weights), str(models), W]
        subprocess.run(command, check=True, env={**os.environ, **variables}, cwd=scratch, stdout=subprocess.DEVNULL)
    with LocalServer(scratch / "older", models, FLAGS, variables) as running:
        yield Target(running.address, (running.pid,))


@contextmanager
def prototype(scratch: Path, built: Path, durable: bool) -> Iterator[Target]:
    """The prototype of the native wire, anew each time, for it never uses a session's place again."""
    store, number = None, free_port()
    command = [sys.executable, str(built / "server_onnx.py"), "--mode", "B" if durable else "A", "--port", str(number)]
    command += ["--uv", "1" if importlib.util.find_spec("uvloop") else "0"]
    pids: tuple[int, ...] = ()
    if durable:
        shutil.rmtree(scratch / "prototype", ignore_errors=True)
        store = PrivateRedis(PrivateSettings(scratch / "prototype"))
        store.start()
        command += ["--redis", store.url.removeprefix("unix://")]
        pids = (redis_pid(store.url),)
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                while (line := process.stdout.readline()).strip() != "ready":
                    if not line:
                        raise SystemExit("the prototype did not start")
                yield Target(f"127.0.0.1:{number}", (process.pid, *pids), "w", built / "ref.bin")
            finally:
                process.terminate()
                process.communicate()  # it says its own figures at the end
    finally:
        if store:
            store.stop()


@contextmanager
def mosec(scratch: Path, python: Path, weights: Path, kind: str, batch: int) -> Iterator[Target]:
    number = free_port()
    command = [str(python), str(ROOT / "tools" / "mosec_cell.py"), "--address", "127.0.0.1", "--port", str(number),
               "--capacity", "65536", "--timeout", "60000", "--log-level", "warning"]  # fmt: skip
    cell = {"WEIGHTS": str(weights), "GRAPH": str(weights.with_name("w.onnx")), "KIND": kind, "BATCH": str(batch)}
    variables = {**os.environ, **{f"MOSEC_CELL_{name}": value for name, value in cell.items()}, "OMP_NUM_THREADS": "1"}
    with (scratch / f"mosec-{kind}.log").open("ab") as log:
        process = subprocess.Popen(command, env=variables, cwd=scratch, stdout=log, stderr=log)
    try:
        wait_for(number, process)
        yield Target(f"127.0.0.1:{number}", (process.pid,))
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # its workers may hang
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()
            process.wait()


def mosec_python(directory: Path) -> Path:
    """The Python of a virtual environment with mosec in it, made if it is not there; all else it has from this one."""
    python = directory.resolve() / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    if subprocess.run([str(python), "-c", "import mosec"], capture_output=True, check=False).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", MOSEC], check=True)
    site = sysconfig.get_path("purelib", vars={"base": str(directory.resolve())})
    Path(site, "bench.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@contextmanager
def echo() -> Iterator[Target]:
    """The native wire with nothing behind it."""
    command = [sys.executable, str(ROOT / "tools" / "wire_echo.py"), "--outputs", str(OUTPUT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Target(process.stdout.readline().strip(), (process.pid,))
        process.communicate()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{process.args!r} did not start") from None
            time.sleep(0.05)


def redis_pid(url: str) -> int:
    """Of a Redis on this machine; 0: it is elsewhere."""
    import redis

    with redis.Redis.from_url(url) as client:
        pid = int(client.info("server")["process_id"])
    return pid if psutil.pid_exists(pid) and is_redis(psutil.Process(pid)) else 0


def certificate(scratch: Path) -> tuple[Path, Path]:
    """One for localhost that signs itself, and its key."""
    cert, key = scratch / "tls.pem", scratch / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key),
         "-out", str(cert), "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
         "-addext", "basicConstraints=critical,CA:FALSE"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def has_flag(flag: str) -> bool:
    """Whether this checkout's `engram serve` knows it."""
    command = [sys.executable, "-m", "engram", "serve", "--help"]
    return flag in subprocess.run(command, capture_output=True, text=True, check=False).stdout
