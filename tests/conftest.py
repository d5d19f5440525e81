"""Real servers for tests: `engram serve` as a subprocess, with a private Redis in a directory of its own; and a Redis to mistreat.

With `--redis cluster` each of these is a Redis Cluster of three primaries. Tests that make servers have them on the extension's wire, those
marked `promise` or `both_wires` on each of the two; `--wire` says otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import psutil
import pytest
import redis
from hypothesis import HealthCheck, settings

from engram_models import shipped_models_dir
from engram_service.ports import free_port

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from forks import Forked, Forks
from redises import RedisCluster, RedisProcess

START_S = 60.0
_PATIENT = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
STOP_S = 30.0

# Python runs this in each of the server's processes before anything else, and not in those that examine models.
_FAULTS = "import sys\nif {'serve', 'engram_service.data_process'} & set(sys.orig_argv):\n"
_Redis = TypeVar("_Redis", RedisProcess, RedisCluster)
_BUILT = importlib.util.find_spec("engram_native") is not None
_NOT_BUILT = "the extension is not built, and with it the native wire: make install builds it where cargo is"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--redis",
        choices=("single", "cluster"),
        default="single",
        help="what the servers of the tests keep sessions in",
    )
    parser.addoption(
        "--wire",
        choices=("native", "python", "both"),
        help="the wire of the servers of all tests; not given: native, and tests of promises on both",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: children would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "single_redis(why): not with --redis cluster")
    ServerProcess.on_cluster = config.getoption("--redis") == "cluster"
    # How long an example takes is the machine's load; what may not take long has an assertion of its own.
    settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What makes servers runs on a wire, or on each. Where it runs on one alone, its id does not name it."""
    if "server_wire" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--wire")
    marked = any(metafunc.definition.get_closest_marker(name) for name in ("promise", "both_wires"))
    if asked == "both" or (asked is None and marked):
        missing = () if _BUILT else (pytest.mark.skip(reason=_NOT_BUILT),)
        wires = [pytest.param("native", id="native", marks=missing), pytest.param("python", id="python")]
    else:
        wires = [pytest.param(asked or ("native" if _BUILT else "python"), id=pytest.HIDDEN_PARAM)]
    metafunc.parametrize("server_wire", wires, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("server_wire", item.config.getoption("--wire")) == "python":
        os.environ["ENGRAM_WIRE"] = "python"
    else:
        os.environ.pop("ENGRAM_WIRE", None)  # auto: the native one, where it is
    if (marker := item.get_closest_marker("single_redis")) and ServerProcess.on_cluster:
        pytest.skip(f"not on a Redis Cluster: {marker.args[0]}")


class ServerProcess:
    """`engram serve` on fixed ports; may be stopped, killed and started again on the same ports and data."""

    on_cluster = False  # sessions are in a Redis Cluster, unless the flags say where
    _forks: Forks | None = None  # of all servers of this process

    def __init__(self, directory: pathlib.Path, *flags: str) -> None:
        self.directory = directory
        # Every start proves every bundle: a server with models of its own is spared the shipped ones.
        own_alone = "--models" in flags and "--shipped-models" not in flags
        self.flags = (*flags, "--shipped-models", "false") if own_alone else flags
        self.port, self.http_port = free_port(), free_port()
        self.log = directory / "server.log"
        self.faults = ""  # Python that runs in its processes before they serve: to have a part fail on demand
        self.credentials: grpc.ChannelCredentials | None = None  # where it speaks TLS
        self.prefix: tuple[str, ...] = ()  # the command that runs it, under limits say
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._told = False  # to end
        self._cluster = RedisCluster(directory / "cluster") if self.on_cluster and "--redis-url" not in flags else None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def redis(self) -> Any:
        """A client of the Redis or cluster that is its own."""
        if self._cluster is not None:
            return self._cluster.client
        return redis.Redis(unix_socket_path=str(self.directory / "data" / "redis.sock"))

    def ready(self) -> str:
        """What its /readyz says, whether it is ready or not."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/readyz", timeout=10) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return "not there"

    def series(self) -> dict[str, float]:
        """What its /metrics says, by name and labels as they are written there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def wire(self) -> str:
        """Which one it uses."""
        (info,) = (name for name in self.series() if name.startswith("engram_build_info"))
        return info.partition('wire="')[2].partition('"')[0]

    @property
    def pid(self) -> int:
        """Of the manager."""
        assert self._process is not None
        return self._process.pid

    @property
    def data_pid(self) -> int:
        """Of the data process."""
        children = psutil.Process(self.pid).children()
        return next(one.pid for one in children if "engram_service.data_process" in one.cmdline())

    @property
    def pids(self) -> list[int]:
        """Of its processes."""
        return [self.pid, self.data_pid]

    def resident_nbytes(self) -> int:
        """Memory of its processes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids)

    def start(self) -> ServerProcess:
        """Starts it and waits until it answers."""
        flags = self.flags
        if self._cluster is not None:
            if not self._cluster.processes:
                self._cluster.start()
            flags = ("--redis-url", self._cluster.url, *flags)
        arguments = [
            "serve", "--listen", self.address, "--http", f"127.0.0.1:{self.http_port}", "--data-dir", str(self.directory / "data"),
            *flags,
        ]  # fmt: skip
        self._told = False
        self._process = self._begin(arguments, {**os.environ, "OMP_NUM_THREADS": "2"})
        self._wait_ready()
        return self

    def _begin(self, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes] | Forked:
        cls, own = type(self), environment
        if self.faults:
            folder = self.directory / "faults"
            folder.mkdir(exist_ok=True)
            (folder / "sitecustomize.py").write_text(_FAULTS + textwrap.indent(self.faults, "    "))
            own = environment | {"PYTHONPATH": os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])}
        if not self.prefix:
            cls._forks = cls._forks or Forks()
            if cls._forks.like(environment):
                return cls._forks.serve(arguments, self.log, own, self.faults)
        with self.log.open("ab") as log:
            command = [*self.prefix, sys.executable, "-m", "engram", *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log, env=own)

    def stop(self) -> int:
        """SIGTERM, as an operator stops it; its exit code."""
        assert self._process is not None
        if self._process.poll() is None and not self._told:  # a second one would end it at once
            self.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not stop within {STOP_S} s\n{self.tail()}") from None

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """To the manager, as an operator does it; a server is stopped (SIGSTOP) and goes on as a whole."""
        assert self._process is not None
        for pid in self.pids if number in (signal.SIGSTOP, signal.SIGCONT) else [self.pid]:
            os.kill(pid, number)
        self._told |= number in (signal.SIGTERM, signal.SIGINT)

    def ended(self) -> int:
        """Waits until it has ended by itself; its exit code."""
        assert self._process is not None
        return self._process.wait(STOP_S)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """kill -9, then a start on the same ports and data."""
        self.kill()
        self.start()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        with self.channel() as channel:
            call = channel.unary_unary("/engram.v1.EngramService/GetServer")
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise AssertionError(f"the server ended with {self._process.returncode}\n{self.tail()}")
                if not self._listens():  # gRPC would not look again for a while
                    time.sleep(0.01)
                    continue
                try:
                    call(b"", timeout=1.0)
                    return
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                        return  # it is there, and wants to know who asks
                    time.sleep(0.05)
        raise AssertionError(f"the server did not answer within {START_S} s\n{self.tail()}")

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.address.rpartition(":")[0].strip("[]"), self.port), 1.0).close()
            return True
        except OSError:
            return False

    def channel(self) -> grpc.Channel:
        """A new connection to it."""
        if self.credentials is not None:
            return grpc.secure_channel(self.address, self.credentials, options=_PATIENT)
        return grpc.insecure_channel(self.address, options=_PATIENT)

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()
        if self._cluster is not None:
            self._cluster.stop()


class Certificates:
    """Certificates for 127.0.0.1, each signed by a CA that is made when it is first named."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory

    def ca(self, name: str) -> pathlib.Path:
        """A CA's certificate."""
        cert = self.directory / f"{name}.pem"
        if not cert.exists():
            self._openssl(
                "req",
                "-x509",
                *_NEW_KEY,
                "-keyout",
                f"{name}.key",
                "-out",
                cert.name,
                "-days",
                "2",
                "-subj",
                f"/CN={name}",
            )
        return cert

    def issue(
        self,
        name: str,
        ca: str = "ca",
        good_for: str = "IP:127.0.0.1,DNS:localhost",
        dates: tuple[str, str] | None = None,
    ) -> tuple[pathlib.Path, pathlib.Path]:
        """A certificate and its key, for two days from now or between two dates (YYYYMMDDhhmmssZ)."""
        signer, cert, key = self.ca(ca), self.directory / f"{name}.pem", self.directory / f"{name}.key"
        (self.directory / "names").write_text(f"subjectAltName={good_for}")
        self._openssl("req", *_NEW_KEY, "-keyout", key.name, "-out", f"{name}.csr", "-subj", f"/CN={name}")
        if dates is not None:
            (self.directory / "issued").write_text("")
            (self.directory / "dated").write_text(_DATED)
            self._openssl("ca", "-batch", "-config", "dated", "-cert", signer.name, "-keyfile", f"{ca}.key", "-in", f"{name}.csr",
                          "-startdate", dates[0], "-enddate", dates[1], "-extfile", "names", "-notext", "-out", cert.name)  # fmt: skip
            return cert, key
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", signer.name, "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", "2",
                      "-extfile", "names", "-out", cert.name)  # fmt: skip
        return cert, key

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True)


_DATED = """
[ca]
default_ca = dated
[dated]
database = issued
rand_serial = yes
new_certs_dir = .
default_md = sha256
policy = names
[names]
commonName = supplied
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@pytest.fixture(scope="session")
def server_wire(request: pytest.FixtureRequest) -> str:
    """The wire of a test's servers: ENGRAM_WIRE says it to them. What makes servers asks for it, so that none outlives its wire's tests."""
    return str(request.param)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, server_wire: str) -> Iterator[ServerProcess]:
    """One server for all tests that leave it alone."""
    with ServerProcess(tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.fixture(scope="session")
def server_type(server_wire: str) -> type[ServerProcess]:
    """For tests that make servers of their own, or that live as long as a module."""
    return ServerProcess


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Makes CAs and certificates."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates for tests are made with the openssl command, which is not here")
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def digits_alone(tmp_path: pathlib.Path) -> tuple[str, ...]:
    """Flags of a server whose only model is digits-reader, which therefore starts quickly."""
    models = tmp_path / "digits-alone"
    models.mkdir()
    (models / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    return "--models", str(models)


@pytest.fixture
def server(
    tmp_path: pathlib.Path, digits_alone: tuple[str, ...], server_type: type[ServerProcess]
) -> Iterator[ServerProcess]:
    """A server of the test's own, to kill, stop and start again."""
    with server_type(tmp_path, *digits_alone) as one:
        yield one


@pytest.fixture
def server_with(
    tmp_path: pathlib.Path, digits_alone: tuple[str, ...], server_type: type[ServerProcess]
) -> Callable[..., ServerProcess]:
    """Makes a server with flags of the test's own, to be entered as a context. Unless they name models, it has digits-reader alone."""

    def make(*flags: str) -> ServerProcess:
        return server_type(tmp_path, *flags, *(() if "--models" in flags else digits_alone))

    return make


@pytest.fixture
def start_redis(tmp_path: pathlib.Path) -> Iterator[Callable[..., RedisProcess]]:
    """Starts Redis processes with flags of their own, and ends them."""
    yield from _starter(RedisProcess, tmp_path)


@pytest.fixture(scope="module")
def start_module_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisProcess]]:
    """The same for a whole module."""
    yield from _starter(RedisProcess, tmp_path_factory.mktemp("redis"))


@pytest.fixture
def start_cluster(tmp_path: pathlib.Path) -> Iterator[Callable[..., RedisCluster]]:
    """Starts Redis Clusters, and ends them."""
    yield from _starter(RedisCluster, tmp_path)


@pytest.fixture(scope="module")
def start_module_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisCluster]]:
    """The same for a whole module."""
    yield from _starter(RedisCluster, tmp_path_factory.mktemp("redis"))


def _starter(kind: type[_Redis], parent: pathlib.Path) -> Iterator[Callable[..., _Redis]]:
    started: list[_Redis] = []

    def start(*flags: str) -> _Redis:
        directory = parent / f"redis-{len(started)}"
        directory.mkdir()
        started.append(kind(directory, *flags))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def redis_process(request: pytest.FixtureRequest) -> Any:
    """A Redis, or a cluster, on which a test's servers have their sessions."""
    return request.getfixturevalue("start_cluster" if ServerProcess.on_cluster else "start_redis")()


@pytest.fixture(scope="module")
def module_redis(request: pytest.FixtureRequest) -> Any:
    """The same for a whole module."""
    return request.getfixturevalue("start_module_cluster" if ServerProcess.on_cluster else "start_module_redis")()


@pytest.fixture(name="free_port", scope="session")
def _free_port() -> Callable[[], int]:
    return free_port
